"""The official `openai` client works unchanged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

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
            model="default",
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
    options = {"model": "default", "temperature": 0, "max_tokens": 8}
    by_text = client.completions.create(prompt=prompt, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]
    by_ids = client.completions.create(prompt=ids, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert by_text.choices[0].text == by_ids.choices[0].text == "tea!"
    stopped = client.completions.create(prompt=prompt, stop=["!"], **options)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("tea", "stop")


def test_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    """What evaluation harnesses do: echo, log-probabilities, no new token."""
    prompt = "<|user|>Say tea.<|end|><|assistant|>tea!"
    scored = client.completions.create(model="default", prompt=prompt, max_tokens=0, echo=True, logprobs=1)
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


def test_what_the_server_says_may_be_sent_back(client: openai.OpenAI) -> None:
    """The way of OpenAI's documentation: append the message of the reply, ask again."""
    conversation: list[Any] = [{"role": "user", "content": "Say tea."}]
    options: Any = {"model": "default", "temperature": 0, "max_tokens": 12}
    reply = client.chat.completions.create(messages=conversation, **options)
    raw = json.loads(
        client.chat.completions.with_raw_response.create(messages=conversation, **options).content
    )
    with client.chat.completions.stream(messages=conversation, **options) as stream:
        assembled = stream.get_final_completion().choices[0].message
    message = reply.choices[0].message
    answers: list[Any] = [
        *(message, message.model_dump(), message.model_dump(exclude_none=True)),
        *(raw["choices"][0]["message"], assembled.model_dump(exclude={"parsed"})),
    ]
    then = {"role": "user", "content": "Say oak."}
    turns: list[Any] = [[*conversation, answer, then] for answer in answers]
    replies = [client.chat.completions.create(messages=m, **options) for m in turns]
    assert len({r.choices[0].message.content for r in replies}) == 1
    assert "refusal" in raw["choices"][0]["message"]


NOTHING: dict[str, Any] = {
    **dict.fromkeys(
        ("n", "stop", "temperature", "top_p", "stream", "logprobs", "top_logprobs", "max_tokens")
    ),
    **dict.fromkeys(("seed", "user", "metadata", "presence_penalty", "frequency_penalty", "stream_options")),
    **dict.fromkeys(
        ("max_completion_tokens", "tools", "tool_choice", "response_format", "logit_bias", "model")
    ),
}


def test_what_says_nothing_is_as_if_it_had_not_been_sent(client: openai.OpenAI) -> None:
    empty = {"refusal": None, "tool_calls": [], "function_call": None, "audio": None, "annotations": []}
    empty |= {"reasoning_details": [], "images": [], "provider_specific_fields": {}, "parsed": {"a": 1}}
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "tea."}]
    plain = [{"role": "user", "content": "Say oak."}, {"role": "assistant", "content": "oak!"}]
    bodies: list[dict[str, Any]] = [
        {"messages": [*plain, {"role": "user", "content": "Say tea."}]},
        {"messages": [plain[0], {**plain[1], **empty}, {"role": "user", "content": parts, "name": "ann"}]},
        {"messages": [*plain, {"role": "user", "content": "Say tea.", "tool_calls": None}], **NOTHING},
    ]
    given = {"temperature": 0, "max_tokens": 12}
    replies = [client.post("/chat/completions", body={**b, **given}, cast_to=object) for b in bodies]
    assert len({r["choices"][0]["message"]["content"] for r in replies}) == 1  # pyright: ignore[reportIndexIssue]
    texts = [
        client.post("/completions", body={"prompt": "Say tea.", **more, **given}, cast_to=object)
        for more in (
            {},
            {k: v for k, v in NOTHING.items() if "token" not in k} | {"suffix": None, "echo": None},
        )
    ]
    assert texts[0]["choices"] == texts[1]["choices"]  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "content": None}, "`content` is null"),
        ({"role": "assistant", "content": "a", "tool_calls": [{"id": "x"}]}, "tool_calls"),
        ({"role": "assistant", "content": "a", "refusal": "no"}, "refusal"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "part 0.*image_url",
        ),
        ({"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]}, "part 0"),
        ({"role": "user"}, "content"),
    ],
)
def test_what_would_change_the_answer_is_refused(client: openai.OpenAI, message: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(model="default", messages=[message])


def test_errors_are_the_clients_exceptions(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens"):
        client.completions.create(model="default", prompt="a", max_tokens=1000)
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        client.completions.create(model="default", prompt="a", presence_penalty=3.0)
    with pytest.raises(openai.NotFoundError):
        client.get("/nothing", cast_to=object)
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="no", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.get("/lessons", cast_to=object)
