"""A completion of vLLM's as it went over the wire, taken apart for whoever corrects it (server; no torch, no vLLM).

vLLM's routes are vLLM's: what was asked and said is read from the bodies that passed, and only when somebody gives
feedback. It comes out as the local engine's routes remember theirs: turns as they are kept, the first answer's text
so far, why it ended. What a correction cannot hold is refused with the same words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from secondnature.errors import BadInput
from secondnature.lessons.memory import Said
from secondnature.records import Message
from secondnature.wire.completions import plain_message
from secondnature.wire.responses import ResponsesRequest

__all__ = ["RESPONSES", "overheard"]

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
_ENDS = {"response.completed": "stop", "response.incomplete": "length"}


def overheard(path: str, asked: bytes, said: bytes, version: str) -> Said:
    """What was asked and said on one of vLLM's routes.

    Args:
        path: the route.
        asked: the whole body of the request.
        said: that of the answer, JSON or server-sent events, as far as it came.

    Raises:
        BadInput: it is none that can be corrected.
    """
    try:
        request = json.loads(asked)
        prompt = _prompt(path, request)
        whole = said.lstrip().startswith(b"{")
        parts = _whole(path, json.loads(said)) if whole else _streamed(path, said)
        demanded = bool(request.get("tools")) and request.get("tool_choice") not in (None, "none", "auto")
        options = _template_options(path, request)
        calls = parts.calls or demanded or any(turn.has_calls for turn in prompt or ())
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise BadInput(
            "this completion cannot be corrected: its request or its answer is not plain text",
            "POST /v1/corrections takes the whole conversation",
        ) from None
    if calls:
        raise BadInput(
            "this completion cannot be corrected: it calls tools, or its conversation does",
            "corrections hold plain turns: POST /v1/corrections takes a conversation of these",
        )
    return Said(prompt, parts.text, version, parts.finish, options)


def _template_options(path: str, request: dict[str, Any]) -> dict[str, Any]:
    """What a chat's template was told besides."""
    if path != CHAT:
        return {}
    effort = request.get("reasoning_effort")
    named = {} if effort is None else {"reasoning_effort": effort}
    return named | dict(request.get("chat_template_kwargs") or {})


def _prompt(path: str, request: dict[str, Any]) -> list[Message] | None:
    """The turns that were asked; None: it was no chat."""
    if path == RESPONSES:
        given = {k: request[k] for k in ("input", "instructions") if request.get(k) is not None}
        if request.get("previous_response_id"):
            raise ValueError("what was said before is not in the request")
        return ResponsesRequest.model_validate(given).chat().plain()
    if path != CHAT:
        return None
    turns = [plain_message(m) for m in request["messages"]]
    kept = ("role", "content", "tool_calls")
    return [Message.model_validate({k: t[k] for k in kept if k in t}) for t in turns]


class _Parts(NamedTuple):
    """Of the first choice."""

    text: str
    """So far."""
    finish: str | None
    """Why it ended."""
    calls: bool
    """It calls tools."""


def _whole(path: str, answer: dict[str, Any]) -> _Parts:
    if path == RESPONSES:
        items: list[dict[str, Any]] = answer["output"]
        texts = [p["text"] for item in items if item["type"] == "message" for p in item["content"]]
        calls = any(item["type"] == "function_call" for item in items)
        return _Parts("".join(texts), _ENDS.get(f"response.{answer['status']}"), calls)
    choice = answer["choices"][0]
    if path != CHAT:
        return _Parts(str(choice["text"]), choice.get("finish_reason"), calls=False)
    message = choice["message"]
    return _Parts(str(message["content"] or ""), choice.get("finish_reason"), bool(message.get("tool_calls")))


def _events(stream: bytes) -> Iterator[dict[str, Any]]:
    """The documents of server-sent events; the last one may be torn, and is left out."""
    for line in stream[: stream.rfind(b"\n\n") + 1].splitlines():
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


def _streamed(path: str, stream: bytes) -> _Parts:
    found: list[str] = []
    finish, calls = "unfinished", False
    for event in _events(stream):
        if path == RESPONSES:
            finish = _ENDS.get(event["type"], finish)
            calls |= event["type"].startswith("response.function_call")
            if event["type"] == "response.output_text.delta":
                found.append(event["delta"])
            continue
        for choice in event.get("choices", []):
            if choice.get("index", 0) == 0:
                said: dict[str, Any] = choice["delta"] if path == CHAT else {"content": choice["text"]}
                found.append(said.get("content") or "")
                calls |= bool(said.get("tool_calls"))
                finish = choice.get("finish_reason") or finish
    return _Parts("".join(found), finish, calls)
