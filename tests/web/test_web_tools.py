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
from tiny_tools import LOOK, PAINT, THOUGHT, make_caller, make_thinker

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


# ---- corrections of answers with tools


def _post(client: openai.OpenAI, path: str, **body: Any) -> Any:
    return client.post(path, body=body, cast_to=object)


def test_an_answer_that_called_a_tool_is_corrected_and_taught(client: openai.OpenAI) -> None:
    """It is recorded as it was, and the wanted answer is taught where the model read the tools."""
    answer = _ask(client, tools=TOOLS)
    found = _post(client, "/feedback", completion_id=answer.id, corrected="Which colour?")
    kept = found["correction"]
    assert found["state"]["state"] == "waiting"
    assert kept["said"][0]["content"] == "I will."
    called = kept["said"][0]["tool_calls"][0]["function"]
    assert (called["name"], json.loads(called["arguments"])) == ("paint", {"colour": "red"})
    assert [t["function"]["name"] for t in kept["tools"]] == ["paint", "look"]
    assert "rejected" not in kept  # what it called is no text that could be taught away
    (shown,) = _post(client, "/train", corrections=[kept], dry_run=True)["plan"]["shown"]
    assert "<|system|>paint look <|end|><|user|>Paint it.<|end|><|assistant|>" in shown["end_of_context"]
    assert shown["taught"].startswith("Which colour?")


def test_an_answer_after_a_tools_turn_is_found_by_its_conversation(client: openai.OpenAI) -> None:
    first = _ask(client, tools=TOOLS).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "done"}
    turns = [*ASK, first, result]
    second = _ask(client, turns, tools=TOOLS)
    said = second.choices[0].message
    body = {"messages": [m if isinstance(m, dict) else m.model_dump() for m in [*turns, said]], "rating": -1}
    kept = _post(client, "/feedback", **body)["correction"]
    assert kept["completion_id"] == second.id
    assert [m["role"] for m in kept["prompt"]] == ["user", "assistant", "tool"]
    other = {**body, "messages": [ASK[0], {"role": "assistant", "content": "I will."}, *body["messages"][2:]]}
    assert "completion_id" not in _post(client, "/feedback", **other, text="No.")["correction"]


def test_a_stream_with_tools_that_was_left_is_known_by_what_it_was(client: openai.OpenAI) -> None:
    for enough in ("", "I"):
        key = ""
        with _ask(client, tools=TOOLS, stream=True) as stream:
            for chunk in stream:
                key = chunk.id
                if (chunk.choices[0].delta.content or "").startswith(enough):
                    break
        kept = _post(client, "/feedback", completion_id=key, rating=-1, text="No.")["correction"]
        assert kept["finish_reason"] in ("unfinished", "stop")
        assert "<tool_call>" not in json.dumps(kept.get("said"))
        assert kept["tools"]


def test_what_a_template_without_tools_cannot_show_is_passed_over_and_named(shared_server: Running) -> None:
    with openai.OpenAI(base_url=f"{shared_server.url}/v1", api_key=KEY, max_retries=0) as client:
        called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
        turns = [*ASK, called, {"role": "tool", "content": "red"}]
        given: list[Any] = [
            {"prompt": turns, "chosen": "It is red."},
            {"prompt": ASK, "chosen": "Red.", "tools": TOOLS},
            {"prompt": ASK, "said": [called], "chosen": "Red."},
            {"prompt": ASK, "chosen": "Red."},
        ]
        found = _post(client, "/corrections", corrections=given)
        states = [state["state"] for state in found["states"]]
        assert states == ["cannot_be_taught", "cannot_be_taught", "waiting", "waiting"], found["states"]
        assert "shows none" in found["states"][0]["reason"]
        plan = _post(client, "/train", ledger=True, dry_run=True)["plan"]
        passed = {x["id"]: x["reason"] for x in plan["passed_over"]}
        for kept in found["corrections"]:
            client.delete(f"/corrections/{kept['id']}", cast_to=object)
        assert passed.keys() >= {kept["id"] for kept in found["corrections"][:2]}
        assert not passed.keys() & {kept["id"] for kept in found["corrections"][2:]}


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


