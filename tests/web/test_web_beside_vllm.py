"""The door in front of vLLM's application, on a fake one: only the far side of ASGI is made up."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Generator, MutableMapping
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from starlette.exceptions import HTTPException

from secondnature.engines.stamps import Clock
from secondnature.errors import BadInput, NotFound
from secondnature.lessons.memory import Memory
from secondnature.records import Message
from secondnature.web.application import _speak_errors  # pyright: ignore[reportPrivateUsage]
from secondnature.web.beside_vllm import MAX_REMEMBERED_BYTES, OURS, Door, OwnThread
from secondnature.web.guards import Keys
from secondnature.weights.arena import Arena

OUR_KEY, CHAT = "ours", "/v1/chat/completions"
JSON, EVENTS = b"application/json", b"text/event-stream; charset=utf-8"
MAX_BODY = 1000
Event = MutableMapping[str, Any]


def asked(text: str = "Hi", **fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}], **fields}).encode()


class Engine:
    """vLLM's application: answers what it was told to, and remembers what reached it."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.status = 200
        self.kind = JSON
        self.parts = [b'{"id": "chatcmpl-1", "choices": []}']
        self.scopes: list[Event] = []
        self.fails = False
        self.between: Callable[[], None] = lambda: None

    async def __call__(self, scope: Event, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        while (await receive()).get("more_body"):
            pass
        if self.fails:
            raise RuntimeError("the engine is gone")
        length = str(sum(map(len, self.parts))).encode()
        headers = [(b"content-type", self.kind)] + (
            [(b"content-length", length)] if self.kind == JSON else []
        )
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for i, part in enumerate(self.parts):
            await send({"type": "http.response.body", "body": part, "more_body": i + 1 < len(self.parts)})
            self.between()


class Reply:
    def __init__(self, events: list[Event]) -> None:
        self.events = events
        self.status = int(events[0]["status"])
        self.headers = {k.decode(): v.decode() for k, v in events[0]["headers"]}
        self.body = b"".join(e.get("body", b"") for e in events[1:])

    @property
    def json(self) -> Any:
        assert int(self.headers["content-length"]) == len(self.body)
        return json.loads(self.body)

    @property
    def chunks(self) -> list[Any]:
        found = [e.removeprefix(b"data: ") for e in self.body.split(b"\n\n") if e]
        return [json.loads(e) for e in found if e != b"[DONE]"]


class World:
    """A door with everything around it."""

    def __init__(self, *engine_keys: str) -> None:
        self.arena = Arena.create({"a": torch.zeros(4, dtype=torch.bfloat16)})
        self.engine = Engine(self.arena)
        self.clock = Clock(self.arena, "wone")
        self.memory = Memory()
        self.loads: list[int] = []
        self.told: list[str] = []
        self.threads: set[str] = set()
        self.thread = OwnThread(self._ours(), MAX_BODY)
        self.door = Door(
            self.engine,
            ours=self.thread,
            clock=self.clock,
            memory=self.memory,
            keys=Keys(None, "the-key-that-corrects", OUR_KEY),
            in_band=None,
            engine_keys=engine_keys,
            on_load=self.loads.append,
            on_startup=lambda: self.told.append("startup"),
            on_shutdown=self._stopping,
        )

    async def _stopping(self) -> None:
        self.told.append("shutdown")

    def _ours(self) -> Any:
        app = FastAPI()
        _speak_errors(app)

        @app.post("/v1/train")
        async def train(body: dict[str, Any]) -> Any:  # pyright: ignore[reportUnusedFunction]
            self.threads.add(threading.current_thread().name)
            if body.get("bug"):
                raise ZeroDivisionError
            if body.get("wrong"):
                raise BadInput("wrong", "right it")
            if body.get("teapot"):
                raise HTTPException(418)
            return body

        return app

    def call(
        self, path: str, body: bytes = b"{}", *, method: str = "POST", key: str | None = None, cut: int = 0
    ) -> Reply:
        """One request; its body comes in two pieces. `cut`: it ends before its body does."""
        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        headers += [(b"Authorization", f"Bearer {key}".encode())] if key is not None else []
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
            "root_path": "",
        }
        middle = len(body) // 2
        messages: list[Event] = [
            {"type": "http.request", "body": body[:middle], "more_body": True},
            {"type": "http.request", "body": body[middle:], "more_body": False},
        ]
        if cut:
            messages[1] = {"type": "http.disconnect"}
        sent: list[Event] = []

        async def receive() -> Event:
            if not messages:
                await asyncio.sleep(3600)
            return messages.pop(0)

        async def send(event: Event) -> None:
            sent.append(event)

        asyncio.run(asyncio.wait_for(self.door(scope, receive, send), 60))
        return Reply(sent) if sent else Reply([{"status": 0, "headers": []}])


