"""What a caller can get wrong over HTTP: 4xx with type, message and hint, never 5xx, and the weights as before."""

from __future__ import annotations

import json
import socket
from collections.abc import Generator
from typing import Any

import httpx2
import pytest
from tiny_server import KEY, Running, teach, use_probes

from secondnature.errors import BadInput

HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
TEA = [{"role": "user", "content": "Say tea."}]


def post(server: Running, path: str, content: str | bytes) -> httpx2.Response:
    return httpx2.post(server.url + path, content=content, headers=HEADERS, trust_env=False, timeout=60)


def refused(reply: httpx2.Response, status: int, kind: str, *words: str) -> None:
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (status, kind), error
    assert error["hint"]
    for word in words:
        assert word in error["message"], (word, error)


@pytest.fixture(scope="module")
def server(shared_server: Running) -> Generator[Running]:
    """The weights, and all that was written, are the same after all of this."""
    before = (shared_server.state(), shared_server.parts.arena.writes)
    yield shared_server
    assert (shared_server.state(), shared_server.parts.arena.writes) == before
    assert shared_server.client.health().status == "ok"


CASES: list[tuple[str, Any, int, str, tuple[str, ...]]] = [
    (
        "/v1/chat/completions",
        {"messages": TEA, "max_tokens": 1000},
        400,
        "ContextOverflow",
        ("maximum context length is 256 tokens",),
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "tea " * 999}]},
        400,
        "ContextOverflow",
        (),
    ),
    ("/v1/chat/completions", {"messages": []}, 400, "BadInput", ("messages",)),
    (
        "/v1/chat/completions",
        {"messages": TEA, "temprature": 0},
        400,
        "BadInput",
        ("unknown field", "temprature"),
    ),
    ("/v1/chat/completions", {"messages": TEA, "n": 0}, 400, "BadInput", ("n:",)),
    (
        "/v1/chat/completions",
        {"messages": TEA, "stop": [str(i) for i in range(17)], "user": "a" * 501},
        400,
        "BadInput",
        ("stop: expected at most 16 items, not 17", "user: expected at most 500 characters"),
    ),
    (
        "/v1/chat/completions",
        {"messages": TEA, "functions": [{}]},
        400,
        "BadInput",
        ("`functions` is not supported here; expected it left out, or []",),
    ),
    ("/v1/chat/completions", {"messages": TEA, "seed": 10**400}, 400, "BadInput", ("seed",)),
    ("/v1/completions", {"prompt": [5, 320], "max_tokens": 1}, 400, "BadExample", ("320", "0 to 319")),
    ("/v1/completions", {"prompt": [-1], "max_tokens": 1}, 400, "BadInput", ("prompt",)),
    ("/v1/completions", {"prompt": "", "max_tokens": 1}, 400, "BadInput", ("prompt",)),
    ("/v1/feedback", {"completion_id": "chatcmpl-x", "corrected": "a"}, 404, "NotFound", ("chatcmpl-x",)),
    ("/v1/feedback", {"completion_id": "chatcmpl-x"}, 400, "BadInput", ("rating, corrected, text",)),
    ("/v1/feedback", {"completion_id": "x", "corrected": "a", "why": 1}, 400, "BadInput", ("why",)),
    ("/v1/corrections", {"corrections": [{"prompt": "a"}]}, 400, "BadInput", ("corrections.0",)),
    ("/v1/train", {}, 400, "BadInput", ("no source",)),
    ("/v1/train", {"ledger": True, "corrections": []}, 400, "BadInput", ()),
    (
        "/v1/train",
        {"examples": [{"context_ids": [1], "continuation_ids": [320]}]},
        400,
        "BadExample",
        ("320",),
    ),
    (
        "/v1/train",
        {"examples": [{"context_ids": [1] * 250, "continuation_ids": [2] * 20}]},
        400,
        "ContextOverflow",
        ("example 0", "250 + 20", "256"),
    ),
    (
        "/v1/train",
        {"examples": [{"context_ids": [], "continuation_ids": [2]}]},
        400,
        "BadInput",
        ("context_ids",),
    ),
    (
        "/v1/train",
        {"corrections": [{"prompt": "a", "feedback": "no"}]},
        400,
        "BadInput",
        ("none of 1 corrections says what was wanted",),
    ),
    (
        "/v1/train",
        {"corrections": [{"prompt": "a", "chosen": "b"}], "objective": "dpo"},
        400,
        "BadInput",
        ("dpo",),
    ),
    ("/v1/train", {"ledger": True, "lesson": {"behaviour": "../x"}}, 400, "BadInput", ("behaviour",)),
    ("/v1/lessons/no-such/keep", {}, 404, "NotFound", ("no-such",)),
    ("/v1/lessons/no-such/revert", {}, 404, "NotFound", ("no-such",)),
    ("/v1/nothing", {}, 404, "NotFound", ("/v1/nothing",)),
]


@pytest.mark.parametrize(("path", "body", "status", "kind", "words"), CASES)
def test_wrong_values(
    server: Running, path: str, body: Any, status: int, kind: str, words: tuple[str, ...]
) -> None:
    refused(post(server, path, json.dumps(body)), status, kind, *words)


PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/feedback", "/v1/corrections", "/v1/train")


BROKEN = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"tea"',
    b"\xff\xfe\x00",
    b'{"a": NaN}',
    b'{"prompt": Infinity, "temperature": NaN}',
    b'{"completion_id": "\\ud800", "corrected": "\\udfff", "prompt": "\\ud800"}',
    b'{"messages": [{"role": "user", "content": "\\ud83d"}], "prompt": "\\ud83d"}',
    b"[" * 100_000,
    b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    b"1" * 10_000,
    b'{"seed": ' + b"9" * 6_000 + b"}",
]


@pytest.mark.parametrize("path", PATHS)
def test_broken_bodies(server: Running, path: str) -> None:
    for text in BROKEN:
        refused(post(server, path, text), 400, "BadInput")


def test_a_body_over_the_limit(server: Running) -> None:
    limit = server.parts.settings.max_body_bytes
    refused(post(server, "/v1/train", b" " * (limit + 1)), 413, "TooLarge", f"{limit:,}")
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/train HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as lying:  # only announced
        lying.sendall(f"{head}Content-Length: {10**12}\r\n\r\n".encode())
        assert b" 413 " in lying.recv(4096).split(b"\r\n")[0]


def test_wrong_methods_and_jobs(server: Running) -> None:
    with httpx2.Client(base_url=server.url, headers=HEADERS, trust_env=False) as http:
        refused(http.get("/v1/train"), 405, "BadInput", "GET /v1/train")
        refused(http.delete("/v1/train/job-unknown"), 404, "NotFound", "job-unknown")
        refused(http.get("/v1/train/status", params={"job": "x"}), 404, "NotFound")
        refused(http.get("/v1/lessons/..%2f..%2fetc"), 404, "NotFound")
        refused(
            http.get("/v1/corrections", headers={"authorization": "Bearer no"}),
            401,
            "Unauthorized",
            "wrong key",
        )


def test_feedback_needs_a_chat(server: Running) -> None:
    said = server.client.request("POST", "/v1/completions", body={"prompt": "Say tea.", "max_tokens": 2})
    body = {"completion_id": said["id"], "corrected": "x"}
    refused(post(server, "/v1/feedback", json.dumps(body)), 400, "BadInput", "was no chat")


def test_a_probe_that_was_taught_is_no_evidence(server: Running) -> None:
    taught = teach(["tea"], probes=use_probes(["tea"]))
    with pytest.raises(BadInput, match="not held out"):
        server.client.train(taught)
