"""The event loop never computes: whatever one client sends, the others are answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_server import KEY, Running

from secondnature.engines.generation import GenerationRequest
from secondnature.engines.local.engine import Engine
from secondnature.errors import Busy
from secondnature.model import chat, lengths
from secondnature.web import bodies
from secondnature.web.guards import Guards, Keys
from secondnature.wire import Client

LIMIT_S = 2.0
"""Generous: where texts were encoded on the loop, the same request took it for most of a minute."""


def held(_: Engine, event: threading.Event) -> None:
    """A hook: the engine stands still until the event is set."""
    event.wait(60)


@pytest.fixture(scope="module")
def server(shared_server: Running) -> Running:
    """It only answers here."""
    return shared_server


def longest_gaps(server: Running, what: Callable[[], Any]) -> tuple[float, float, Any]:
    """(seconds between two events of a stream, seconds for a `GET /v1/models`), the longest while `what` runs."""
    ending = threading.Event()
    gaps = {"stream": 0.0, "models": 0.0}
    failures: list[BaseException] = []

    def listen() -> None:
        with Client(server.url, KEY, timeout_s=120) as client:
            last = time.monotonic()
            while not ending.is_set():
                message = [{"role": "user", "content": "Say iron."}]
                for _ in client.chat_stream(message, max_tokens=60, temperature=1.0):
                    now = time.monotonic()
                    gaps["stream"], last = max(gaps["stream"], now - last), now

    def ask() -> None:
        with httpx2.Client(base_url=server.url, trust_env=False, timeout=120) as http:
            while not ending.is_set():
                begun = time.monotonic()
                assert http.get("/v1/models").status_code == 200
                gaps["models"] = max(gaps["models"], time.monotonic() - begun)
                time.sleep(0.02)

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as e:  # noqa: BLE001  (the test's thread raises it)
            failures.append(e)

    threads = [threading.Thread(target=run, args=(work,)) for work in (listen, ask)]
    for thread in threads:
        thread.start()
    try:
        found = what()
    finally:
        ending.set()
        for thread in threads:
            thread.join()
    assert not failures, failures
    return gaps["stream"], gaps["models"], found


def post(server: Running, path: str, body: Any) -> httpx2.Response:
    content = json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    return httpx2.post(server.url + path, content=content, headers=headers, trust_env=False, timeout=120)


LARGE = "Paint the door red. " * 9000
"""180,000 characters."""


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LARGE}] * 80, "max_tokens": 1}),
        ("/v1/completions", {"prompt": LARGE * 11, "max_tokens": 1}),
    ],
    ids=["chat", "text"],
)
def test_a_text_that_cannot_fit_holds_nobody_up(server: Running, path: str, body: Any) -> None:
    """No key is sent: anybody can do this."""
    before = longest_gaps(server, lambda: time.sleep(1))[:2]
    *gaps, reply = longest_gaps(server, lambda: post(server, path, body))
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "ContextOverflow"), error
    assert "maximum context length is 256 tokens" in error["message"]
    assert max(gaps) < max(before) + LIMIT_S, (gaps, before)


def test_a_body_of_millions_of_values_holds_nobody_up(server: Running) -> None:
    """The C parser of JSON would stand in everybody's way until it is through."""
    body = b'{"prompt": [' + b"[], " * 3_000_000 + b"[]]}"

    def ask() -> httpx2.Response:
        headers = {"content-type": "application/json"}
        where = server.url + "/v1/completions"
        return httpx2.post(where, content=body, headers=headers, trust_env=False, timeout=120)

    before = longest_gaps(server, lambda: time.sleep(1))[:2]
    *gaps, reply = longest_gaps(server, ask)
    assert "a list of 3000001 prompts" in reply.json()["error"]["message"]
    assert max(gaps) < max(before) + LIMIT_S, (gaps, before)


