"""Tools and answers of a given shape, asked by the official client, on a model that calls a tool."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from tiny_server import KEY, Running, running
from tiny_tools import LOOK, PAINT, make_caller

ASK: Any = [{"role": "user", "content": "Paint it."}]
TOOLS: Any = [PAINT, LOOK]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Around the model that calls a tool."""
    model = make_caller(tmp_path_factory.mktemp("caller"))
    with running(tmp_path_factory.mktemp("home"), model) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def _ask(client: openai.OpenAI, messages: Any = ASK, **more: Any) -> Any:
    given = {"temperature": 0, "max_tokens": 120, **more}
    return client.chat.completions.create(model="default", messages=messages, **given)


# ---- tools


@pytest.mark.parametrize("streamed", [False, True])
def test_a_call_and_what_came_of_it(client: openai.OpenAI, streamed: bool) -> None:
    if streamed:
        with client.chat.completions.stream(
            model="default", messages=ASK, tools=TOOLS, temperature=0, max_tokens=120
        ) as stream:
            choice: Any = stream.get_final_completion().choices[0]
    else:
        choice = _ask(client, tools=TOOLS).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I will.")
    call = choice.message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "paint")
    assert json.loads(call.function.arguments) == {"colour": "red"}
    said = choice.message.model_dump(exclude={"parsed"})
    for called in said["tool_calls"]:
        called["function"].pop("parsed_arguments", None)
    then = [*ASK, said, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    last = _ask(client, then, tools=TOOLS).choices[0]
    assert (last.message.content, last.finish_reason) == ("It is red.", "stop")


def test_what_shows_no_tool_is_as_if_none_was_sent(client: openai.OpenAI) -> None:
    for more in ({}, {"tools": []}, {"tools": None}, {"tools": TOOLS, "tool_choice": "none"}):
        assert _ask(client, **more).choices[0].message.content == "I cannot."
    hello: Any = [{"role": "user", "content": "Hello."}]
    answer = _ask(client, hello, tools=TOOLS, tool_choice="auto", parallel_tool_calls=False).choices[0]
    assert (answer.message.content, answer.message.tool_calls) == ("Hello!", None)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_a_call_that_is_demanded_is_made(client: openai.OpenAI, choice: Any) -> None:
    for seed in range(3):
        asked = {"tools": TOOLS, "tool_choice": choice, "temperature": 3, "seed": seed}
        found = _ask(client, **asked).choices[0]
        assert found.finish_reason == "tool_calls"
        call = found.message.tool_calls[0].function
        arguments = json.loads(call.arguments)
        assert arguments in ([{"colour": "red"}, {"colour": "blue"}] if call.name == "paint" else [{}])
        assert call.name == "paint" or choice == "required"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tool_choice": "required"}, "no `tools`"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sing"}}}, "sing"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "x"}}]}]},
            "tool_calls",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "null"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "colour"}},
                }
            },
            "colour",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client: openai.OpenAI, more: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(**{"model": "default", "messages": ASK, **more})


def test_a_template_without_tools_says_what_to_turn_off_where_none_may_be_ignored(
    talker: Path, tmp_path: Path
) -> None:
    with (
        running(tmp_path, talker, ignore_tools=False) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        for more in (
            {"tools": TOOLS},
            {"tools": TOOLS, "stream": True},
            {"tools": TOOLS, "tool_choice": "required"},
        ):
            with pytest.raises(openai.BadRequestError, match="Function calling") as refused:
                _ask(client, **more)
            assert (refused.value.param, refused.value.code) == ("tools", "unsupported_parameter")
        turns = [*ASK, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "a"}}]}]
        with pytest.raises(openai.BadRequestError, match="turns with calls"):
            _ask(client, turns)
        assert _ask(client, tools=TOOLS, tool_choice="none", max_tokens=4).choices


def test_tools_that_no_template_shows_are_left_out_and_a_header_tells(shared_server: Running) -> None:
    tea: Any = [{"role": "user", "content": "Say tea."}]
    with openai.OpenAI(base_url=f"{shared_server.url}/v1", api_key=KEY, max_retries=0) as client:
        plain = _ask(client, tea).choices[0].message.content
        raw = client.chat.completions.with_raw_response.create(
            model="default", messages=tea, tools=TOOLS, temperature=0, max_tokens=120
        )
        assert raw.headers["x-tools-ignored"] == "2"
        answer = raw.parse()
        assert answer.choices[0].message.content == plain
        given = client.post(
            "/feedback", body={"completion_id": answer.id, "rating": -1, "text": "No."}, cast_to=object
        )
        assert given["correction"]["said"][0]["content"] == plain  # type: ignore[index]


