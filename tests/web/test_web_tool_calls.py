"""Calls as models write them, whole and in pieces of any size: what is no call stays text, to the letter."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondnature.web.tool_calls import CallScanner, find_calls

OFFERED: dict[str, dict[str, Any]] = {
    "paint": {
        "properties": {"what": {"type": "string"}, "coats": {"type": "integer"}, "wet": {"type": "boolean"}}
    },
    "look": {},
}
PAINT = {"what": "door", "coats": 2}
J = json.dumps(PAINT)
FORMS = {
    "hermes": f'<tool_call>\n{{"name": "paint", "arguments": {J}}}\n</tool_call>',
    "hermes without its end": f'<tool_call>\n{{"name": "paint", "arguments": {J}}}',
    "qwen3-coder": (
        "<tool_call>\n<function=paint>\n<parameter=what>\ndoor\n</parameter>\n<parameter=coats>\n2\n</parameter>\n"
        "</function>\n</tool_call>"
    ),
    "glm": (
        "<tool_call>paint\n<arg_key>what</arg_key>\n<arg_value>door</arg_value>\n<arg_key>coats</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>"
    ),
    "mistral": f'[TOOL_CALLS] [{{"name": "paint", "arguments": {J}, "id": "abcdefghi"}}]',
    "mistral, newer": f"[TOOL_CALLS]paint[ARGS]{J}",
    "mistral, with ids": f"[TOOL_CALLS]paint[CALL_ID]abc[ARGS]{J}",
    "llama 3": f'{{"name": "paint", "parameters": {J}}}',
    "llama 3, with its mark": f'<|python_tag|>{{"name": "paint", "parameters": {J}}}<|eom_id|>',
    "llama 3.1": f"<function=paint>{J}</function>",
    "phi 4": f'<|tool_call|>[{{"name": "paint", "arguments": {J}}}]<|/tool_call|>',
    "granite": f'<|tool_call|>[{{"name": "paint", "arguments": {J}}}]',
    "deepseek v3": (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>paint\n```json\n{J}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>"
    ),
    "deepseek v3.1": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>paint<｜tool▁sep｜>{J}<｜tool▁call▁end｜>",
    "functiongemma": "<start_function_call>call:paint{what:<escape>door<escape>,coats:2}<end_function_call>",
    "gemma 4": '<|tool_call>call:paint{coats:2,what:<|"|>door<|"|>}<tool_call|>',
    "arguments as text": json.dumps({"function": {"name": "paint", "arguments": J}}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_call(form: str) -> None:
    marked = not FORMS[form].startswith("{")
    text, calls = find_calls(("I will.\n\n" if marked else "") + FORMS[form], OFFERED)
    assert text == ("I will." if marked else "")
    assert [(c.name, json.loads(c.arguments)) for c in calls] == [("paint", PAINT)]
    assert calls[0].id


def test_several_calls_are_in_order() -> None:
    look = {"name": "look", "arguments": {}}
    for text in (
        FORMS["hermes"] + f"\n<tool_call>{json.dumps(look)}</tool_call>",
        FORMS["qwen3-coder"] + "<tool_call><function=look></function></tool_call>",
        FORMS["mistral, newer"] + "[TOOL_CALLS]look[ARGS]{}",
        FORMS["llama 3"] + "; " + json.dumps(look),
        f"[TOOL_CALLS]{json.dumps([{'name': 'paint', 'arguments': PAINT}, look])}",
        FORMS["deepseek v3"].replace("<｜tool▁calls▁end｜>", "")
        + "\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n{}\n```<｜tool▁call▁end｜>",
        FORMS["deepseek v3.1"]
        + "<｜tool▁call▁begin｜>look<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        FORMS["functiongemma"] + "<start_function_call>call:look{}<end_function_call>",
        FORMS["gemma 4"] + "<|tool_call>call:look{}<tool_call|>",
    ):
        assert [c.name for c in find_calls(text, OFFERED)[1]] == ["paint", "look"], text


def test_texts_become_what_their_schema_says() -> None:
    written = "<function=paint><parameter=what>\n12\n</parameter><parameter=wet>true</parameter></function>"
    assert json.loads(find_calls(written, OFFERED)[1][0].arguments) == {"what": "12", "wet": True}


@pytest.mark.parametrize("arguments", ['{"what": "\\ud800"}', json.dumps('{"what": "\\ud800"}')])
def test_half_a_surrogate_pair_stays_escaped(arguments: str) -> None:
    """No answer could be encoded with it."""
    written = f'<tool_call>{{"name": "paint", "arguments": {arguments}}}</tool_call>'
    (call,) = find_calls(written, OFFERED)[1]
    assert call.arguments.encode() == b'{"what": "\\ud800"}'


def test_gemma_writes_values_of_every_kind() -> None:
    written = (
        "<start_function_call>call:f{a:<escape>x, {y}:<escape>,b:[1,-2.5,[]],c:{d:{},e:true},g:null,h:red}"
        "<end_function_call>"
    )
    expected = {"a": "x, {y}:", "b": [1, -2.5, []], "c": {"d": {}, "e": True}, "g": None, "h": "red"}
    assert json.loads(find_calls(written, OFFERED)[1][0].arguments) == expected
    quoted = written.replace("<escape>", '<|"|>').replace("<start_function_call>", "<|tool_call>")
    assert json.loads(find_calls(quoted, OFFERED)[1][0].arguments) == expected


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "<start_function_call>call:paint{what:<escape>door",
        "<start_function_call>call:paint{what",
        "<start_function_call>call:paint" + "{a:" * 10_000,
        "<｜tool▁calls▁begin｜>none",
        "<｜tool▁call▁begin｜>paint<｜tool▁sep｜>{",
        "  spaces kept \n",
        '{"name": "unknown", "arguments": {}}',  # JSON that somebody asked for
        '{"colour": "red"}',
        "[1, 2]",
        "<tool_call>\nnot json at all\n",
        "use <tool_call> like this",
        "a < b and [TOO many",
        "[TOOL_CALLS] none",
        '<|python_tag|>print("hi")',
        '{"name": "paint", "arguments": 5}',
        '<tool_call>{"name": "paint it", "arguments": {}}</tool_call>',  # no tool may be called so
        f'<tool_call>{{"name": "{"a" * 201}", "arguments": {{}}}}</tool_call>',
        "[" * 100_000,
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert find_calls(text, OFFERED) == (text, [])
    scanner = CallScanner(OFFERED)
    assert scanner.feed(text) + scanner.end()[0] == text


@given(st.sampled_from(sorted(FORMS)), st.sampled_from(["", "I will.\n\n", "a <tool", " "]), st.data())
def test_a_stream_says_the_same_in_pieces_of_any_size(form: str, before: str, data: st.DataObject) -> None:
    text = before + FORMS[form]
    whole, calls = find_calls(text, OFFERED)
    scanner, out, at = CallScanner(OFFERED), "", 0
    while at < len(text):
        size = data.draw(st.integers(1, 12))
        out += scanner.feed(text[at : at + size])
        at += size
    rest, found = scanner.end()
    assert out + rest == whole
    assert [(c.name, c.arguments) for c in found] == [(c.name, c.arguments) for c in calls]
