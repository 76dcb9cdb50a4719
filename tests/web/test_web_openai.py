"""The official `openai` client works unchanged."""

from __future__ import annotations

import math
from collections.abc import Iterator

import openai
import pytest
from tiny_server import KEY, Running

from secondnature.model.chat import read_tokenizer


@pytest.fixture(scope="module")
def server(shared_server: Running) -> Running:
    """It only answers here."""
    return shared_server


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": "Say tea."}]
    whole = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=12)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("tea!", "stop")
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = client.chat.completions.create(  # pyright: ignore[reportCallIssue]
        model=model,
        messages=messages,  # pyright: ignore[reportArgumentType]
        temperature=0,
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "tea!"
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == "stop"
    extra = chunks[-2].model_extra or {}
    assert extra["weights_version"] == (whole.model_extra or {})["weights_version"]
    assert extra["trial"] is False


def test_logprobs_and_seed(client: openai.OpenAI) -> None:
    def ask(seed: int) -> tuple[str | None, list[float]]:
        answer = client.chat.completions.create(
            model="any",
            messages=[{"role": "user", "content": "Anything at all?"}],
            temperature=1.5,
            max_tokens=16,
            seed=seed,
            logprobs=True,
            top_logprobs=3,
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert all(len(t.top_logprobs) == 3 for t in logprobs.content)
        assert all(t.top_logprobs[0].logprob >= t.logprob - 1e-6 for t in logprobs.content)
        return answer.choices[0].message.content, [t.logprob for t in logprobs.content]

    first, again, other = ask(7), ask(7), ask(8)
    assert first == again != other
    assert all(math.isfinite(p) and p <= 0 for p in first[1])


def test_stop_text_and_token_ids(client: openai.OpenAI, server: Running) -> None:
    tokenizer = read_tokenizer(server.parts.runner.trainer._model_dir)  # pyright: ignore[reportPrivateUsage]
    prompt = "<|user|>Say tea.<|end|><|assistant|>"
    ids = tokenizer(prompt)["input_ids"]
    options = {"model": "any", "temperature": 0, "max_tokens": 8}
    by_text = client.completions.create(prompt=prompt, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]
    by_ids = client.completions.create(prompt=ids, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert by_text.choices[0].text == by_ids.choices[0].text == "tea!"
    stopped = client.completions.create(prompt=prompt, stop=["!"], **options)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("tea", "stop")


def test_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    """What evaluation harnesses do: echo, log-probabilities, no new token."""
    prompt = "<|user|>Say tea.<|end|><|assistant|>tea!"
    scored = client.completions.create(model="any", prompt=prompt, max_tokens=0, echo=True, logprobs=1)
    logprobs = scored.choices[0].logprobs
    assert scored.choices[0].text.endswith("tea!")
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    assert logprobs.token_logprobs[0] is None
    assert all(p is not None and p <= 0 for p in logprobs.token_logprobs[1:])
    assert sum(logprobs.token_logprobs[-2:]) > -1  # it knows the answer
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    assert logprobs.text_offset[0] == 0


def test_errors_are_the_clients_exceptions(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 256"):
        client.completions.create(model="any", prompt="a", max_tokens=1000)
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        client.completions.create(model="any", prompt="a", presence_penalty=1.0)
    with pytest.raises(openai.NotFoundError):
        client.get("/nothing", cast_to=object)
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="no", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.get("/lessons", cast_to=object)
