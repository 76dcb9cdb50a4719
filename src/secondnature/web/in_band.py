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
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import ValidationError

from secondnature.engines.generation import Delta, Event, Finished, GenerationRequest, GenerationResult
from secondnature.errors import Forbidden, SecondnatureError
from secondnature.lessons.feedback import Feedback
from secondnature.records import describe
from secondnature.web.bodies import parse
from secondnature.web.choices import Asked, Choice, ChoicesForm
from secondnature.web.guards import KEY_SCOPE, App, Receive, Scope, Send, answer_error, replay
from secondnature.web.responses import ResponseForm
from secondnature.wire import FeedbackRequest
from secondnature.wire.responses import ResponsesRequest

__all__ = ["Command", "InBand", "Layer", "command", "without_commands"]

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
_CONVERSATION = {CHAT: "messages", RESPONSES: "input"}
"""Where a body has its turns, by route."""
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
        if _MAYBE.search(given) is None:
            return scope, replay(given, receive)
        found = await asyncio.to_thread(_look, given, _CONVERSATION[scope["path"]])
        if isinstance(found, bytes):
            headers = [(k, v) for k, v in scope["headers"] if k.lower() != b"content-length"]
            scope = {**scope, "headers": [*headers, (b"content-length", str(len(found)).encode())]}
            return scope, replay(found, receive)
        asked, turns, said = found
        if scope.get(KEY_SCOPE) not in ("correct", "teach"):
            await answer_error(
                send,
                Forbidden(
                    f"/{said.word} records a correction, and the key that was sent may not",
                    "give the client the file `correction_key` in the server's home as its API key",
                ),
            )
            return None
        before = without_commands(turns[:-1])
        if scope["path"] == RESPONSES:
            before = {"input": before, "instructions": asked.get("instructions")}
        text = await asyncio.to_thread(self._record, said, before, scope[KEY_SCOPE])
        model = str(asked.get("model") or self._model_name)
        await (_respond if scope["path"] == RESPONSES else _answer)(send, asked, model, text)
        return None

    def _record(self, said: Command, before: list[Any] | dict[str, Any], key_scope: Any) -> str:
        """Record it; what the user is told."""
        if said.word in _NEEDS and not said.text:
            return f"Not recorded: write /{said.word} {_NEEDS[said.word]}."
        try:
            turns = _turns(before)
            if not turns or turns[-1]["role"] != "assistant":
                return f"Not recorded: there is no answer yet that /{said.word} could be about."
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
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in _CONVERSATION:
            left = await self._in_band.take(scope, receive, send)
            if left is None:
                return
            scope, receive = left
        await self._app(scope, receive, send)


def _look(body: bytes, key: str) -> bytes | tuple[dict[str, Any], list[Any], Command]:
    """What is left of a body for the model, or the body, its turns and the command that is the last of them."""
    try:
        found: Any = parse(body)
    except ValueError:  # whoever reads it next says why
        return body
    asked = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    given: Any = asked.get(key)
    if isinstance(given, str) and key == "input":
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        return body
    turns = cast("list[Any]", given)
    said = command(turns[-1])
    if said is not None:
        return asked, turns, said
    left = without_commands(turns)
    return body if left == turns else json.dumps({**asked, key: left}).encode()


def _turns(before: list[Any] | dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of a conversation, or of a response's input, as feedback takes them. Raises ValidationError."""
    if isinstance(before, list):
        calls = ("tool_calls", "tool_call_id", "name")
        return [
            {"role": _role(m), "content": _text(m), **{k: m[k] for k in calls if m.get(k)}}
            for m in before
            if isinstance(m, dict)
        ]
    if not before["input"]:
        return []
    chat = ResponsesRequest.model_validate(before).chat()
    return [m.model_dump(exclude_none=True) for m in chat.messages]


def _confirmation(prefix: str, model: str, text: str) -> tuple[Asked, GenerationResult]:
    """An answer that no weights gave, so it carries no stamp."""
    asked = Asked(
        prefix + secrets.token_hex(12),
        model,
        int(time.time()),
        True,
        [Choice(0, GenerationRequest([]), True)],
    )
    return asked, GenerationResult(text, [], "stop", 0)


async def _answer(send: Send, asked: dict[str, Any], model: str, text: str) -> None:
    """The confirmation in the shape of a chat's answer."""
    given = asked.get("stream_options")
    options = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
    form = ChoicesForm(1, include_usage=bool(options.get("include_usage")))
    await _write(send, asked, form, *_confirmation("chatcmpl-", model, text))


async def _respond(send: Send, asked: dict[str, Any], model: str, text: str) -> None:
    """The confirmation in the shape of a response."""
    form = ResponseForm(ResponsesRequest(input=text))
    await _write(send, asked, form, *_confirmation("resp_", model, text))


async def _write(
    send: Send,
    asked: dict[str, Any],
    form: ChoicesForm | ResponseForm,
    confirmation: Asked,
    result: GenerationResult,
) -> None:
    async def events() -> AsyncGenerator[tuple[int, Event]]:
        yield 0, Delta(result.text)
        yield 0, Finished(result)

    if asked.get("stream"):
        pieces = [piece async for piece in form.events(confirmation, events(), "")]
        body, kind = b"".join(pieces), b"text/event-stream"
    else:
        body = json.dumps(form.whole(confirmation, [result]), ensure_ascii=False).encode()
        kind = b"application/json"
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