def test_what_is_demanded_is_made_though_no_template_shows_it(shared_server: Running) -> None:
    with openai.OpenAI(base_url=f"{shared_server.url}/v1", api_key=KEY, max_retries=0) as client:
        named: Any = {"type": "function", "function": {"name": "paint"}}
        raw = client.chat.completions.with_raw_response.create(
            model="default", messages=ASK, tools=TOOLS, tool_choice=named, temperature=0, max_tokens=120
        )
        said: Any = raw.parse().choices[0].message
        assert (raw.headers["x-tools-ignored"], said.content) == ("2", None)
        assert json.loads(said.tool_calls[0].function.arguments)["colour"] in ("red", "blue")
        call = said.tool_calls[0]
        done: Any = {"role": "tool", "tool_call_id": call.id, "content": "done"}
        wrote = f'{{"name": "paint", "arguments": {call.function.arguments}}}'
        written: Any = [
            {"role": "assistant", "content": f"<tool_call>\n{wrote}\n</tool_call>"},
            {"role": "user", "content": "<tool_response>\ndone\n</tool_response>"},
        ]
        asked = _ask(client, [*ASK, said, done], tools=TOOLS, max_tokens=4)
        as_text = _ask(client, [*ASK, *written], max_tokens=4)
        assert asked.choices[0].message.content == as_text.choices[0].message.content
        assert asked.usage.prompt_tokens == as_text.usage.prompt_tokens


def test_feedback_is_taken_where_tools_were_shown_and_none_was_called(client: openai.OpenAI) -> None:
    hello: Any = [{"role": "user", "content": "Hello."}]
    for streamed in (False, True):
        if streamed:
            identity = [chunk.id for chunk in _ask(client, hello, tools=TOOLS, stream=True)][-1]
        else:
            identity = _ask(client, hello, tools=TOOLS).id
        body = {"completion_id": identity, "rating": -1, "text": "Be brief."}
        found: Any = client.post("/feedback", body=body, cast_to=object)
        correction = found["correction"]
        assert [turn["content"] for turn in correction["prompt"] + correction["said"]] == ["Hello.", "Hello!"]


def test_feedback_on_an_answer_that_calls_says_why_not(client: openai.OpenAI) -> None:
    called = _ask(client, tools=TOOLS)
    named: Any = {"tools": TOOLS, "tool_choice": "required"}
    identities = [
        called.id,
        _ask(client, **named).id,
        [x.id for x in _ask(client, tools=TOOLS, stream=True)][-1],
    ]
    said = called.choices[0].message
    done: Any = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "done"}
    identities.append(_ask(client, [*ASK, said, done], tools=TOOLS).id)
    for identity in identities:
        with pytest.raises(openai.BadRequestError, match="it calls tools"):
            client.post("/feedback", body={"completion_id": identity, "rating": -1}, cast_to=object)


# ---- answers of a given shape


class Door(BaseModel):
    """What is asked for."""

    colour: Literal["red", "blue"]
    coats: Literal[1, 2]


def test_an_answer_fits_the_schema(client: openai.OpenAI) -> None:
    for seed in range(2):
        parsed = client.chat.completions.parse(
            model="default", messages=ASK, response_format=Door, temperature=3, seed=seed, max_tokens=120
        )
        assert isinstance(parsed.choices[0].message.parsed, Door)
    schema = {"type": "json_schema", "json_schema": {"name": "door", "schema": Door.model_json_schema()}}
    answers = _ask(client, response_format=schema, temperature=3, n=3, seed=1).choices
    assert all(Door.model_validate_json(c.message.content) for c in answers)
    chunks = _ask(client, response_format=schema, stream=True)
    assert Door.model_validate_json("".join(c.choices[0].delta.content or "" for c in chunks))


def test_any_object_and_any_text(client: openai.OpenAI) -> None:
    answer = _ask(client, response_format={"type": "json_object"}, max_tokens=400).choices[0]
    assert answer.message.content.startswith("{")
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)
    assert _ask(client, response_format={"type": "text"}).choices[0].message.content == "I cannot."


def test_with_tools_an_answer_fits_or_is_a_call(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "door", "schema": Door.model_json_schema()}}
    for seed in range(4):
        found = _ask(client, tools=TOOLS, response_format=schema, temperature=3, seed=seed).choices[0]
        if found.message.tool_calls:
            assert found.message.tool_calls[0].function.name in ("paint", "look")
        else:
            assert Door.model_validate_json(found.message.content)
