"""What stands around every route: host, size, rate and key before it, faults behind it (server; plain ASGI, so it
also fits other servers).

Loopback alone is no defence against a web page that the user happens to visit: the Host header must name this
machine (no DNS rebinding), bodies are counted before they are parsed, and everything that changes state or reveals
corrections needs the key, compared in constant time.
"""

from __future__ import annotations

import hmac
import json
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

from secondnature.errors import BadInput, Busy, Forbidden, SecondnatureError, TooLarge, Unauthorized
from secondnature.web.refusals import error_body, no_route

LOG = logging.getLogger("secondnature")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/v1/health", "/metrics", "/openapi.json"})
INFERENCE_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
CORRECTING = re.compile(
    r"POST /v1/(feedback|corrections|chat/completions/[^/]+)|DELETE /v1/corrections/.+", re.DOTALL
)
"""What the key for corrections opens besides; whatever stands nowhere here takes the key that teaches."""
KeyScope = Literal["talk", "correct", "teach"]
SCOPES: tuple[KeyScope, ...] = ("talk", "correct", "teach")
"""Each opens what those before it do."""
KEY_SCOPE = "secondnature.scope"
"""Where a request says what its key opens."""
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
"""What a server that only this machine reaches listens on."""
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""How its `Host` header then names it."""
MAX_CLIENTS = 10_000


MAX_HELD_BODIES = 8
"""The bodies of all requests under way are together no larger than so many of the largest."""
SMALL_BODY = 64
"""One that is so many times smaller than the largest is taken all the same: large ones lock nobody out."""


def same_key(given: bytes, key: bytes) -> bool:
    """Whether the right key was sent, in constant time; no key at all is never the right one."""
    return bool(given) and bool(key) and hmac.compare_digest(given, key)


def needs(method: str, path: str) -> KeyScope | None:
    """The scope that a route takes; None: it is open."""
    if path == "/v1/models" or path.startswith("/v1/models/") or path in INFERENCE_PATHS:
        return "talk"
    if path in OPEN_PATHS:
        return None
    return "correct" if CORRECTING.fullmatch(f"{method} {path}") else "teach"


@dataclass(frozen=True)
class Keys:
    """The keys of a server, by scope; one that is None is not asked for."""

    talk: str | None
    correct: str
    teach: str

    def scope(self, given: bytes) -> KeyScope | None:
        """What a key opens at most; None: it is none of ours."""
        keys: dict[KeyScope, str | None] = {"teach": self.teach, "correct": self.correct, "talk": self.talk}
        return next((scope for scope, key in keys.items() if same_key(given, (key or "").encode())), None)


class Guards:
    """ASGI middleware: refuses before anything is read or parsed.

    Args:
        app: what lies behind.
        keys: for every route that is not open; without one to talk, completions and the list of models are open.
        hosts: names under which the server may be addressed (without port); None: any.
        max_body_bytes: a larger body is refused, also when its length was not announced.
        requests_per_minute: per client address; a bucket of that size refills evenly.
        has_route: whether a path is one of any route; for others no key is asked, they are not there.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: Keys,
        hosts: frozenset[str] | None,
        max_body_bytes: int,
        requests_per_minute: int,
        has_route: Callable[[str], bool] = lambda path: True,
    ) -> None:
        self._app = app
        self._has_route = has_route
        self._keys = keys
        self._hosts = hosts
        self._max_body_bytes = max_body_bytes
        self._rate = requests_per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._held_bytes = 0
        """Of the bodies of all requests under way."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; of what ASGI knows besides, only the server's life passes."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await refuse_socket(receive, send)
            return
        held = _Held()
        try:
            await self._guarded(scope, receive, send, held)
        finally:
            self._held_bytes -= held.nbytes

    async def _guarded(self, scope: Scope, receive: Receive, send: Send, held: _Held) -> None:
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        try:
            self._check_host(headers)
            self._check_rate(scope)
            self._check_key(scope, headers)
            self._check_length(headers)
            body = (
                await self._read(receive, held)
                if scope["method"] in ("POST", "PUT", "PATCH", "DELETE")
                else None
            )
        except SecondnatureError as e:
            await answer_error(send, e)
            return
        await self._app(scope, receive if body is None else replay(body, receive), send)

    def _check_host(self, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._hosts is not None and name.lower() not in self._hosts:
            raise BadInput(f"host {host[:100]!r} is not this server", "address it as localhost or 127.0.0.1")

    def _check_rate(self, scope: Scope) -> None:
        client = str((scope.get("client") or ("?",))[0])
        now = time.monotonic()
        left, then = self._buckets.pop(client, (float(self._rate), now))
        left = min(float(self._rate), left + (now - then) * self._rate / 60.0)
        self._buckets[client] = (max(left - 1.0, 0.0), now)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        if left < 1.0:
            raise Busy(f"more than {self._rate} requests a minute", "slow down, or raise requests_per_minute")

    def _check_key(self, scope: Scope, headers: dict[str, str]) -> None:
        path = str(scope["path"])
        if not self._has_route(path):
            raise no_route(path, INFERENCE_PATHS | {"/v1/models"})
        given = headers.get("authorization", "").removeprefix("Bearer ").strip().encode()
        wanted, found = needs(scope["method"], path), self._keys.scope(given)
        scope[KEY_SCOPE] = found or "talk"
        if wanted is None or (wanted == "talk" and self._keys.talk is None):
            return
        if found is not None and SCOPES.index(found) >= SCOPES.index(wanted):
            return
        if found is not None:
            raise Forbidden(
                f"the key that was sent may {' and '.join(SCOPES[: SCOPES.index(found) + 1])}; {path[:100]} takes "
                f"one that may {wanted}",
                "send the server's own key: SECONDNATURE_API_KEY, or the file `key` in the home",
            )
        what = "a wrong key" if given else "no key"
        if wanted == "talk":
            raise Unauthorized(
                f"{what} was sent for {path[:100]}; this server's completions need one",
                "send `Authorization: Bearer KEY`; the key is the inference_key of its settings",
            )
        raise Unauthorized(
            f"{what} was sent for {path[:100]}",
            "send `Authorization: Bearer KEY`; the key is SECONDNATURE_API_KEY or the file `key` in the home",
        )

    def _check_length(self, headers: dict[str, str]) -> None:
        announced = headers.get("content-length", "0")
        if announced.isascii() and announced.isdigit() and int(announced) > self._max_body_bytes:
            raise self._too_large(int(announced))

    def _too_large(self, found: int) -> TooLarge:
        return TooLarge(f"a body of {found:,} bytes; at most {self._max_body_bytes:,}", "send less at once")

    async def _read(self, receive: Receive, held: _Held) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise BadInput("the request ended before its body", "send it again")
            piece = message.get("body", b"")
            body += piece
            held.nbytes += len(piece)
            self._held_bytes += len(piece)
            if len(body) > self._max_body_bytes:
                raise self._too_large(len(body))
            full = self._held_bytes > MAX_HELD_BODIES * self._max_body_bytes
            if full and len(body) > self._max_body_bytes // SMALL_BODY:
                raise Busy("the requests under way are too large together", "try again later, or send less")
            if not message.get("more_body", False):
                return bytes(body)


@dataclass
class _Held:
    """What one request counts for."""

    nbytes: int = 0


class Faults:
    """ASGI middleware, behind starlette's own: what no handler knows is answered 500 and logged once.

    Starlette hands such an exception on to the server, which then closes the connection under the client.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def sent(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except Exception:  # (the server ends an answer that has begun and does not end)
            LOG.exception("%s %s", scope["method"], scope["path"])
            if not begun:
                await answer_error(
                    send, SecondnatureError("internal error", "please report it, with the server's log")
                )


def replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, then whatever comes next: that the client leaves is seen through this."""
    left: list[bytes] = [body]

    async def replayed() -> MutableMapping[str, Any]:
        if not left:
            return await receive()
        return {"type": "http.request", "body": left.pop(), "more_body": False}

    return replayed


async def refuse_socket(receive: Receive, send: Send) -> None:
    """Close a websocket before it opens (the client sees 403): no route of ours speaks it."""
    await receive()
    await send({"type": "websocket.close", "code": 1008, "reason": "this server speaks HTTP only"})


async def answer_error(send: Send, error: SecondnatureError) -> None:
    """The whole answer that an error is."""
    body = json.dumps(error_body(error)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if isinstance(error, Unauthorized):
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, Busy):
        headers.append((b"retry-after", b"5"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