@pytest.fixture
def make_world() -> Generator[Callable[..., World]]:
    made: list[World] = []

    def make(*engine_keys: str) -> World:
        made.append(World(*engine_keys))
        return made[-1]

    yield make
    for each in made:
        each.thread.stop()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


# -------------------------------------------------------------------------------------------------- stamps


def test_a_document_is_stamped_in_body_and_headers(world: World) -> None:
    world.engine.parts = [b'{"id": "chatcmpl-1", ', b'"choices": [{"text": "}"}]} \n']
    reply = world.call(CHAT, asked())
    assert reply.json == {
        "id": "chatcmpl-1",
        "choices": [{"text": "}"}],
        "weights_version": "wone",
        "weights_span": {
            "first": "wone",
            "last": "wone",
            "first_epoch": 0,
            "last_epoch": 0,
            "changed": False,
        },
        "trial": False,
        "system_fingerprint": "wone",
    }
    assert reply.headers["x-weights-version"] == "wone"
    assert reply.headers["x-weights-span"] == "wone..wone"
    assert reply.headers["x-weights-trial"] == "false"


def test_a_write_under_way_is_in_the_stamp(world: World) -> None:
    def write() -> None:
        world.clock.begin(3)
        world.arena.write({"a": torch.ones(4, dtype=torch.bfloat16)})

    world.engine.parts = [b'{"id": "chatcmpl-1",', b'"choices": []}']
    world.engine.between = write
    reply = world.call(CHAT, asked())
    assert reply.json["weights_span"]["changed"] is True
    assert (reply.json["weights_version"], reply.json["trial"]) == ("wone+0003.1", True)
    assert reply.headers["x-weights-span"] == "wone..wone+0003.1 changed"


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (400, JSON, b'{"error": {"code": 400}}'),
        (200, b"text/plain", b'{"id": "chatcmpl-1"}'),
        (200, JSON, b"{}"),
        (200, JSON, b"[1]"),
        (200, JSON, b""),
    ],
)
def test_what_is_no_completion_keeps_its_body(world: World, status: int, kind: bytes, body: bytes) -> None:
    world.engine.status, world.engine.kind, world.engine.parts = status, kind, [body]
    reply = world.call(CHAT, asked())
    assert (reply.status, reply.body) == (status, body)
    assert reply.headers["x-weights-version"] == "wone"
    if "content-length" in reply.headers:
        assert int(reply.headers["content-length"]) == len(body)


def test_other_posts_are_stamped_in_the_headers_and_gets_not_at_all(world: World) -> None:
    reply = world.call("/tokenize")
    assert (reply.body, reply.headers["x-weights-version"]) == (world.engine.parts[0], "wone")
    reply = world.call("/v1/models", method="GET")
    assert (reply.body, "x-weights-version" in reply.headers) == (world.engine.parts[0], False)


def event(index: int, text: str = "", end: str | None = None) -> bytes:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": end}
    return b"data: " + json.dumps({"id": "chatcmpl-7", "choices": [choice]}).encode() + b"\n\n"


