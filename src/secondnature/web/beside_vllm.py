"""On vLLM's port: our routes beside vLLM's own, and a stamp on every answer (API server; plain ASGI, no vLLM).

Our routes are answered by an application of their own, on a thread and a loop of their own: parsing a big request
or waiting for the disk never holds up a token. vLLM's answers pass through and are told which weights gave them: in
the headers of all; in the body of completions, and of a stream in the chunk that ends it.

None of vLLM's routes is replaced. Its own key, if it has one, goes on guarding its routes, and here also those that
vLLM leaves open beside them; ours guards ours and what changes the engine's workers, and opens vLLM's too.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from secondnature.engines.generation import Span
from secondnature.engines.stamps import Clock
from secondnature.errors import SecondnatureError, TooLarge, Unauthorized
from secondnature.lessons.memory import Memory, Said, Unread
from secondnature.web.guards import (
    INFERENCE_PATHS,
    KEY_SCOPE,
    App,
    Keys,
    Receive,
    Scope,
    Send,
    refuse_socket,
    same_key,
)
from secondnature.web.in_band import CHAT, InBand
from secondnature.web.overheard import RESPONSES, overheard
from secondnature.web.refusals import error_body
from secondnature.web.stamps import headers_of, stamps

__all__ = ["Door", "OwnThread"]

OURS = re.compile(
    r"/(v1/)?(train|checkpoint)(/.*)?|/v1/(lessons|feedback|corrections|steering)(/.*)?|/v1/(health|wiring)"
    r"|/v1/chat/completions/chatcmpl-[^/]+"
)
"""Paths that we answer; everything else is vLLM's (it has, e.g., `/v1/chat/completions/batch`)."""
CHANGES_THE_ENGINE = frozenset({"/scale_elastic_ep"})
"""vLLM's routes, open there, that need our key: the weights are in the hands of the workers that there were."""
MAX_REMEMBERED_BYTES = 256_000
"""A completion whose request and answer are longer together is not remembered for feedback."""
_ID = re.compile(rb'"id":\s*"([\w.:-]{1,200})"')
_FINISHED = re.compile(rb'"finish_reason":\s*"')
_FINGERPRINT = re.compile(rb'"system_fingerprint":\s*(?:null|"[^"\\]*")')
"""vLLM's; in a text its quotes would be escaped."""
_RESPONDED = re.compile(rb"^event: response\.(completed|incomplete)$", re.MULTILINE)
"""The event that ends a streamed response, whole."""


