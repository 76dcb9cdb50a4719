"""Corrections within a conversation: `/no`, `/why` and `/good` as messages of any OpenAI client (server; ASGI).

A chat window has no other button. With the setting `in_band`, such a message is not a question: it is recorded as
feedback on the answer before it, a short confirmation comes back in the shape of an answer, and the model is not
asked. When the client later sends the conversation back, command and confirmation are left out of it, and after
`/no` it goes on as if the model had said what was wanted. Both engines hand their requests through `take`.

Whatever is recorded needs a key that may correct; without one the message is refused, and said by whom it can be.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import ValidationError

from secondnature.errors import Forbidden, SecondnatureError
from secondnature.lessons.feedback import Feedback
from secondnature.records import describe
from secondnature.web.guards import KEY_SCOPE, App, Receive, Scope, Send, answer_error, replay
from secondnature.wire import FeedbackRequest

__all__ = ["Command", "InBand", "Layer", "command", "without_commands"]

CHAT = "/v1/chat/completions"
_COMMAND = re.compile(r"/(no|why|good)(?:\s+(.*))?", re.DOTALL)
_MAYBE = re.compile(rb"/(?:no|why|good)\b")
"""A body without this holds no command, and is not looked at more closely."""
_NEEDS = {"no": "WHAT I WANTED", "why": "WHAT WAS WRONG"}
_DONE = {
    "no": "that this was wanted instead",
    "why": "what was wrong with the answer",
    "good": "that the answer was right",
}


@dataclass(frozen=True)
class Command:
    """What a user said about the answer before."""

    word: str
    """`no`, `why` or `good`."""
    text: str

    def fields(self) -> dict[str, Any]:
        """It as fields of feedback."""
        return {
            "no": {"rating": -1, "corrected": self.text},
            "why": {"rating": -1, "text": self.text},
            "good": {"rating": 1},
        }[self.word]


def _text(message: Any) -> str:
    """The text of a turn as clients send it; "": it has none."""
    content: Any = cast("dict[str, Any]", message).get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        parts = [cast("dict[str, Any]", x) for x in cast("list[Any]", content) if isinstance(x, dict)]
        content = "".join(str(p.get("text") or "") for p in parts)
    return content if isinstance(content, str) else ""


def _role(message: Any) -> str:
    return str(cast("dict[str, Any]", message).get("role")) if isinstance(message, dict) else ""


def command(message: Any) -> Command | None:
    """The command that a turn is, or None."""
    found = _COMMAND.fullmatch(_text(message).strip()) if _role(message) == "user" else None
    return None if found is None else Command(found[1], (found[2] or "").strip())


def without_commands(messages: Sequence[Any]) -> list[Any]:
    """The conversation that the model has a part in: no commands, no confirmations, and what was wanted as said."""
    kept: list[Any] = []
    confirmed = False
    for message in messages:
        said = command(message)
        if said is not None:
            if said.word == "no" and said.text and kept and _role(kept[-1]) == "assistant":
                kept[-1] = {"role": "assistant", "content": said.text}
            confirmed = True
        elif confirmed and _role(message) == "assistant":
            confirmed = False
        else:
            confirmed = False
            kept.append(message)
    return kept


class InBand:
    """Takes commands out of what goes to the model."""

    def __init__(self, feedback: Feedback, model_name: str) -> None:
        self._feedback = feedback
        self._model_name = model_name

    async def take(self, scope: Scope, receive: Receive, send: Send) -> tuple[Scope, Receive] | None:
        """A request for an answer: None where it was a command and is answered, else what is left for the model."""
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                break
        given = bytes(body)
        asked = _asked(given) if _MAYBE.search(given) else None
        if asked is None:
            return scope, replay(given, receive)
        messages: list[Any] = asked["messages"]
        said = command(messages[-1])
        if said is None:
            left = without_commands(messages)
            if left != messages:
                given = json.dumps({**asked, "messages": left}).encode()
                headers = [(k, v) for k, v in scope["headers"] if k.lower() != b"content-length"]
                scope = {**scope, "headers": [*headers, (b"content-length", str(len(given)).encode())]}
            return scope, replay(given, receive)
        if scope.get(KEY_SCOPE) not in ("correct", "teach"):
            await answer_error(
                send,
                Forbidden(
                    f"/{said.word} records a correction, and the key that was sent may not",
                    "give the client the file `correction_key` in the server's home as its API key",
                ),
            )
            return None
        text = await asyncio.to_thread(self._record, said, messages[:-1], scope[KEY_SCOPE])
        await _answer(send, asked, str(asked.get("model") or self._model_name), text)
        return None

    def _record(self, said: Command, before: list[Any], key_scope: Any) -> str:
        """Record it; what the user is told."""
        if said.word in _NEEDS and not said.text:
            return f"Not recorded: write /{said.word} {_NEEDS[said.word]}."
        turns = [{"role": _role(m), "content": _text(m)} for m in without_commands(before)]
        if not turns or turns[-1]["role"] != "assistant":
            return f"Not recorded: there is no answer yet that /{said.word} could be about."
        try:
            body = FeedbackRequest.model_validate({"messages": turns, "source": "in-band", **said.fields()})
            reply = self._feedback.give(body, key_scope)
        except ValidationError as e:
            return f"Not recorded: {describe(e)}."
        except SecondnatureError as e:
            return f"Not recorded: {e}."
        why = f" It cannot be taught, though: {reply.state.reason}." if reply.state.reason else ""
        return f"Recorded as {reply.id}: {_DONE[said.word]}.{why}"


class Layer:
    """ASGI middleware, behind the guards."""

    def __init__(self, app: App, in_band: InBand) -> None:
        self._app = app
        self._in_band = in_band

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] == CHAT:
            left = await self._in_band.take(scope, receive, send)
            if left is None:
                return
            scope, receive = left
        await self._app(scope, receive, send)


def _asked(body: bytes) -> dict[str, Any] | None:
    """A body with messages; None: it is not one, and whoever reads it next says why."""
    try:
        found: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    asked = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    messages = asked.get("messages")
    return asked if isinstance(messages, list) and messages else None


async def _answer(send: Send, asked: dict[str, Any], model: str, text: str) -> None:
    """The confirmation, in the shape that was asked for. No weights gave it, so it carries no stamp."""
    head = {"id": "chatcmpl-" + secrets.token_hex(12), "created": int(time.time()), "model": model}
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    if asked.get("stream"):
        options = asked.get("stream_options")
        chunk = {**head, "object": "chat.completion.chunk"}
        deltas = [({"role": "assistant", "content": ""}, None), ({"content": text}, None), ({}, "stop")]
        events: list[dict[str, Any]] = [
            {**chunk, "choices": [{"index": 0, "delta": d, "finish_reason": end, "logprobs": None}]}
            for d, end in deltas
        ]
        if isinstance(options, dict) and cast("dict[str, Any]", options).get("include_usage"):
            events.append({**chunk, "choices": [], "usage": usage})
        lines = [f"data: {json.dumps(e, ensure_ascii=False)}\n\n" for e in events]
        body, kind = "".join([*lines, "data: [DONE]\n\n"]).encode(), b"text/event-stream"
    else:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        whole = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
        body, kind = json.dumps(whole, ensure_ascii=False).encode(), b"application/json"
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