STREAM = [
    event(0, "Gr"),
    event(0, "üße"),
    event(1, '"finish_reason": "no"'),
    event(0, "", "stop"),
    event(1, "", "length"),
]
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("pieces", ["events", "whole", "bytes", "halves"])
def test_a_stream_is_stamped_where_a_choice_ends(world: World, pieces: str) -> None:
    whole = b"".join(STREAM) + DONE
    size = {"events": 0, "whole": len(whole), "bytes": 1, "halves": 97}[pieces]
    cut = [whole[i : i + size] for i in range(0, len(whole), size)] if size else [*STREAM, DONE]
    world.engine.kind, world.engine.parts = EVENTS, cut
    reply = world.call(CHAT, asked(stream=True))
    assert reply.headers["x-weights-version"] == "wone"
    assert reply.body.endswith(DONE)
    assert [chunk.get("weights_version") for chunk in reply.chunks] == [None, None, None, "wone", "wone"]
    assert [chunk["choices"][0] for chunk in reply.chunks] == [
        json.loads(e[6:])["choices"][0] for e in STREAM
    ]
    if pieces == "events":  # nothing is held back
        assert len(reply.events) == 1 + len(cut)


def test_there_is_one_fingerprint_and_it_is_of_the_weights(world: World) -> None:
    text = '"system_fingerprint":"mine"'
    choice = {"message": {"content": text}}
    answer = {"id": "chatcmpl-1", "choices": [choice], "system_fingerprint": "vllm-0.32", "usage": {}}
    for found in (answer, {**answer, "system_fingerprint": None}):
        world.engine.parts = [json.dumps(found).encode()]
        body = world.call(CHAT, asked()).body
        pairs = json.loads(body, object_pairs_hook=list)
        assert [value for key, value in pairs if key == "system_fingerprint"] == ["wone"]
        assert json.loads(body)["choices"] == [choice]
        assert json.loads(body)["weights_version"] == "wone"
    usage = b'data: {"id":"chatcmpl-7","choices":[],"usage":{},"system_fingerprint":"vllm-0.32"}\n\n'
    world.engine.kind, world.engine.parts = EVENTS, [*STREAM, usage, DONE]
    reply = world.call(CHAT, asked(stream=True))
    assert [c["system_fingerprint"] for c in reply.chunks if "system_fingerprint" in c] == ["wone"] * 3


def test_a_stream_that_breaks_off_is_passed_on_as_it_is(world: World) -> None:
    world.engine.kind, world.engine.parts = EVENTS, [STREAM[0], STREAM[1][:20]]
    assert world.call(CHAT, asked(stream=True)).body == STREAM[0] + STREAM[1][:20]


# ------------------------------------------------------------------------------------------------ feedback


def test_a_stream_is_remembered_with_its_first_choice(world: World) -> None:
    world.engine.kind, world.engine.parts = EVENTS, [*STREAM, DONE]
    world.call(CHAT, asked("Say it.", stream=True))
    said = world.memory.recall("chatcmpl-7")
    assert said.prompt == [Message(role="user", content="Say it.")]
    assert (said.answer, said.weights_version) == ("Grüße", "wone")


def test_a_document_is_remembered(world: World) -> None:
    world.engine.parts = [b'{"id": "chatcmpl-1", "choices": [{"message": {"content": "No."}}]}']
    parts = [{"type": "text", "text": "Do "}, {"type": "text", "text": "it."}]
    world.call(CHAT, json.dumps({"messages": [{"role": "user", "content": parts}]}).encode())
    said = world.memory.recall("chatcmpl-1")
    assert (said.prompt, said.answer) == ([Message(role="user", content="Do it.")], "No.")
    world.engine.parts = [b'{"id": "cmpl-2", "choices": [{"text": "No."}]}']
    world.call("/v1/completions", b'{"prompt": "a"}')
    assert world.memory.recall("cmpl-2").prompt is None