class OwnThread:
    """Runs an ASGI application on a thread and an event loop of its own; its answers come back whole."""

    def __init__(self, app: App, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="secondnature-routes", daemon=True
        )
        self._thread.start()

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                await _refuse(
                    send, TooLarge(f"a body over {self._max_body_bytes:,} bytes", "send less at once")
                )
                return
            if not message.get("more_body", False):
                break
        call = self._collect(dict(scope), bytes(body))
        for message in await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, self._loop)):
            await send(message)

    async def _collect(self, scope: Scope, body: bytes) -> list[MutableMapping[str, Any]]:
        sent: list[MutableMapping[str, Any]] = []
        asked = False
        gone = asyncio.Event()

        async def receive() -> MutableMapping[str, Any]:
            nonlocal asked
            if asked:
                await gone.wait()  # the answer is waited for, whatever the client does
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        return sent

    def stop(self) -> None:
        """End the thread; requests in flight are dropped."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()


async def _refuse(send: Send, error: SecondnatureError) -> None:
    body = json.dumps(error_body(error)).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": head})
    await send({"type": "http.response.body", "body": body})


class Door:
    """ASGI middleware around vLLM's application; the outermost one.

    Args:
        app: vLLM's.
        ours: answers our routes.
        clock: tells which weights there are.
        memory: where completions are remembered, for feedback.
        keys: ours; all of them open completions, the one that teaches opens all of vLLM's routes.
        in_band: takes corrections out of conversations; None: they are messages like others.
        engine_keys: vLLM's own (`--api-key`); none: its routes are open.
        on_load: told how many of vLLM's requests are being answered, whenever that changes.
        on_startup: called once, when vLLM's application has started.
        on_shutdown: called once, before vLLM's application is told to end.
    """

    def __init__(
        self,
        app: App,
        *,
        ours: OwnThread,
        clock: Clock,
        memory: Memory,
        keys: Keys,
        in_band: InBand | None,
        engine_keys: Sequence[str],
        on_load: Callable[[int], None],
        on_startup: Callable[[], None],
        on_shutdown: Callable[[], Awaitable[None]],
    ) -> None:
        self._app = app
        self._ours = ours
        self._clock = clock
        self._memory = memory
        self._keys = keys
        self._in_band = in_band
        self._engine_keys = [key.encode() for key in engine_keys]
        self._on_load = on_load
        self._on_startup = on_startup
        self._on_shutdown = on_shutdown
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the life of the server."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        path = str(scope["path"]).removeprefix(str(scope.get("root_path", "")))
        if scope["type"] == "websocket" and OURS.fullmatch(path):
            await refuse_socket(receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if OURS.fullmatch(path):
            await self._ours.answer(scope, receive, send)
            return
        given = next((v for k, v in scope["headers"] if k.lower() == b"authorization"), b"")
        given = given.removeprefix(b"Bearer ").strip()
        found = self._keys.scope(given)
        is_ours = found == "teach" or (found is not None and path in INFERENCE_PATHS | {"/v1/models"})
        refused = scope["method"] == "POST" and not is_ours and self._refuses(path, given)
        if refused:
            what = "a wrong key" if given else "no key"
            error = Unauthorized(f"{what} was sent for {path[:100]}", "send `Authorization: Bearer KEY`")
            await _refuse(send, error)
            return
        if is_ours:
            scope = self._with_engine_key(scope)
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._in_band is not None and path == CHAT:
            left = await self._in_band.take({**scope, KEY_SCOPE: found}, receive, send)
            if left is None:
                return
            scope, receive = left
        self._change_load(1)
        try:
            await self._stamped(path, scope, receive, send)
        finally:
            self._change_load(-1)

    def _refuses(self, path: str, given: bytes) -> bool:
        """A POST without our key that vLLM would let through, and must not."""
        if path in CHANGES_THE_ENGINE:
            return True
        known = any(same_key(given, key) for key in self._engine_keys)
        return bool(self._engine_keys) and not known and path != "/ping"

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told() -> MutableMapping[str, Any]:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self._on_shutdown()
            return message

        async def tell(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._on_startup()
            await send(message)

        await self._app(scope, told, tell)

    def _change_load(self, by: int) -> None:
        self._inside += by
        self._on_load(self._inside)

    def _with_engine_key(self, scope: Scope) -> Scope:
        """Our key opens vLLM's routes too: it is changed for vLLM's."""
        if not self._engine_keys:
            return scope
        headers = [(k, v) for k, v in scope["headers"] if k.lower() != b"authorization"]
        return {**scope, "headers": [*headers, (b"authorization", b"Bearer " + self._engine_keys[0])]}

    async def _stamped(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """One of vLLM's answers, with the weights that gave it: those from its arrival to its last byte."""
        begun = self._clock.read()
        speaks = path in INFERENCE_PATHS
        asked, said = bytearray(), bytearray()
        start: MutableMapping[str, Any] | None = None
        whole = False
        """The body is one JSON document: it is held until it is complete, for its length changes."""
        flows = False
        """The body is a stream of events; `rest` is the one that has not ended yet."""
        rest = b""
        known = False

        async def listened() -> MutableMapping[str, Any]:
            message = await receive()
            if speaks and len(asked) <= MAX_REMEMBERED_BYTES:
                asked.extend(message.get("body", b""))
            return message

        async def stamped(message: MutableMapping[str, Any]) -> None:
            nonlocal start, whole, flows, rest, known
            if message["type"] == "http.response.start":
                start = message
                kind = next((v for k, v in message["headers"] if k.lower() == b"content-type"), b"")
                whole = speaks and message["status"] == 200 and kind.startswith(b"application/json")
                flows = speaks and kind.startswith(b"text/event-stream")
                if not whole:
                    await send(_with_headers(message, Span.begin(begun).seen(self._clock.read())))
                return
            if message["type"] != "http.response.body":
                await send(message)
                return
            body = bytes(message.get("body", b""))
            span = Span.begin(begun).seen(self._clock.read())
            if not whole:
                if speaks and len(said) <= MAX_REMEMBERED_BYTES:
                    said.extend(body)
                    if (
                        flows and not known and start is not None and start["status"] == 200
                    ):  # from the first chunk on, with the text so far
                        known = self._remember(path, asked, said)
                if flows:
                    body = rest + body
                    end = body.rfind(b"\n\n") + 2 if message.get("more_body", False) else len(body)
                    rest, body = (body, b"") if end == 1 else (body[end:], body[:end])
                    if path == RESPONSES and _RESPONDED.search(body):
                        body = _stamp_response(body, span)
                    elif _FINISHED.search(body) or _FINGERPRINT.search(body):
                        body = _stamp_events(body, span)
                if body or not message.get("more_body", False):
                    await send({**message, "body": body})
                return
            said.extend(body)
            if not message.get("more_body", False):
                assert start is not None, "a body follows its start"
                answer = _stamp_document(bytes(said), span)
                await send(_with_headers(start, span, length=len(answer)))
                await send({"type": "http.response.body", "body": answer})

        try:
            await self._app(scope, listened, stamped)
        finally:  # also of an answer that its client did not wait for
            if speaks and start is not None and start["status"] == 200:
                self._remember(path, bytes(asked), bytes(said))

    def _remember(self, path: str, asked: bytes | bytearray, said: bytes | bytearray) -> bool:
        """What is needed to correct this answer; it is taken apart only when somebody does.

        Args:
            said: the bytes so far; they may grow until they are remembered anew.
        """
        found = _ID.search(said)
        if found is None:
            return False
        if len(asked) + len(said) > MAX_REMEMBERED_BYTES:
            self._memory.forget(found[1].decode())
            return True
        version = self._clock.read().version

        def read(asked: bytes | bytearray, said: bytes | bytearray) -> Said:
            return overheard(path, bytes(asked), bytes(said), version)

        self._memory.remember(found[1].decode(), Unread(asked, said, read))
        return True