@pytest.mark.parametrize(
    "more",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": Door.model_json_schema()}}},
        {"guided_json": Door.model_json_schema()},
        {"guided_json": json.dumps(Door.model_json_schema())},
        {"structured_outputs": {"json": Door.model_json_schema(), "regex": None}},
    ],
    ids=["OpenAI's", "vLLM's older", "as text", "vLLM's"],
)
def test_a_text_is_continued_in_a_shape(client: openai.OpenAI, more: dict[str, Any]) -> None:
    given: Any = {"model": "default", "prompt": ["Paint it.", "Hello."], "temperature": 3, "seed": 1}
    choices = client.completions.create(**given, n=2, max_tokens=120, extra_body=more).choices
    assert len([Door.model_validate_json(c.text) for c in choices]) == 4
    chat = _ask(client, extra_body=more, temperature=3, seed=2).choices[0]
    assert Door.model_validate_json(chat.message.content)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"guided_json": "{"}, "no JSON"),
        ({"guided_json": {}, "response_format": {"type": "json_object"}}, "both"),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs.*not supported"),
        ({"guided_regex": "a+"}, "guided_regex"),
    ],
)
def test_shapes_of_other_kinds_are_refused_by_name(
    client: openai.OpenAI, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.completions.create(model="default", prompt="a", extra_body=more)


# ---- thoughts before a shape


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    model = make_thinker(tmp_path_factory.mktemp("thinker"))
    with (
        running(tmp_path_factory.mktemp("home"), model) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        yield client


def test_a_model_thinks_before_it_fits_the_schema(thinker: openai.OpenAI) -> None:
    """The shape begins behind the closed block, and what was thought is no part of what was asked for."""
    assert _ask(thinker).choices[0].message.content == f"{THOUGHT}</think>\nIt is red."
    schema = {"type": "json_schema", "json_schema": {"name": "door", "schema": Door.model_json_schema()}}
    shaped = _ask(thinker, response_format=schema, max_tokens=200)
    message = shaped.choices[0].message
    assert message.reasoning_content == THOUGHT
    assert Door.model_validate_json(message.content)
    chunks = list(_ask(thinker, response_format=schema, stream=True, max_tokens=200))
    deltas = [c.choices[0].delta for c in chunks]
    assert "".join(d.content or "" for d in deltas) == message.content
    assert "".join(getattr(d, "reasoning_content", "") for d in deltas) == THOUGHT
    told = {"chat_template_kwargs": {"enable_thinking": False}}
    plain = _ask(thinker, response_format=schema, extra_body=told, max_tokens=200).choices[0].message
    assert Door.model_validate_json(plain.content)
    assert not hasattr(plain, "reasoning_content")
    kept = _post(thinker, "/feedback", completion_id=shaped.id, rating=1)["correction"]
    said = kept["said"][0]["content"]
    assert said.startswith(f"{THOUGHT}</think>")
    assert said.endswith(message.content)


def test_a_response_has_its_thoughts_as_an_item(thinker: openai.OpenAI) -> None:
    given: Any = {"model": "default", "input": "Paint it.", "temperature": 0, "max_output_tokens": 200}
    answer: Any = thinker.responses.parse(text_format=Door, **given)
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output[0].content[0].text == THOUGHT
    assert isinstance(answer.output_parsed, Door)
    with thinker.responses.stream(text_format=Door, **given) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == answer.output_text
    assert kinds.index("response.reasoning_text.done") < kinds.index("response.output_text.delta")
    then = [
        {"role": "user", "content": "Paint it."},
        *answer.output,
        {"role": "user", "content": "Paint it."},
    ]
    assert thinker.responses.create(**{**given, "input": then}).status in ("completed", "incomplete")


def test_an_answer_that_is_cut_in_its_thoughts_has_said_nothing(thinker: openai.OpenAI) -> None:
    choice = _ask(thinker, response_format={"type": "json_object"}, max_tokens=2).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("", "length")
    assert THOUGHT.startswith(choice.message.reasoning_content)