def test_what_is_not_text_cannot_be_corrected(world: World) -> None:
    world.engine.parts = [b'{"id": "chatcmpl-1", "choices": [{"message": {"content": "No."}}]}']
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    world.call(CHAT, json.dumps({"messages": [{"role": "user", "content": picture}]}).encode())
    with pytest.raises(BadInput, match="not plain text"):
        world.memory.recall("chatcmpl-1")


TOOL = {"type": "function", "function": {"name": "paint", "parameters": {}}}
CALL = {"id": "c", "type": "function", "function": {"name": "paint", "arguments": "{}"}}


CALLED = {"choices": [{"message": {"content": None, "tool_calls": [CALL]}}]}
CALLING = {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, **CALL}]}}]}


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [TOOL], "tool_choice": "required"},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        {"messages": [{"role": "tool", "tool_call_id": "c", "content": "done"}]},
        {"answer": CALLED},
        {"stream": CALLING},
    ],
)
def test_calls_are_more_than_a_correction_holds(world: World, more: dict[str, Any]) -> None:
    answer = more.get("answer", {"choices": [{"message": {"content": "No."}}]})
    world.engine.parts = [json.dumps({"id": "chatcmpl-1", **answer}).encode()]
    if "stream" in more:
        world.engine.kind = EVENTS
        world.engine.parts = [f"data: {json.dumps({'id': 'chatcmpl-1', **CALLING})}\n\n".encode(), DONE]
    body = json.loads(asked("Do it."))
    body["messages"] += more.get("messages", [])
    sent = {k: v for k, v in more.items() if k.startswith("tool")}
    world.call(CHAT, json.dumps({**body, **sent}).encode())
    with pytest.raises(BadInput, match="calls tools"):
        world.memory.recall("chatcmpl-1")


def test_tools_that_were_only_offered_change_nothing(world: World) -> None:
    world.engine.parts = [b'{"id": "chatcmpl-1", "choices": [{"message": {"content": "No."}}]}']
    world.call(CHAT, asked("Do it.", tools=[TOOL], logprobs=None))
    assert world.memory.recall("chatcmpl-1").answer == "No."


def test_turns_are_kept_as_the_local_engine_keeps_them(world: World) -> None:
    world.engine.parts = [b'{"id": "chatcmpl-1", "choices": [{"message": {"content": "No."}}]}']
    turns = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "Hi", "name": "Ada"},
        {"role": "assistant", "content": "Hm.", "refusal": None, "tool_calls": [], "annotations": []},
        {"role": "user", "content": "Why?"},
    ]
    world.call(CHAT, json.dumps({"messages": turns}).encode())
    said = world.memory.recall("chatcmpl-1")
    assert said.prompt is not None
    assert [(m.role, m.content) for m in said.prompt] == [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "Hm."),
        ("user", "Why?"),
    ]