def _with_headers(
    start: MutableMapping[str, Any], span: Span, length: int | None = None
) -> MutableMapping[str, Any]:
    headers = [(k, v) for k, v in start["headers"] if length is None or k.lower() != b"content-length"]
    headers += [(k.encode(), v.encode()) for k, v in headers_of(span).items()]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    return {**start, "headers": headers}


def _fingerprinted(body: bytes, span: Span) -> tuple[bytes, int]:
    """vLLM's fingerprint, of its build, changed for ours, which names the weights; and how often it was there."""
    own = json.dumps({"system_fingerprint": span.last.version})[1:-1].encode()
    return _FINGERPRINT.subn(lambda _: own, body)


def _stamp_document(body: bytes, span: Span) -> bytes:
    """The stamp's fields before the last brace of a JSON object; anything else stays as it is."""
    end = body.rstrip()
    if not end.endswith(b"}") or not end.startswith(b"{") or end == b"{}":
        return body
    end, there = _fingerprinted(end, span)
    fields = {k: v for k, v in stamps(span).items() if not (there and k == "system_fingerprint")}
    return end[:-1] + b", " + json.dumps(fields)[1:].encode()


def _stamp_events(body: bytes, span: Span) -> bytes:
    """The stamp in every server-sent event that ends a choice; no fingerprint but ours in the others."""
    events = body.split(b"\n\n")
    for i, event in enumerate(events):
        if event.startswith(b"data: {") and _FINISHED.search(event):
            events[i] = b"data: " + _stamp_document(event.removeprefix(b"data: "), span)
        else:
            events[i] = _fingerprinted(event, span)[0]
    return b"\n\n".join(events)


def _stamp_response(body: bytes, span: Span) -> bytes:
    """The stamp in the response that the last event of a stream holds."""
    events = body.split(b"\n\n")
    for i, event in enumerate(events):
        if _RESPONDED.search(event):
            head, mark, data = event.partition(b"data: ")
            found = json.loads(data)
            found["response"] |= stamps(span)
            events[i] = head + mark + json.dumps(found, ensure_ascii=False).encode()
    return b"\n\n".join(events)
