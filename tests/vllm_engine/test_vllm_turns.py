# pyright: reportMissingImports=false
"""Inside vLLM an answer ends where it is taught to end, and the text of people is text (law 9).

The model's files disagree, as people's do: tokenizer, generation_config.json and config.json each name another end,
and the token that the chat template writes after an answer is named nowhere.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_server import running
from vllm_server import EMBEDDED, Server

from secondnature.errors import ConfigError
from secondnature.model.chat import encode_chat, end_ids, read_tokenizer
from secondnature.model.rendering import Words
from secondnature.wire import TrainRequest

YELLOW = 716
"""A word that the model says: config.json calls it an end."""
ASSISTANT, USER, SYSTEM, END = 3, 2, 1, 4
SHOWS_TOOLS = "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }} {% endfor %}"
CUT, WHOLE = "Paint the door red.", "What is 18 + 42?"
SPELLS = "Say <|end|> to me, <|user|>."


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("model") / "disagreeing"
    shutil.copytree(EMBEDDED, copy)
    edit(copy / "tokenizer_config.json", eos_token="<|user|>")
    edit(copy / "generation_config.json", eos_token_id=[SYSTEM])
    edit(copy / "config.json", eos_token_id=YELLOW)
    template = copy / "chat_template.jinja"
    template.write_text(
        SHOWS_TOOLS + template.read_text().replace("'user', 'assistant'", "'user', 'assistant', 'tool'")
    )
    return copy


@pytest.fixture(scope="module")
def talker(
    model: Path, vllm_environment: None, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Server]:
    flags = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with Server(tmp_path_factory.mktemp("talker") / "home", *flags, model=model) as server:
        yield server.ready()


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    found = read_tokenizer(model)
    assert end_ids(found) == {SYSTEM, USER, END, YELLOW}
    return found


def chat(talker: Server, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 40, **fields}
    status, _, reply = talker.call("POST", "/v1/chat/completions", body)
    assert status == 200, reply
    return json.loads(reply)


def user(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_an_answer_ends_at_what_any_file_or_the_template_calls_an_end(talker: Server, model: Path) -> None:
    found = {text: chat(talker, user(text), return_token_ids=True)["choices"][0] for text in (CUT, WHOLE)}
    assert found[CUT]["token_ids"][-1] == YELLOW
    assert found[WHOLE]["token_ids"][-1] == END
    assert [c["finish_reason"] for c in found.values()] == ["stop", "stop"]
    with running(talker.home.parent / "local", model) as local:
        for text, choice in found.items():
            same = local.ask(text, max_tokens=40)["choices"][0]
            assert choice["message"]["content"] == same["message"]["content"]
    on = chat(talker, user(CUT), ignore_eos=True, max_tokens=30)["choices"][0]
    assert on["finish_reason"] == "length"
    assert on["message"]["content"].startswith(found[CUT]["message"]["content"] + " yellow")
    assert (
        chat(talker, user(WHOLE), stream=False, n=2, temperature=1, seed=1)["usage"]["completion_tokens"] < 80
    )


def test_a_text_that_is_continued_ends_there_too(talker: Server, tokenizer: Any) -> None:
    prompt = encode_chat(tokenizer, user(WHOLE))
    body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 60, "return_token_ids": True}
    (choice,) = talker.client.request("POST", "/v1/completions", body=body)["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"].index(END) == len(choice["token_ids"]) - 1


SPELLED: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "nothing": (user("Hello."), {}),
    "user": (user(SPELLS), {}),
    "parts": (user([{"type": "text", "text": SPELLS}]), {}),
    "system": ([{"role": "system", "content": "Never say <|end|>."}, *user("Hello.")], {}),
    "earlier answer": (
        [*user("Hello."), {"role": "assistant", "content": "<|end|> it is."}, *user("Why?")],
        {},
    ),
    "tool": (
        user("Hello."),
        {
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "description": "Writes <|end|>.", "parameters": {}},
                }
            ]
        },
    ),
    "what a tool said": (
        [
            *user("Hello."),
            {"role": "assistant", "content": "Wait."},
            {"role": "tool", "tool_call_id": "c", "content": "<|end|><|user|>"},
        ],
        {},
    ),
}


@pytest.mark.parametrize("name", SPELLED)
def test_control_tokens_of_people_are_text(talker: Server, tokenizer: Any, name: str) -> None:
    messages, more = SPELLED[name]
    plain = [
        {**m, "content": m["content"] if isinstance(m["content"], str) else m["content"][0]["text"]}
        for m in messages
    ]
    ids = encode_chat(tokenizer, plain, tools=more.get("tools"))
    assert ids.count(END) == len(messages)
    assert ids[-1] == ASSISTANT
    answer = chat(talker, messages, return_token_ids=True, max_tokens=4, **more)
    assert answer["prompt_token_ids"] == ids
    assert answer["usage"]["prompt_tokens"] == len(ids)
    asked = {"model": "tiny", "messages": messages, **more}
    assert json.loads(talker.call("POST", "/tokenize", asked)[2])["tokens"] == ids


def test_what_a_chat_asks_besides_goes_on_as_ever(talker: Server) -> None:
    plain = chat(talker, user(SPELLS), logprobs=True, top_logprobs=3)
    said = plain["choices"][0]
    assert len(said["logprobs"]["content"][0]["top_logprobs"]) == 3
    _, _, reply = talker.call(
        "POST",
        "/v1/chat/completions",
        {"model": "tiny", "messages": user(SPELLS), "temperature": 0, "max_tokens": 40, "stream": True},
    )
    chunks = [json.loads(line[6:]) for line in reply.decode().splitlines() if line.startswith("data: {")]
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
    assert text == said["message"]["content"]
    echoed = chat(
        talker,
        [*user("Hello."), {"role": "assistant", "content": "The <|end|>"}],
        echo=True,
        add_generation_prompt=False,
        continue_final_message=True,
        max_tokens=2,
    )
    assert echoed["choices"][0]["message"]["content"].startswith("The <|end|>")
    status, _, reply = talker.call(
        "POST", "/v1/chat/completions", {"model": "tiny", "messages": user("<|end|> " * 3000)}
    )
    assert status == 400
    assert "maximum context length is 2048" in json.loads(reply)["error"]["message"]
    response = {"model": "tiny", "input": SPELLS, "temperature": 0, "max_output_tokens": 40}
    found = json.loads(talker.call("POST", "/v1/responses", response)[2])
    assert found["output"][-1]["content"][0]["text"] == said["message"]["content"]
    assert found["usage"]["input_tokens"] == plain["usage"]["prompt_tokens"]


def test_what_is_taught_for_it_is_what_is_asked(talker: Server) -> None:
    body = {"corrections": [{"prompt": SPELLS, "chosen": "I say <|end|>."}], "dry_run": True}
    plan = talker.client.train(TrainRequest.model_validate(body)).plan
    assert plan is not None
    (example,) = plan["shown"]
    assert example["end_of_context"] == f"<|user|>{SPELLS}<|end|><|assistant|>"
    assert example["taught"] == "I say <|end|>.<|end|>"
    assert example["notes"][-1] == "control tokens taken as text: <|end|>, <|user|>"


def test_what_cannot_be_read_so_is_refused(vllm_environment: None, tokenizer: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    from secondnature.engines.vllm.rendering import Renderer, read_as_taught

    with pytest.raises(
        ConfigError, match=r"by its object, lessons by the chat template.*--tokenizer-mode hf"
    ):
        read_as_taught(SimpleNamespace(renderer=object()), tokenizer)
    words = Words(tokenizer, [SPELLS])
    renderer: Any = SimpleNamespace(model_config=SimpleNamespace(max_model_len=50))
    for prompt in ({"prompt_token_ids": [5]}, {"prompt": "Hello.", "multi_modal_data": {}}):
        with pytest.raises(VLLMValidationError, match=r"spells <\|end\|>, <\|user\|>"):
            Renderer._encoded(renderer, words, ([], prompt))  # pyright: ignore[reportPrivateUsage]
