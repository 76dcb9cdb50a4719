"""`/v1/responses`, asked by the official client: text, tools, shapes, OpenAI's order of events, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from tiny_server import KEY, Running, running
from tiny_tools import PAINT, make_caller

TOOLS: Any = [{"type": "function", "strict": True, **PAINT["function"]}, {"type": "function", "name": "look"}]
GIVEN: Any = {"model": "default", "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Around the model that calls a tool."""
    model = make_caller(tmp_path_factory.mktemp("caller"))
    key = "the-key-of-those-who-ask"
    with running(tmp_path_factory.mktemp("home"), model, inference_key=key) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_text_from_text_and_from_items(client: openai.OpenAI) -> None:
    items: Any = [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "Hel"}, {"type": "input_text", "text": "lo."}],
        }
    ]
    message: Any = [{"type": "message", "role": "user", "content": "Hello."}]
    for given in ("Hello.", items, message):
        answer = client.responses.create(input=given, **GIVEN)
        assert (answer.output_text, answer.status, answer.error) == ("Hello!", "completed", None)
    chat = client.chat.completions.create(messages=[{"role": "user", "content": "Hello."}], **GIVEN)
    assert answer.usage is not None
    assert chat.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )
    stamped = answer.model_extra or {}
    assert stamped["weights_version"] == (chat.model_extra or {})["weights_version"]
    assert stamped["trial"] is False


def test_what_was_answered_may_be_sent_back(client: openai.OpenAI) -> None:
    said: Any = client.responses.create(input="Hello.", **GIVEN)
    turns: Any = [{"role": "user", "content": "Hello."}, *said.output, {"role": "user", "content": "Hello."}]
    assert client.responses.create(input=turns, **GIVEN).status == "completed"
    instructed = client.responses.create(input="Hello.", instructions="Be brief.", **GIVEN)
    assert instructed.instructions == "Be brief."
    assert instructed.usage is not None
    assert said.usage is not None
    assert instructed.usage.input_tokens > said.usage.input_tokens


def test_events_come_in_openais_order(client: openai.OpenAI) -> None:
    events = list(client.responses.create(input="Hello.", stream=True, **GIVEN))
    kinds = [e.type.removeprefix("response.") for e in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 0
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    last: Any = events[-1]
    assert last.response.output_text == "Hello!"
    assert last.response.model_extra["weights_version"]
    assert {e.item_id for e in events if hasattr(e, "item_id")} == {last.response.output[0].id}  # pyright: ignore[reportAttributeAccessIssue]


def test_the_stream_helper_gives_the_whole(client: openai.OpenAI) -> None:
    with client.responses.stream(input="Paint it.", tools=TOOLS, **GIVEN) as stream:
        kinds = [event.type for event in stream]
        found: Any = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    assert found.output_text == "I will."
    assert json.loads(found.output[1].arguments) == {"colour": "red"}


def test_a_call_and_what_came_of_it(client: openai.OpenAI) -> None:
    asked: Any = [{"role": "user", "content": "Paint it."}]
    answer: Any = client.responses.create(input=asked, tools=TOOLS, **GIVEN)
    call = answer.output[1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "paint", {"colour": "red"})
    then = [
        *asked,
        *answer.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "done"},
    ]
    assert client.responses.create(input=then, tools=TOOLS, **GIVEN).output_text == "It is red."
    named: Any = {"type": "function", "name": "paint"}
    demanded: Any = client.responses.create(input="Hello.", tools=TOOLS, tool_choice=named, **GIVEN)
    assert [item.type for item in demanded.output] == ["function_call"]


class Door(BaseModel):
    """What is asked for."""

    colour: Literal["red", "blue"]


def test_an_answer_fits_the_schema(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(input="Hello.", text_format=Door, model="default", temperature=3)
    assert isinstance(parsed.output_parsed, Door)


def test_an_answer_that_is_cut_says_so(client: openai.OpenAI) -> None:
    answer = client.responses.create(input="Hello.", max_output_tokens=2, **GIVEN)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(input="Hello.", max_output_tokens=2, stream=True, **GIVEN))
    assert events[-1].type == "response.incomplete"


@pytest.mark.parametrize(
    "neutral",
    [
        {"store": False},
        {"store": True},  # nothing is, and the answer says `store: false`
        {"previous_response_id": None, "conversation": None, "include": [], "truncation": "disabled"},
        {"reasoning": {"effort": None}, "service_tier": "auto", "background": False, "metadata": {"a": "b"}},
        {"reasoning": {"effort": "low"}},  # of a template that does not look at it
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}, "tools": [], "tool_choice": "auto"},
    ],
)
def test_what_changes_no_answer_is_accepted(client: openai.OpenAI, neutral: dict[str, Any]) -> None:
    answer: Any = client.post("/responses", body={"input": "Hello.", **GIVEN, **neutral}, cast_to=object)
    assert answer["output"][0]["content"][0]["text"] == "Hello!"
    assert answer["store"] is False


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id.*whole conversation"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "much"}}, "reasoning"),
        ({"reasoning": {"summary": "auto"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": [{"type": "computer_call"}]}, "computer_call"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input_image",
        ),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "schema"),
        ({"temperature": 9}, "temperature"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(
    client: openai.OpenAI, more: Any, words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.post("/responses", body={"input": "Hello.", "model": "default", **more}, cast_to=object)


def test_it_stands_behind_the_key_of_completions_and_takes_feedback(
    client: openai.OpenAI, server: Running
) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="no", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.responses.create(input="Hello.", **GIVEN)
        asker = stranger.with_options(api_key="the-key-of-those-who-ask")
        raw = asker.responses.with_raw_response.create(input="Hello.", **GIVEN)
    answer = raw.parse()
    assert raw.headers["x-weights-version"] == (answer.model_extra or {})["weights_version"]
    said: Any = client.post(
        "/feedback", body={"completion_id": answer.id, "corrected": "Hi."}, cast_to=object
    )
    assert said["correction"]["prompt"][0]["content"] == "Hello."


def test_a_stream_that_was_left_can_be_corrected(client: openai.OpenAI, server: Running) -> None:
    given: Any = {"model": "default", "temperature": 5, "max_output_tokens": 100, "stream": True}
    text = key = ""
    with client.responses.create(input="Say rope.", **given) as stream:
        for event in stream:
            key = key or getattr(getattr(event, "response", None), "id", "")
            text += event.delta if event.type == "response.output_text.delta" else ""
            if text:
                break
    said: Any = client.post("/feedback", body={"completion_id": key, "rating": -1}, cast_to=object)
    assert said["correction"]["finish_reason"] == "unfinished"
    assert said["correction"]["said"][0]["content"].startswith(text)
