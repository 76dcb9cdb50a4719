"""Whatever the server says is taken back: as the next request's history, and in corrections.

Models say anything here (hot, seeded), with tools, shapes, thoughts, cuts and log-probabilities as it comes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_server import KEY, Running, running
from tiny_tools import LOOK, PAINT, make_caller, make_thinker

ASK = {"role": "user", "content": "Paint it."}
SHAPE = {
    "type": "json_schema",
    "json_schema": {"schema": {"type": "object", "properties": {"a": {"enum": [1]}}}},
}
EXAMPLES = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module", params=[make_caller, make_thinker], ids=["caller", "thinker"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = request.param(tmp_path_factory.mktemp("model"))
    with running(tmp_path_factory.mktemp("home"), model) as server:
        yield server


def post(server: Running, path: str, body: Any) -> Any:
    """The answer, or the events of a stream. An error fails the test."""
    headers = {"authorization": f"Bearer {KEY}"}
    reply = httpx2.post(server.url + path, json=body, headers=headers, trust_env=False, timeout=120)
    assert reply.status_code == 200, (body, reply.text)
    if not reply.headers["content-type"].startswith("text/event-stream"):
        return reply.json()
    lines = [x.removeprefix("data: ") for x in reply.text.splitlines() if x.startswith("data: ")]
    return [json.loads(x) for x in lines if x != "[DONE]"]


def tools(server: Running) -> bool:
    """Whether the model's template shows any."""
    return "tools" in (Path(server.parts.settings.model) / "chat_template.jinja").read_text()


def put_together(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The message of a stream, as clients put it together: all that came, joined by its place."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            for key in ("content", "reasoning_content"):
                if key in delta:
                    message[key] = message.get(key, "") + delta[key]
            message["tool_calls"] += delta.get("tool_calls", [])
    return message


asked = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0, 1.0, 5.0]),
        "seed": st.integers(0, 1000),
        "max_tokens": st.sampled_from([1, 3, 12, 80]),
        "stream": st.booleans(),
        "logprobs": st.booleans(),
    },
    optional={
        "response_format": st.sampled_from([SHAPE, {"type": "json_object"}]),
        "tools": st.just([PAINT, LOOK]),
        "tool_choice": st.sampled_from(["auto", "none", "required"]),
    },
)


def possible(server: Running, how: dict[str, Any]) -> dict[str, Any]:
    """Without tools where the model knows none, and none demanded where none are sent."""
    kept = {k: v for k, v in how.items() if tools(server) or not k.startswith("tool")}
    return kept if "tools" in kept else {k: v for k, v in kept.items() if k != "tool_choice"}


@EXAMPLES
@given(how=asked)
def test_a_message_is_taken_back(server: Running, how: dict[str, Any]) -> None:
    body = possible(server, how)
    found = post(server, "/v1/chat/completions", {"messages": [ASK], **body})
    message = put_together(found) if body["stream"] else found["choices"][0]["message"]
    key = found[0]["id"] if body["stream"] else found["id"]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": "done"}
        for call in message.get("tool_calls") or []
    ]
    turns = [ASK, message, *results]
    more = {k: v for k, v in body.items() if k == "tools"}
    post(server, "/v1/chat/completions", {"messages": [*turns, ASK], "max_tokens": 1, **more})
    wanted = {"chosen": "Red.", **more}
    given = [{"prompt": [*turns, ASK], **wanted}]
    if message["content"] or message.get("tool_calls"):
        given += [{"prompt": [ASK], "said": [message], "rating": -1, **wanted}]
        given += [{"messages": [ASK, message], "rating": 1}] if message["content"] else []
    kept = post(server, "/v1/corrections", {"corrections": given})["corrections"]
    assert len(kept) == len(given)
    post(server, "/v1/corrections", {"corrections": kept})  # and what is kept is taken back, too
    post(server, "/v1/feedback", {"messages": [ASK, message], "rating": -1, "text": "No."})
    post(server, "/v1/feedback", {"completion_id": key, "corrected": "Red."})


@EXAMPLES
@given(how=asked)
def test_the_items_of_a_response_are_taken_back(server: Running, how: dict[str, Any]) -> None:
    body = possible(server, how)
    shape = body.get("response_format", {"type": "text"})
    given: dict[str, Any] = {
        "temperature": body["temperature"],
        "max_output_tokens": body["max_tokens"],
        "stream": body["stream"],
        "text": {"format": {**shape.get("json_schema", {}), "type": shape["type"]}},
    }
    if "tools" in body:
        given["tools"] = [{"type": "function", **tool["function"]} for tool in body["tools"]]
        given["tool_choice"] = body.get("tool_choice", "auto")
    found = post(server, "/v1/responses", {"input": [ASK], **given})
    whole = found[-1]["response"] if body["stream"] else found
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "done"}
        for item in whole["output"]
        if item["type"] == "function_call"
    ]
    turns = [ASK, *whole["output"], *results, ASK]
    post(server, "/v1/responses", {**given, "input": turns, "max_output_tokens": 1, "stream": False})
    post(server, "/v1/feedback", {"completion_id": whole["id"], "rating": -1, "corrected": "Red."})


@EXAMPLES
@given(seed=st.integers(0, 1000), echo=st.booleans(), n=st.integers(1, 2))
def test_what_was_scored_may_be_asked_again(server: Running, seed: int, echo: bool, n: int) -> None:
    """The text and the tokens of a choice with log-probabilities are prompts, and mean the same."""
    asked = {"temperature": 2, "seed": seed, "max_tokens": 6, "logprobs": 2, "echo": echo, "n": n}
    prompt = "<|user|>Paint it.<|end|><|assistant|>"
    for choice in post(server, "/v1/completions", {"prompt": prompt, **asked})["choices"]:
        scored = choice["logprobs"]
        assert {len(scored[k]) for k in scored} == {len(scored["tokens"])}
        text = choice["text"] if echo else prompt + choice["text"]
        assert text.startswith(prompt)
        again = post(
            server, "/v1/completions", {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}
        )
        assert again["choices"][0]["text"] == text