def responded(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


SPOKEN = [
    responded("response.created", response={"id": "resp_7", "status": "in_progress"}),
    responded("response.output_text.delta", delta="Gr", item_id="msg_1"),
    responded("response.output_text.delta", delta="üße", item_id="msg_1"),
    responded("response.completed", response={"id": "resp_7", "status": "completed", "output": []}),
]


def test_a_response_is_stamped_and_remembered(world: World) -> None:
    item = {"type": "message", "content": [{"type": "output_text", "text": "No."}]}
    answer = {"id": "resp_1", "object": "response", "status": "incomplete", "output": [item]}
    world.engine.parts = [json.dumps(answer).encode()]
    body = {"input": "Do it.", "instructions": "Be kind.", "unknown": 1}
    assert world.call("/v1/responses", json.dumps(body).encode()).json["weights_version"] == "wone"
    said = world.memory.recall("resp_1")
    assert said.prompt == [Message(role="system", content="Be kind."), Message(role="user", content="Do it.")]
    assert (said.answer, said.finish_reason) == ("No.", "length")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    world.engine.parts = [json.dumps({**answer, "id": "resp_2"}).encode()]
    world.call("/v1/responses", json.dumps({"input": [*turns, turns[0]]}).encode())
    assert [m.content for m in world.memory.recall("resp_2").prompt or []] == ["a", "b", "a"]
    world.call("/v1/responses", json.dumps({"input": "x", "previous_response_id": "resp_1"}).encode())
    with pytest.raises(BadInput, match="not plain text"):
        world.memory.recall("resp_2")


@pytest.mark.parametrize("size", [0, 1, 97])
def test_a_streamed_response_is_stamped_where_it_ends(world: World, size: int) -> None:
    whole = b"".join(SPOKEN)
    world.engine.parts = [whole[i : i + size] for i in range(0, len(whole), size)] if size else SPOKEN
    world.engine.kind = EVENTS
    reply = world.call("/v1/responses", b'{"input": "Say it.", "stream": true}')
    events = [json.loads(e.split(b"data: ", 1)[1]) for e in reply.body.split(b"\n\n") if e]
    assert [e["type"] for e in events] == [json.loads(e.split(b"data: ", 1)[1])["type"] for e in SPOKEN]
    assert [e.get("response", {}).get("weights_version") for e in events] == [None, None, None, "wone"]
    said = world.memory.recall("resp_7")
    assert (said.answer, said.finish_reason) == ("Grüße", "stop")
    world.engine.parts = SPOKEN[:2]
    world.call("/v1/responses", b'{"input": "Say it.", "stream": true}')
    said = world.memory.recall("resp_7")
    assert (said.answer, said.finish_reason) == ("Gr", "unfinished")


def test_refused_and_long_completions_are_not_remembered(world: World) -> None:
    world.engine.status = 400
    world.call(CHAT, asked())
    world.engine.status = 200
    world.engine.parts = [b'{"id": "chatcmpl-2", "choices": []}']
    world.call(CHAT, asked("a" * MAX_REMEMBERED_BYTES))
    for name in ("chatcmpl-1", "chatcmpl-2"):
        with pytest.raises(NotFound):
            world.memory.recall(name)


# -------------------------------------------------------------------------------------------- keys, routes


def authorization(world: World) -> str | None:
    headers = {k.lower(): v.decode() for k, v in world.engine.scopes[-1]["headers"]}
    return headers.get(b"authorization")


def test_our_key_is_changed_for_vllms(make_world: Callable[..., World]) -> None:
    world = make_world("theirs", "another")
    for method, path in (("POST", CHAT), ("GET", "/v1/models")):
        world.call(path, asked(), method=method, key=OUR_KEY)
        assert authorization(world) == "Bearer theirs"
        world.call(path, asked(), method=method, key="another")
        assert authorization(world) == "Bearer another"


def test_without_a_key_of_vllms_ours_is_passed_on(world: World) -> None:
    world.call(CHAT, asked(), key=OUR_KEY)
    assert authorization(world) == f"Bearer {OUR_KEY}"
    world.call(CHAT, asked())
    assert authorization(world) is None


def test_where_vllm_has_a_key_no_post_is_open(make_world: Callable[..., World]) -> None:
    world = make_world("theirs")
    for path in (CHAT, "/tokenize", "/invocations"):
        for key in (None, "wrong"):
            reply = world.call(path, asked(), key=key)
            assert (reply.status, reply.json["error"]["type"]) == (401, "Unauthorized")
        assert world.call(path, asked(), key="theirs").status == 200
    assert world.call("/v1/models", method="GET").status == 200  # vLLM's to refuse
    assert len(world.engine.scopes) == 4


def test_what_changes_the_engine_needs_our_key(make_world: Callable[..., World]) -> None:
    for world in (make_world(), make_world("theirs")):
        assert world.call("/scale_elastic_ep", key="theirs").status == 401
        assert world.call("/scale_elastic_ep", key=OUR_KEY).status == 200


@pytest.mark.parametrize(
    ("path", "ours"),
    [
        ("/train", True),
        ("/v1/train/status", True),
        ("/v1/checkpoint", True),
        ("/checkpoint", True),
        ("/v1/lessons/0001/keep", True),
        ("/v1/wiring", True),
        ("/v1/health", True),
        ("/health", False),
        ("/lessons", False),
        ("/v1/models", False),
        ("/v1/training", False),
        ("/v1/chat/completions", False),
        ("/v2/train", False),
    ],
)
def test_which_paths_are_ours(path: str, ours: bool) -> None:
    assert (OURS.fullmatch(path) is not None) == ours


def test_our_routes_run_on_a_thread_of_their_own(world: World) -> None:
    reply = world.call("/v1/train", b'{"a": "gr\xc3\xbc\xc3\x9fe"}')
    assert (reply.status, reply.json) == (200, {"a": "grüße"})
    assert world.threads == {"secondnature-routes"}
    assert world.engine.scopes == []
    assert world.loads == []


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b'{"wrong": true}', 400, "BadInput"),
        (b'{"teapot": true}', 418, "BadInput"),
        (b"{", 400, "BadInput"),
        (b'{"bug": true}', 500, "SecondnatureError"),
        (b'"' + b"a" * MAX_BODY + b'"', 413, "TooLarge"),
    ],
)
def test_errors_of_our_routes_are_told_whole(world: World, body: bytes, status: int, kind: str) -> None:
    reply = world.call("/v1/train", body)
    assert (reply.status, reply.json["error"]["type"]) == (status, kind)
    assert world.call("/v1/train", b'{"a": 1}').json == {"a": 1}  # and it goes on


