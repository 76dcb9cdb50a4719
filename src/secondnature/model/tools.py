"""Whether a chat template shows tools to the model, and turns with calls as templates expect them (server).

Most templates of small models show none: then tools are refused where they would be lost silently. Of those that
do, most take the arguments of an earlier call as an object; DeepSeek's take the text. Both are found by trying.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from secondnature.errors import BadInput
from secondnature.model import template

__all__ = ["as_object", "as_templates_expect", "takes_tools"]


class _Found(NamedTuple):
    """What a template was seen to do."""

    shows_tools: bool
    takes_objects: bool


_KNOWN: weakref.WeakKeyDictionary[Any, tuple[str, _Found]] = weakref.WeakKeyDictionary()
"""The template of each tokenizer that was looked at, and what was found."""
_NAME = "a_tool_that_is_looked_for"
_TOOL = {
    "type": "function",
    "function": {"name": _NAME, "description": "", "parameters": {"type": "object", "properties": {}}},
}
_ASKS = {"role": "user", "content": "?"}


def takes_tools(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template writes the tools that it is given: one is rendered and looked for."""
    return _look(tokenizer).shows_tools


def as_templates_expect(tokenizer: Any, turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn whose calls have their arguments as the template takes them; clients send JSON in a text."""
    if not turn.get("tool_calls"):
        return dict(turn)
    calls = list(turn["tool_calls"])
    if _look(tokenizer).takes_objects:
        calls = [
            {**call, "function": {**call["function"], "arguments": as_object(call["function"]["arguments"])}}
            for call in calls
        ]
    return {**turn, "content": turn.get("content") or "", "tool_calls": calls}


def _look(tokenizer: Any) -> _Found:
    source = repr(getattr(tokenizer, "chat_template", None))
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != source:
        shown = _rendered(tokenizer, [_ASKS], [_TOOL])
        found = _Found(
            _NAME in shown, bool(_called(tokenizer, {"a": 1})) or not _called(tokenizer, '{"a": 1}')
        )
        known = _KNOWN[tokenizer] = (source, found)
    return known[1]


def _called(tokenizer: Any, arguments: Any) -> str:
    """A conversation with a call; "": the template refuses it."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    turns = [
        _ASKS,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "!", "tool_call_id": "abcdefghi", "name": _NAME},
    ]
    return _rendered(tokenizer, turns, [_TOOL])


def _rendered(tokenizer: Any, turns: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    try:
        return template.apply(tokenizer, turns, prompt=True, tools=tools)
    except BadInput:  # what else it says to real turns comes with these
        return ""


def as_object(given: Any) -> Any:
    """Arguments that are JSON in a text, taken apart; anything else stays as it is."""
    if not isinstance(given, str):
        return given
    try:
        found = json.loads(given or "{}")
    except (ValueError, RecursionError):
        return given
    return cast("dict[str, Any]", found) if isinstance(found, dict) else given
