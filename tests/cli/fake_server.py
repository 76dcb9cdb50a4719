"""The far side of the wire: a small HTTP server that speaks the bodies of wire.py and does no learning at all.

A job advances by one phase or step with each look at its status, so that the tests wait for nothing.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import BaseModel

from secondnature.errors import (
    ContextOverflow,
    NotFound,
    SecondnatureError,
    TooLarge,
    Unauthorized,
    WrongState,
)
from secondnature.records import (
    Cause,
    Comparison,
    Correction,
    ErrorInfo,
    Evidence,
    Lesson,
    LookMetric,
    utc_now,
)
from secondnature.wire import (
    CheckpointReply,
    CorrectionsReply,
    CorrectionState,
    DeleteReply,
    DevelopmentLook,
    EndToken,
    FeedbackReply,
    FeedbackRequest,
    Health,
    ImportRequest,
    JobStatus,
    LessonDetail,
    LessonList,
    PhaseProgress,
    TrainReply,
    TrainRequest,
    UnreadableLine,
    Wiring,
)

Outcome = Literal["added", "amended", "known"]
KEY = "the-key-of-the-fake"
BEFORE, AFTER = "wbefore", "wafter"
WELL_WIRED = Wiring(
    engine="vllm",
    engine_version="0.32.0",
    tensors=3,
    aliased=3,
    nbytes=4_000_000,
    writes=0,
    cache="salted",
    problems=[],
    ends=[
        EndToken(id=1, text="<|endoftext|>", named_by=["config.json"]),
        EndToken(id=7, text="<|im_end|>", named_by=["the tokenizer", "the chat template"]),
    ],
)


@dataclass
class Fake:
    """What the server knows and how its lessons end."""

    ends: str = "kept"
    """kept, undone, inconclusive, failed, hang (trains until it is cancelled), stuck (not even then)."""
    reaches_at: float = 1e-4
    """The learning rate from which unjudged lessons reach their margin before the last step."""
    ledger: list[Correction] = field(default_factory=list[Correction])
    unreadable: list[UnreadableLine] = field(default_factory=list[UnreadableLine])
    num_torn: int | None = None
    lessons: dict[str, Lesson] = field(default_factory=dict[str, Lesson])
    requests: list[TrainRequest] = field(default_factory=list[TrainRequest])
    looks: dict[str, int] = field(default_factory=dict[str, int])
    calls: list[str] = field(default_factory=list[str])
    keys: list[str | None] = field(default_factory=list[str | None])
    reads_tokens: int = 1000
    flip: bool = False
    """Answer the same words differently every second time."""
    asked: Counter[str] = field(default_factory=Counter[str])
    wiring: Wiring = field(default_factory=lambda: WELL_WIRED)
    deaf: int = 0
    """Lessons that change no log-probability."""
    scar: float = 0.0
    """What an undo leaves, nats."""
    trouble: str = ""
    """Why it is not well; its health says so with a 503."""
    mute: int = 0
    """Training requests that it takes and does not answer."""
    takes_bytes: int | None = None
    """The largest body of an import."""
    plain_vllm: str | None = None
    """Be a vLLM of this version without the plug-in, which guards its routes with a key of its own."""

    plan: dict[str, Any] = field(default_factory=dict[str, Any])
    """What a dry run answers."""

    def train(self, request: TrainRequest) -> TrainReply:
        for lesson in self.lessons.values():
            if lesson.idempotency_key is not None and lesson.idempotency_key == request.idempotency_key:
                return TrainReply(job=lesson.job, lesson=lesson.id, state=lesson.state)
        number = len(self.requests) + 1
        self.requests.append(request)
        if request.dry_run:
            return TrainReply(job="dry-run", state="planned", plan=self.plan)
        name = f"{number:04d}-{request.lesson.behaviour or 'lesson'}"
        self.lessons[name] = Lesson(
            id=name,
            number=number,
            job=f"job-{number}",
            idempotency_key=request.idempotency_key,
            behaviour=request.lesson.behaviour,
            note=request.lesson.note,
            parent=BEFORE,
            cause=Cause(num_examples=1),
            created_at=utc_now(),
        )
        return TrainReply(job=f"job-{number}", lesson=name, state="queued")

    def change(self, lesson: Lesson, **fields: Any) -> Lesson:
        self.lessons[lesson.id] = lesson.model_copy(update=fields)
        return self.lessons[lesson.id]

    def by_job(self, job: str) -> Lesson:
        for lesson in self.lessons.values():
            if lesson.job == job:
                return lesson
        raise NotFound(f"no job {job}")

    def status(self, job: str) -> JobStatus:
        lesson = self.by_job(job)
        request = self.requests[lesson.number - 1]
        steps = request.max_steps or 4
        look = self.looks[job] = self.looks.get(job, 0) + 1
        phase, step = "", 0
        if lesson.state in ("queued", "running"):
            unjudged = not request.probes and not request.keep
            early = unjudged and (request.optimizer.lr or 0) >= self.reaches_at
            last = steps - 1 if early else steps
            if look == 1:
                lesson, phase = self.change(lesson, state="running"), "measuring before"
            elif look - 1 < last or self.ends in ("hang", "stuck"):
                phase, step = "training", min(look - 1, steps - 1)
                lesson = self.change(lesson, state="running", steps=step, loss=1.0 / step)
            elif unjudged and self.ends != "failed":
                phase = "measuring after"
                lesson = self.change(
                    lesson,
                    state="on_trial",
                    steps=last,
                    version=AFTER,
                    trial_until=utc_now(),
                    stopped_by="until_margin" if early else "max_steps",
                )
            else:
                lesson = self.finish(lesson, steps)
        elif lesson.state == "on_trial":
            phase = "on trial"
        return JobStatus(
            job=job,
            lesson=lesson.id,
            state=lesson.state,
            phase=phase,
            step=step,
            steps=steps,
            loss=lesson.loss,
            progress=PhaseProgress(done=step, total=steps, unit="steps", per_s=0.5, eta_s=3.0)
            if phase == "training"
            else None,
            eta_s=3.0 if phase == "training" else None,
            look=DevelopmentLook(
                step=step, passed={"right": 1, "other": 2}, asked={"right": 4, "other": 3}, lost=1
            )
            if phase == "training"
            else None,
            stopped_by=lesson.stopped_by,
            weights_version=AFTER if lesson.state in ("kept", "on_trial") else BEFORE,
            error=lesson.error,
        )

    def finish(self, lesson: Lesson, steps: int) -> Lesson:
        if self.ends == "failed":
            error = ErrorInfo(type="NonFinite", message="loss is nan in correction 2", hint="lower the rate")
            return self.change(lesson, state="failed", error=error)
        state = "kept" if self.ends == "kept" else "undone"
        return self.change(
            lesson,
            state=state,
            verdict=self.ends,
            steps=steps,
            kl={"new": 0.75, "replay": 0.002},
            version=AFTER,
            ended_at=utc_now(),
        )

    def evidence(self, lesson: Lesson) -> Evidence | None:
        if lesson.verdict is None:
            return None
        gain = Comparison(
            name=lesson.behaviour or "x",
            role="gain",
            n=60,
            num_seeds=20,
            before=6,
            after=54,
            gains=48,
            losses=0,
            before_interval=(0.04, 0.2),
            after_interval=(0.79, 0.96),
            alpha=0.025,
            method="mcnemar-midp/1",
            p=1e-9,
            passed=True,
        )
        return Evidence(
            verdict=lesson.verdict,
            sentence=f"The fake says {lesson.verdict}.",
            before_version=BEFORE,
            after_version=AFTER,
            comparisons=[gain],
            alpha=0.025,
            probes_sha256="0" * 64,
            created_at=utc_now(),
        )

    def detail(self, name: str) -> LessonDetail:
        if name not in self.lessons:
            raise NotFound(f"no lesson {name}", "see `secondnature lessons log`")
        lesson = self.lessons[name]
        look = LookMetric(
            step=lesson.steps, margins={"right": [0.1]}, passed={"right": 0.75}, asked={"right": 4}
        ).model_dump(mode="json")
        return LessonDetail(lesson=lesson, evidence=self.evidence(lesson), metrics=[look])

    def decide(self, name: str, what: str) -> Lesson:
        lesson = self.detail(name).lesson
        if what == "keep":
            if lesson.state != "on_trial":
                raise WrongState(f"{name} is {lesson.state}; expected on_trial", "only a trial can be kept")
            return self.change(lesson, state="kept")
        if lesson.state == "kept":
            entry = lesson.model_copy(update={"id": f"9{name}", "kind": "revert", "reverts": name})
            self.change(lesson, reverted_by=entry.id)
            return entry
        return self.change(lesson, state="undone")

    def complete(self, prompt: list[int]) -> dict[str, Any]:
        """Log-probabilities of a prompt: others while a lesson is on trial."""
        trial = any(x.state == "on_trial" for x in self.lessons.values())
        heard = trial and len(self.lessons) > self.deaf
        logprob = -1.0 - heard - (self.scar if self.lessons and not trial else 0.0)
        logprobs = {"token_logprobs": [None] + [logprob] * (len(prompt) - 1)}
        stamp = {"weights_version": AFTER if trial else BEFORE, "trial": trial}
        return {"id": "cmpl-1", "choices": [{"text": "", "logprobs": logprobs}], **stamp}

    def cancel(self, job: str) -> JobStatus:
        if self.ends != "stuck":
            self.change(self.by_job(job), state="cancelled")
        return self.status(job)


def feedback(fake: Fake, body: dict[str, Any]) -> FeedbackReply:
    request = FeedbackRequest.model_validate(body)
    data: dict[str, Any] = {"prompt": "a question", "rating": request.rating, "feedback": request.text}
    data |= {"chosen": request.corrected, "completion_id": request.completion_id}
    correction = Correction.model_validate({k: v for k, v in data.items() if v is not None})
    fake.ledger.append(correction)
    identifier = f"c{len(fake.ledger)}"
    state = CorrectionState(id=identifier, state="waiting")
    return FeedbackReply(id=identifier, correction=correction, outcome="added", state=state)


def take(fake: Fake, body: Any, size: int) -> CorrectionsReply:
    """An import: what is there already is known by its id, or by what it says."""
    if fake.takes_bytes is not None and size > fake.takes_bytes:
        raise TooLarge(f"{size} bytes", "send less at once")
    outcomes: list[Outcome] = []
    for c in ImportRequest.model_validate(body).corrections:
        at = next((i for i, x in enumerate(fake.ledger) if x.id == c.id), None)
        if at is not None:
            fake.ledger[at] = c
            outcomes.append("amended")
        elif any(x.identity() == c.identity() for x in fake.ledger):
            outcomes.append("known")
        else:
            fake.ledger.append(c.model_copy(update={"id": f"cor-{len(fake.ledger)}"}))
            outcomes.append("added")
    return CorrectionsReply(corrections=fake.ledger, outcomes=outcomes)


def delete(fake: Fake, identifier: str) -> DeleteReply:
    fake.ledger[:] = [c for c in fake.ledger if c.id != identifier]
    return DeleteReply(id=identifier, lessons=[])


def answer(fake: Fake, method: str, path: str, query: dict[str, list[str]], body: Any) -> BaseModel:
    """One route's answer."""
    match (method, path.strip("/").split("/")):
        case ("GET", ["v1", "health"]):
            status = "degraded" if fake.trouble else "ok"
            found = {"status": status, "model": "fake", "weights_version": BEFORE, "detail": fake.trouble}
            return Health.model_validate({**found, "trial": False, "trainer": "ready"})
        case ("GET", ["v1", "wiring"]):
            return fake.wiring
        case ("POST", ["v1", "train"]):
            return fake.train(TrainRequest.model_validate(body))
        case ("GET", ["v1", "train", "status"]):
            return fake.status(query["job"][0])
        case ("DELETE", ["v1", "train", job]):
            return fake.cancel(job)
        case ("GET", ["v1", "corrections"]):
            return CorrectionsReply(
                corrections=fake.ledger, num_torn=fake.num_torn, unreadable=fake.unreadable or None
            )
        case ("POST", ["v1", "corrections"]):
            return take(fake, body, len(json.dumps(body)))
        case ("DELETE", ["v1", "corrections", identifier]):
            return delete(fake, identifier)
        case ("POST", ["v1", "feedback"]):
            return feedback(fake, body)
        case ("GET", ["v1", "lessons"]):
            return LessonList(lessons=list(fake.lessons.values()), weights_version=BEFORE)
        case ("GET", ["v1", "lessons", name]):
            return fake.detail(name)
        case ("POST", ["v1", "lessons", name, ("keep" | "revert") as what]):
            return fake.decide(name, what)
        case ("POST", ["v1", "checkpoint"]):
            return CheckpointReply(path="/home/model/current", weights_version=BEFORE, current=True)
        case _:
            raise NotFound(f"no route {method} {path}")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: Fake

    def _handle(self) -> None:
        url = urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.fake.calls.append(f"{self.command} {url.path}")
        key = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        self.fake.keys.append(key or None)
        try:
            body: Any = json.loads(raw) if raw else None
            if self.fake.plain_vllm is not None:
                return self._be_plain_vllm(url.path)
            if url.path == "/v1/chat/completions":
                return self._chat(body)
            if url.path == "/v1/completions":
                return self._send(200, json.dumps(self.fake.complete(body["prompt"])).encode())
            if url.path != "/v1/health" and key != KEY:
                raise Unauthorized("wrong key", "set SECONDNATURE_API_KEY")
            reply = answer(self.fake, self.command, url.path, parse_qs(url.query), body)
            if isinstance(reply, TrainReply) and self.fake.mute:
                self.fake.mute -= 1
                self.close_connection = True
                return None
            unwell = isinstance(reply, Health) and reply.status != "ok"
            self._send(503 if unwell else 200, reply.model_dump_json().encode())
        except SecondnatureError as e:
            self._send(e.status, json.dumps({"error": e.to_wire()}).encode())

    do_GET = do_POST = do_DELETE = _handle

    def _send(self, status: int, data: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _be_plain_vllm(self, path: str) -> None:
        if path == "/version":
            return self._send(200, json.dumps({"version": self.fake.plain_vllm}).encode())
        if path.startswith("/v1/") and self.headers.get("authorization") != f"Bearer {KEY}":
            return self._send(401, b'{"error": "Unauthorized"}')
        if path in ("/v1/completions", "/v1/chat/completions"):
            said = {
                "message": "max_tokens=9 cannot be greater than max_model_len=8.",
                "type": "BadRequestError",
            }
            return self._send(
                400, json.dumps({"error": {**said, "param": "max_tokens", "code": 400}}).encode()
            )
        return self._send(404, b'{"detail": "Not Found"}')

    def _chat(self, body: Any) -> None:
        said = body["messages"][-1]["content"]
        if said == "too long" or body.get("max_tokens", 0) > self.fake.reads_tokens:
            raise ContextOverflow("9 tokens; at most 8", "shorten the prompt")
        words = ["you", " said ", said]
        self.fake.asked[said] += 1
        if self.fake.flip and self.fake.asked[said] % 2 == 0:
            words = ["no"]
        stamp = {"id": "chatcmpl-1", "weights_version": AFTER, "trial": True}
        if not body.get("stream"):
            message = {"role": "assistant", "content": "".join(words)}
            return self._send(200, json.dumps({**stamp, "choices": [{"message": message}]}).encode())
        chunks = [{"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"content": w}}]} for w in words]
        lines = [f"data: {json.dumps(c)}\n\n" for c in (*chunks, {**stamp, "choices": []})]
        return self._send(200, "".join([*lines, "data: [DONE]\n\n"]).encode(), "text/event-stream")

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def serve(fake: Fake) -> tuple[str, Callable[[], None]]:
    """Start serving in a thread: the URL, and what stops it."""
    handler = type("BoundHandler", (Handler,), {"fake": fake})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return f"http://127.0.0.1:{server.server_port}", stop