def test_large_bodies_are_read_in_their_lane_as_small_ones_are(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is wrong with one is said in the same words."""
    threads: list[str] = []
    limit = server.parts.engine.limits.context
    parse = bodies.parse

    def noted(body: bytes) -> Any:
        threads.append(threading.current_thread().name)
        return parse(body)

    monkeypatch.setattr(bodies, "parse", noted)

    def answers(size: int) -> list[tuple[int, Any]]:
        filler = "a" * size
        turns = [{"role": "user", "content": "Say tea."}]
        asked: list[tuple[str, Any]] = [
            ("/v1/chat/completions", {"messages": turns, "user": "b", "safety_identifier": filler}),
            ("/v1/chat/completions", {"messages": turns, "top_p": 2, "colour": filler}),
            ("/v1/completions", {"prompt": [1] * (limit + size), "max_tokens": 1}),
            ("/v1/responses", {"input": "Say tea.", "max_output_tokens": 4, "safety_identifier": filler}),
            ("/v1/responses", {"input": 3, "safety_identifier": filler}),
        ]
        found: list[tuple[int, Any]] = []
        for path, body in asked:
            reply = post(server, path, body)
            error = reply.json().get("error") or {}
            found.append((reply.status_code, [error.get(k) for k in ("type", "param", "code")]))
        for cut in (f'{{"user": "{filler}"', f'{{"user": "{filler}", "messages": {"[" * size}'):
            reply = httpx2.post(
                server.url + "/v1/chat/completions",
                content=cut,
                headers={"content-type": "application/json"},
                trust_env=False,
                timeout=60,
            )
            found.append((reply.status_code, reply.json()["error"]["message"]))
        return found

    small = answers(10)
    assert [status for status, _ in small] == [200, 400, 400, 200, 400, 400, 400]
    assert not threads
    assert answers(bodies.LARGE_BYTES) == small
    assert threads == ["secondnature-read"] * len(small)


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(),
        lambda part: st.lists(part) | st.dictionaries(st.text(), part) | st.lists(st.integers(), min_size=90),
    )
)
def test_a_large_body_is_read_as_json_reads_it(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert bodies.parse(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    "cut", ["[1, 2", "[{n}, ]", "[{n},, 1]", "[{n} 1]", "[{n}, 01]", "[{n}, -]", "[" * 9999]
)
def test_what_is_no_json_is_none(cut: str) -> None:
    text = cut.replace("{n}", ", ".join(map(str, range(300))))
    with pytest.raises(ValueError):  # noqa: PT011  (json's own words)
        bodies.parse(text.encode())


def test_texts_that_have_to_be_encoded_wait_for_each_other_and_nobody_for_them(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tokenizer whose tokens may stand for any number of characters nothing is known before it has encoded."""
    (tokenizer,) = [t for t in lengths._KNOWN if lengths._KNOWN[t] == len("<|assistant|>")][:1]  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setitem(lengths._KNOWN, tokenizer, None)  # pyright: ignore[reportPrivateUsage, reportArgumentType]
    at_once: list[int] = []
    encode = chat.encode_text

    def counted(*args: Any, **options: Any) -> list[int]:
        names = [t.name for t in threading.enumerate()]
        at_once.append(names.count("secondnature-encode-large"))
        assert threading.current_thread().name == "secondnature-encode-large"
        return encode(*args, **options)

    monkeypatch.setattr("secondnature.web.completions.encode_text", counted)
    before = longest_gaps(server, lambda: time.sleep(1))[:2]

    def several() -> list[httpx2.Response]:
        body = {"prompt": LARGE * 2, "max_tokens": 1}
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda _: post(server, "/v1/completions", body), range(4)))

    *gaps, replies = longest_gaps(server, several)
    assert [r.json()["error"]["type"] for r in replies] == ["ContextOverflow"] * 4
    assert len(at_once) == 4
    assert max(gaps) < max(before) + LIMIT_S, (gaps, before)


def test_small_requests_are_taken_while_large_ones_fill_the_room(server: Running) -> None:
    """Bodies are held in memory until they are answered: together no more than eight of the largest."""
    waiting: list[asyncio.Future[None]] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        if len(message["body"]) > 1000:
            waiting.append(asyncio.get_running_loop().create_future())
            await waiting[-1]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    app = Guards(
        behind,
        keys=Keys(None, "-", KEY),
        hosts=None,
        max_body_bytes=64_000,
        requests_per_minute=10_000,
    )

    async def call(size: int) -> int:
        statuses: list[int] = []
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [],
            "client": ("a", 1),
        }

        async def receive() -> Any:
            return {"type": "http.request", "body": b"x" * size}

        async def send(message: Any) -> None:
            statuses.append(message.get("status", 0))

        await app(scope, receive, send)
        return statuses[0]

    async def main() -> None:
        large = [asyncio.ensure_future(call(64_000)) for _ in range(8)]
        while len(waiting) < 8:
            await asyncio.sleep(0)
        assert await call(64_000) == 429
        assert await call(1000) == 200
        for future in waiting:
            future.set_result(None)
        assert await asyncio.gather(*large) == [200] * 8
        waiting.clear()
        again = asyncio.ensure_future(call(64_000))
        while not waiting:
            await asyncio.sleep(0)
        waiting[0].set_result(None)
        assert await again == 200

    asyncio.run(main())


def test_waiting_prompts_are_counted_in_tokens(server: Running) -> None:
    engine = server.parts.engine
    gate = threading.Event()
    engine._on_step.append(lambda engine: held(engine, gate))  # pyright: ignore[reportPrivateUsage]
    most = engine._waiting.max_tokens  # pyright: ignore[reportPrivateUsage]
    handles: list[Any] = []
    try:
        handles.append(
            engine.submit(GenerationRequest([5], max_tokens=50, ignore_eos=True))
        )  # the engine now stands at the gate
        while engine.metrics.running == 0:
            time.sleep(0.01)
        engine._waiting.max_tokens = 400  # pyright: ignore[reportPrivateUsage]
        for _ in range(3):
            handles.append(engine.submit(GenerationRequest([5] * 200, max_tokens=1)))
        with pytest.raises(Busy, match="over 400 tokens"):
            engine.submit(GenerationRequest([5] * 200, max_tokens=1))
    finally:
        engine._waiting.max_tokens = most  # pyright: ignore[reportPrivateUsage]
        engine._on_step.pop()  # pyright: ignore[reportPrivateUsage]
        gate.set()
        for handle in handles:
            handle.cancel()
    assert all(h.result(60).finish_reason in ("cancelled", "stop", "length") for h in handles)
