"""Who leaves takes their request along; what goes wrong is said, on a connection that stays open."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request, WebSocket
from tiny_server import KEY, Running, running

from secondnature.engines.local.engine import Engine
from secondnature.errors import SecondnatureError, Unreachable
from secondnature.web.application import _speak_errors  # pyright: ignore[reportPrivateUsage]
from secondnature.web.beside_vllm import OwnThread
from secondnature.web.guards import Guards, Keys
from secondnature.web.lanes import while_connected

CHAT = {"messages": [{"role": "user", "content": "Say tea."}], "max_tokens": 100, "temperature": 1.0}


def held(_: Engine, event: threading.Event) -> None:
    """A hook: the engine stands still until the event is set."""
    event.wait(60)


@pytest.fixture(scope="module")
def server(shared_server: Running) -> Running:
    """It only answers here."""
    return shared_server


@pytest.fixture
def gate(server: Running) -> Generator[threading.Event]:
    """The engine stands still after its next turn, until this is set."""
    event = threading.Event()
    hooks = server.parts.engine._on_step  # pyright: ignore[reportPrivateUsage]
    hooks.append(lambda engine: held(engine, event))
    yield event
    hooks.pop()
    event.set()


def until(true: Any, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def send(server: Running, path: str, body: Any) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_ten_clients_that_leave_give_their_rows_back(
    server: Running, gate: threading.Event, stream: bool
) -> None:
    """Nobody waits for their answers: they end at the engine's next turn, not at their last token."""
    engine = server.parts.engine
    before = dict(engine.metrics.requests)
    submitted: list[Any] = []
    submit = engine.submit

    def noted(request: Any) -> Any:
        submitted.append(submit(request))
        return submitted[-1]

    engine.submit = noted
    try:
        connections = [send(server, "/v1/chat/completions", {**CHAT, "stream": stream}) for _ in range(5)]
        connections += [
            send(server, "/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 100, "stream": stream})
            for _ in range(5)
        ]
        until(lambda: len(submitted) == 10)
        for connection in connections:
            connection.close()
        until(lambda: all(h.cancelled or h.done for h in submitted))
    finally:
        engine.submit = submit
        gate.set()
    until(lambda: all(h.done for h in submitted))
    ended = {k: n - before[k] for k, n in engine.metrics.requests.items()}
    assert sum(ended.values()) == 10
    assert ended["cancelled"] >= 9, ended  # one may have met its end in the turn before the gate


def test_inside_vllm_an_answer_is_waited_for_by_a_loop_of_its_own() -> None:
    """Nobody there tells of a client that left; a route that looks out for it must not hang."""
    app = FastAPI()

    @app.post("/v1/feedback")
    async def route(request: Request) -> Any:  # pyright: ignore[reportUnusedFunction]
        await request.body()
        return {"answer": await while_connected(request, asyncio.sleep(0.01, "whole"))}

    thread = OwnThread(app, 1000)
    sent: list[Any] = []

    async def call() -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b"{}"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/feedback", "headers": [], "query_string": b""}
        await asyncio.wait_for(thread.answer(scope, receive, send), 30)

    try:
        asyncio.run(call())
    finally:
        thread.stop()
    assert json.loads(sent[1]["body"]) == {"answer": "whole"}


def test_a_fault_is_logged_once_and_the_connection_stays_open(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Any:
        raise ZeroDivisionError("a fault of ours")

    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.auto_open = 0  # a connection that was closed is not opened again in silence
    connection.connect()
    headers = {"authorization": f"Bearer {KEY}"}
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(server.parts.runner.log, "optimizer_version", broken)
        connection.request("GET", "/v1/lessons", headers=headers)
        reply = connection.getresponse()
        assert (reply.status, json.loads(reply.read())["error"]["message"]) == (
            500,
            "internal error (please report it, with the server's log)",
        )
    connection.request("GET", "/v1/lessons", headers=headers)
    assert connection.getresponse().status == 200
    connection.close()
    faults = [r for r in caplog.records if r.exc_info]
    assert [(r.name, r.getMessage()) for r in faults] == [("secondnature", "GET /v1/lessons")]


def test_websockets_are_closed_before_they_open() -> None:
    app = FastAPI()
    _speak_errors(app)

    @app.websocket("/v1/socket")
    async def route(socket: WebSocket) -> None:  # pyright: ignore[reportUnusedFunction]
        await socket.accept()
        await socket.send_text("a secret")

    guards = Guards(app, keys=Keys(None, "-", KEY), hosts=None, max_body_bytes=1024, requests_per_minute=1000)
    sent: list[Any] = []

    async def call() -> None:
        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"authorization", f"Bearer {KEY}".encode())]
        scope = {"type": "websocket", "path": "/v1/socket", "headers": headers, "query_string": b""}
        await guards({**scope, "subprotocols": [], "root_path": ""}, receive, send)

    asyncio.run(call())
    assert [(m["type"], m.get("code")) for m in sent] == [("websocket.close", 1008)]


def test_what_the_engines_end_broke_off_is_an_error(talker: Path, tmp_path: Path) -> None:
    """An answer that was cut off must not look like one that came to its end."""
    event = threading.Event()
    with running(tmp_path / "home", talker) as server:
        engine = server.parts.engine
        engine._on_step.append(lambda engine: held(engine, event))  # pyright: ignore[reportPrivateUsage]
        found: dict[str, Any] = {}

        def plain() -> None:
            try:
                found["plain"] = server.client.chat(CHAT["messages"], max_tokens=200, temperature=1.0)
            except Unreachable as e:
                found["plain"] = e

        thread = threading.Thread(target=plain)
        thread.start()
        until(lambda: engine.metrics.running == 1)
        stream = send(server, "/v1/chat/completions", {**CHAT, "stream": True})
        received = stream.recv(65536)
        closing = threading.Thread(target=engine.close)
        closing.start()
        until(lambda: engine._waiting.closing)  # pyright: ignore[reportPrivateUsage]
        event.set()
        for waited in (closing, thread):
            waited.join(30)
        stream.settimeout(10)
        while b'"error"' not in received and (piece := stream.recv(65536)):
            received += piece
        stream.close()
        assert isinstance(found["plain"], Unreachable), found
        assert "shut down" in found["plain"].message
        assert b'{"error": {"type": "Unreachable"' in received
        assert b'"finish_reason": "' not in received


def test_an_engine_that_ended_shows_in_the_health(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path / "home", talker) as server:
        assert server.client.health().status == "ok"

        def broken() -> None:
            raise MemoryError("no memory at all")

        engine = server.parts.engine
        monkeypatch.setattr(engine._turns, "_drop_cancelled", broken)
        forget = engine._turns.forget  # pyright: ignore[reportPrivateUsage]
        failures = [MemoryError("none to clean up either")]

        def forgetting() -> None:
            if failures:
                raise failures.pop()
            forget()

        monkeypatch.setattr(engine._turns, "forget", forgetting)
        for _ in range(2):  # the one that it met, and one that comes after
            with pytest.raises(SecondnatureError, match=r"no memory|engine has ended"):
                server.client.chat(CHAT["messages"], max_tokens=20)
        health = server.client.health()
        assert health.status == "degraded"
        assert "the engine has ended: MemoryError" in health.detail