def test_who_leaves_before_the_end_of_the_body_is_not_answered(world: World) -> None:
    assert world.call("/v1/train", b'{"a": 1}', cut=1).events == [{"status": 0, "headers": []}]
    assert world.threads == set()


# ------------------------------------------------------------------------------------------ load, lifespan


def test_the_load_is_counted_and_goes_back_to_nothing(world: World) -> None:
    world.call(CHAT, asked())
    assert world.loads == [1, 0]
    world.call("/v1/models", method="GET")
    assert world.loads == [1, 0]
    world.engine.fails = True
    with pytest.raises(RuntimeError, match="gone"):
        world.call(CHAT, asked())
    assert world.loads == [1, 0, 1, 0]


def test_a_request_that_is_cancelled_is_no_load(world: World) -> None:
    async def main() -> None:
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}

        async def never() -> Event:
            await asyncio.sleep(3600)
            raise AssertionError

        async def send(_: Event) -> None: ...

        task = asyncio.ensure_future(world.door(scope, never, send))
        await asyncio.sleep(0.01)
        assert world.loads == [1]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert world.loads == [1, 0]


def test_the_life_of_the_server_is_told(world: World) -> None:
    seen: list[str] = []

    async def main() -> None:
        messages = ["lifespan.startup", "lifespan.shutdown"]

        async def receive() -> Event:
            assert world.told == ([] if len(messages) == 2 else ["startup"])
            return {"type": messages.pop(0)}

        async def send(message: Event) -> None:
            seen.append(message["type"])

        await world.door({"type": "lifespan"}, receive, send)

    asyncio.run(main())
    assert world.told == ["startup", "shutdown"]
    assert seen == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


@pytest.mark.parametrize(
    ("path", "is_ours"),
    [
        ("/v1/chat/completions/chatcmpl-1", True),
        ("/v1/chat/completions/batch", False),
        ("/v1/chat/completions", False),
        ("/v1/chat/completions/chatcmpl-1/messages", False),
        ("/v1/corrections/cor-1", True),
        ("/v1/responses", False),
    ],
)
def test_what_vllm_has_is_left_to_it(path: str, is_ours: bool) -> None:
    assert bool(OURS.fullmatch(path)) == is_ours
