"""Every HTTP and ZMQ message, and the client (any process).

HTTP bodies are pydantic models (the OpenAPI document is made from them); ZMQ messages are msgspec structs in
msgpack, tagged by name: nothing is ever unpickled. `Client` is the one way in which our own programs talk to a
server, so that the CLI, the tests and the users go through the same door.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Literal, Self, cast

import httpx2
import msgspec
from pydantic import BaseModel, ConfigDict, Field, model_validator

from secondnature import errors
from secondnature.records import (
    Correction,
    ErrorInfo,
    Evidence,
    Example,
    GateSettings,
    KlSet,
    Lesson,
    LessonState,
    Message,
    Name,
    OptimizerSettings,
    Probe,
    Prompt,
    Text,
    TokenIds,
    Unicode,
)

# --------------------------------------------------------------------------------------------- HTTP: bodies


class Body(BaseModel):
    """Base of our own bodies: an unknown field is an error that names it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Objective = Literal["sft", "orpo", "dpo", "dpop", "sdft"]
ReplayMatch = Literal["answer", "distribution"]
Stop = Annotated[list[Annotated[Unicode, Field(min_length=1, max_length=200)]], Field(max_length=16)]
Layout = Literal["transformers", "vllm"]
"""Whose names and shapes the tensors of an arena have."""
BIG = 2**62


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class _Sampling(BaseModel):
    """Fields that both kinds of completion share. What OpenAI clients may send besides is accepted and ignored
    only where ignoring it cannot change the answer; `n > 1`, `tools` and penalties are refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[Unicode, Field(max_length=500)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=-BIG, le=BIG)] | None = None
    stop: Annotated[Unicode, Field(min_length=1, max_length=200)] | Stop | None = None
    n: Literal[1] = 1
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    user: Annotated[Unicode, Field(max_length=500)] | None = None
    metadata: dict[Unicode, Unicode] | None = None
    cache_salt: Annotated[Unicode, Field(max_length=500)] | None = None

    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class ChatCompletionRequest(_Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionRequest(_Sampling):
    """`POST /v1/completions`: text or token ids."""

    prompt: (
        Annotated[Unicode, Field(min_length=1, max_length=2_000_000)]
        | Annotated[TokenIds, Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False


class FeedbackRequest(Body):
    """`POST /v1/feedback`: what the user thinks of a completion."""

    completion_id: Annotated[Unicode, Field(min_length=1, max_length=200)]
    rating: Annotated[int, Field(ge=-1, le=1)] | None = None
    corrected: Annotated[Text, Field(min_length=1)] | None = None
    text: Annotated[Text, Field(min_length=1)] | None = None
    """What the user said about the answer."""
    behaviour: Name | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.rating is None and self.corrected is None and self.text is None:
            raise ValueError("nothing said: expected at least one of rating, corrected, text")
        return self


class FeedbackReply(Body):
    """The correction's id, after it is durable."""

    id: str
    correction: Correction


class CorrectionsReply(Body):
    """`GET /v1/corrections`, and the answer to an import."""

    corrections: list[Correction]


class ImportRequest(Body):
    """`POST /v1/corrections`: an import; all of it or nothing."""

    corrections: Annotated[list[Correction], Field(min_length=1, max_length=10_000)]


class ReplaySettings(Body):
    """What is mixed in against forgetting."""

    share: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.25
    """Share of replayed examples in a batch, which has at most 4096 examples, replay included."""
    match: ReplayMatch | None = None
    """`answer`: replay is trained on like the new examples. `distribution`: replay gives no gradient until the
    model drifts from what it said before the lesson, then KL(before || now) pulls it back; all `max_steps` are
    made, unless `until_margin` or `until_passed` is reached. Default: `answer` for `examples` and lessons,
    `distribution` for the model's own answers to `prompts`."""
    weight: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] = 1.0
    """Of the KL, beside the loss of the new examples. Used with `distribution` only."""
    examples: Annotated[list[Correction], Field(max_length=10_000)] = []
    """General examples of the user (`chosen` is the wanted answer)."""
    prompts: Annotated[list[Prompt], Field(max_length=10_000)] = []
    """General prompts: the model's own answers to them, sampled before the first write, are replayed."""
    temperature: Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)] = 0.0
    """Of those answers; 0: greedy."""
    lessons: bool = True
    """Also replay the corrections of earlier kept lessons; those without a written answer as `prompts`."""


class SdftSettings(Body):
    """Self-distillation: the model with the user's comment in its context teaches the model without it."""

    samples: Annotated[int, Field(ge=1, le=32)] = 4
    """Answers sampled per correction, before the first write."""
    temperature: Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)] = 1.0
    """Of the samples; 0: greedy, all of a correction alike."""


class LessonInfo(Body):
    """What a lesson is about."""

    behaviour: Name | None = None
    note: Annotated[Unicode, Field(max_length=2000)] = ""


class TrainRequest(Body):
    """`POST /v1/train`. Exactly one source: `examples`, `corrections` or `ledger: true`."""

    examples: Annotated[list[Example], Field(min_length=1, max_length=10_000)] | None = None
    corrections: Annotated[list[Correction], Field(min_length=1, max_length=10_000)] | None = None
    ledger: bool = False
    objective: Objective | None = None
    """Default: `orpo` where every example has a rejected answer, else `sft`. `sdft` learns from `feedback`, without
    a written answer."""
    sdft: SdftSettings = SdftSettings()
    epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Passes over the examples. Default 1, or as many as `max_steps` asks for."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 8
    max_steps: Annotated[int, Field(ge=1, le=100_000)] | None = None
    until_margin: Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)] | None = None
    """Stop as soon as the mean margin on the development probes (else the examples) reaches this, in nats."""
    until_passed: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """Stop as soon as this share of the development probes has the wanted answer as its greedy one. With
    `until_margin`: both."""
    learned_loss: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 1e-3
    """Examples below this loss, nats per token, give no gradient: an answer can be the greedy one long before it
    is certain, and every step beyond that costs elsewhere."""
    look_every: Annotated[int, Field(ge=1, le=1000)] = 1
    """Steps between two looks at the margins."""
    development: Annotated[list[Probe], Field(max_length=1000)] = []
    """Probes with `prefers` that are looked at while training; never those of the gate."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    replay: ReplaySettings = ReplaySettings()
    dry_run: bool = False
    """Check and plan everything, write nothing."""
    keep: bool = False
    """Keep at once, unjudged. Not together with `probes`."""
    probes: Annotated[list[Probe], Field(max_length=20_000)] = []
    gate: GateSettings = GateSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    lesson: LessonInfo = LessonInfo()

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        given = [
            k for k, v in (("examples", self.examples), ("corrections", self.corrections)) if v is not None
        ]
        given += ["ledger"] if self.ledger else []
        if len(given) != 1:
            raise ValueError(
                f"found {given or 'no source'}; expected one of examples, corrections, ledger: true"
            )
        if self.keep and self.probes:
            raise ValueError("found both `keep` and `probes`; with probes the gate decides")
        if self.objective in ("orpo", "dpo", "dpop") and self.examples is not None:
            missing = [i for i, e in enumerate(self.examples) if e.rejected_ids is None]
            if missing:
                raise ValueError(f"`{self.objective}` needs rejected_ids; missing in example {missing[0]}")
        if self.objective == "sdft" and self.examples is not None:
            raise ValueError(
                "`sdft` learns from what the user said; token-id `examples` have no `feedback`: send `corrections`"
            )
        if self.until_passed is not None and not any(p.side == "right" for p in self.development):
            raise ValueError("`until_passed` needs `development` probes of the side `right`")
        for i, probe in enumerate(self.development):
            if probe.check.prefers is None:
                raise ValueError(f"development probe {i} has no `prefers`; the trainer looks at margins only")
        if self.probes and self.lesson.behaviour is None:
            raise ValueError("`probes` need `lesson.behaviour`: it says which probes must improve")
        return self


class TrainReply(Body):
    """202: accepted; `plan` says what a dry run found."""

    job: str
    lesson: str | None = None
    state: LessonState | Literal["planned"]
    plan: dict[str, Any] | None = None


class JobStatus(Body):
    """`GET /v1/train/status?job=`."""

    job: str
    lesson: str
    state: LessonState
    phase: str = ""
    """What is being done: waiting, measuring before, training, measuring after, ..."""
    step: int = 0
    steps: int = 0
    loss: float | None = None
    losses: list[float] = []
    tokens_per_s: float | None = None
    eta_s: float | None = None
    kl: dict[KlSet, float] = {}
    """After training: KL(before || after) on the new and on replayed prompts, nats per token."""
    weights_version: str
    evidence: Evidence | None = None
    error: ErrorInfo | None = None


class JobList(Body):
    """`GET /v1/train/status` without a job."""

    jobs: list[JobStatus]


class LessonList(Body):
    """`GET /v1/lessons`: oldest first."""

    lessons: list[Lesson]
    weights_version: str
    optimizer_version: str | None = None
    """Content id of the optimizer's state; None before the first kept lesson."""
    trial: bool = False


class LessonDetail(Body):
    """`GET /v1/lessons/{id}`: all that lies in the lesson's directory but the weights."""

    lesson: Lesson
    evidence: Evidence | None = None
    corrections: list[Correction] = []
    metrics: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []


class CheckpointReply(Body):
    """`POST /v1/checkpoint` and `GET /v1/checkpoint`."""

    path: str
    weights_version: str
    """The version that the files hold."""
    current: bool
    """Whether that is the version being served."""
    saved_at: datetime | None = None


class ErrorReply(Body):
    """Every error answer: found / expected in the message, what to do in the hint."""

    error: ErrorInfo


class Health(Body):
    """`GET /v1/health` (with the local engine also `/health`)."""

    status: Literal["ok", "degraded"]
    model: str
    weights_version: str
    trial: bool
    trainer: Literal["ready", "starting", "busy", "down"]
    detail: str = ""


class Wiring(Body):
    """`GET /v1/wiring`: what the running engine computes with."""

    engine: Literal["local", "vllm"]
    engine_version: str
    """Of vLLM, or of transformers."""
    tensors: int
    """Parameters of the engine's model."""
    aliased: int
    """Of these, how many are the arena's memory."""
    nbytes: int
    """Size of the arena."""
    writes: int
    """In-place writes since the start; never goes back."""
    cache: Literal["none", "off", "salted", "unsalted"]
    """The prefix cache: there is none, it is off, or its blocks are salted with the epoch."""
    problems: list[str]
    """What does not hold; empty where all is well."""


# ---------------------------------------------------------------------------------------------- ZMQ: structs


class Attach(msgspec.Struct, tag="attach", frozen=True):
    """Server -> trainer: map these weights."""

    manifest: str
    model_dir: str
    threads: int
    layout: Layout = "transformers"
    share: float = 1.0
    """Of the time, while requests are being answered, that the trainer may work."""


class Work(msgspec.Struct, tag="work", frozen=True):
    """One example in token ids."""

    context: list[int]
    continuation: list[int]
    rejected: list[int] | None = None
    weight: float = 1.0
    label: str = ""
    """How an error names it: `correction 3`, `replay 12`."""
    teacher: list[int] | None = None
    """SDFT: the context in which the teacher reads the continuation."""
    hold: bool = False
    """Replay by distribution: held to what the model said before, not trained on."""


class Look(msgspec.Struct, tag="look", frozen=True):
    """One development probe: the margin of `wanted` over `unwanted` after `context`."""

    context: list[int]
    wanted: list[int]
    unwanted: list[int]
    side: str


class Train(msgspec.Struct, tag="train", frozen=True):
    """Server -> trainer: one job."""

    job: str
    lesson: str
    objective: str
    steps: int
    batch_size: int
    seed: int
    examples: list[Work]
    replay: list[Work]
    replay_share: float
    replay_weight: float
    learned_loss: float
    optimizer: dict[str, Any]
    optimizer_in: str | None
    """The state to start from (a file of this home), or None for a fresh one."""
    optimizer_out: str
    development: list[Look]
    until_margin: float | None
    until_passed: float | None
    look_every: int
    kl: dict[str, list[Work]]
    """Prompts with the base's own answers, by set (`new`, `replay`)."""


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """Server -> trainer: stop before the next step."""

    job: str


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """Server -> trainer: end the process."""


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """Trainer -> server: the first word, before anything heavy is imported; `Attach` may be sent now."""

    pid: int


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """Trainer -> server: mapped and checked."""

    pid: int
    num_tensors: int


class Progress(msgspec.Struct, tag="progress", frozen=True):
    """Trainer -> server: one line of metrics.jsonl (`kind`: step, look, kl), or how far a phase is.

    `{"kind": "phase", "phase": a TrainerPhase, "done": n, "total": m}` (0: not known) is news, not a record: it is
    told some times a second at most, and written nowhere.
    """

    job: str
    """Empty while the weights are mapped."""
    metric: dict[str, Any]


TrainerPhase = Literal[
    "mapping the weights",
    "checking the model",
    "loading the optimizer's state",
    "recording answers for the KL",
    "recording replay",
    "reading the teacher",
    "reading references",
    "looking at development probes",
    "training",
    "measuring the KL",
    "saving the optimizer's state",
]
"""What the trainer is doing, in the order in which a lesson comes through; looks come between the steps."""


class Done(msgspec.Struct, tag="done", frozen=True):
    """Trainer -> server: all writes are made, the optimizer's state is on disk."""

    job: str
    steps: int
    loss: float
    kl: dict[str, float]
    moved: list[dict[str, Any]]
    stopped_by: str
    """Why no further step was made: a key of `records.STOPPED_BY`, which has the sentences."""
    optimizer_sha256: str = ""
    """Of the optimizer's state as it lies on disk, 64 hex digits."""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """Trainer -> server: the job ended without a result; the weights need to be made whole."""

    job: str
    error: dict[str, str]


ToTrainer = Attach | Train | Cancel | Shutdown
ToServer = Hello | Ready | Progress | Done | Failed

_encoder = msgspec.msgpack.Encoder()
_to_trainer: msgspec.msgpack.Decoder[ToTrainer] = msgspec.msgpack.Decoder(ToTrainer)
_to_server: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)


def encode(message: ToTrainer | ToServer) -> bytes:
    """A message as msgpack."""
    return _encoder.encode(message)


def decode_for_trainer(data: bytes) -> ToTrainer:
    """What the server sent. Raises BadInput on anything that is not one of our messages."""
    try:
        return _to_trainer.decode(data)
    except msgspec.MsgspecError as e:
        raise errors.BadInput(
            f"not a message for the trainer: {e}", "server and trainer differ in version?"
        ) from None


def decode_for_server(data: bytes) -> ToServer:
    """What the trainer sent. Raises BadInput on anything that is not one of our messages."""
    try:
        return _to_server.decode(data)
    except msgspec.MsgspecError as e:
        raise errors.BadInput(
            f"not a message for the server: {e}", "server and trainer differ in version?"
        ) from None


# ---------------------------------------------------------------------------------------------- the client


ENGINES_OWN = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/models"})
"""What vLLM answers itself, with errors of its own shape."""


def _engines_own_error(status: int, error: Any) -> errors.SecondnatureError:
    """vLLM's `{message, type, param, code}`, or a word, as the error of ours that has this status."""
    said = cast("dict[str, Any]", error) if isinstance(error, dict) else {}
    message = str(said.get("message", error))
    if status == 401:
        return errors.Unauthorized(
            f"the engine's own routes need a key: {message}",
            "set SECONDNATURE_API_KEY, or give vLLM's --api-key",
        )
    if status == 400 and ("max_model_len" in message or "context length" in message):
        return errors.ContextOverflow(message, "ask for less, or start vLLM with a longer --max-model-len")
    kinds: dict[int, type[errors.SecondnatureError]] = {
        400: errors.BadInput,
        404: errors.NotFound,
        422: errors.BadInput,
        429: errors.Busy,
        503: errors.Unreachable,
    }
    return kinds.get(status, errors.SecondnatureError)(message, "the engine said so; see its log")


class Client:
    """Talks to a secondnature server; every answer is a typed record, every error one of `errors`.

    Use as a context manager. `key` is the server's key (`SECONDNATURE_API_KEY`, or `<home>/key`).
    """

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float = 60.0) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.url = url.rstrip("/")
        self._http = httpx2.Client(base_url=self.url, headers=headers, timeout=timeout_s, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def request(self, method: str, path: str, *, body: BaseModel | dict[str, Any] | None = None) -> Any:
        """One call: the decoded JSON answer.

        Raises:
            Unreachable: nobody answers there.
            SecondnatureError: what the server said, as the exception that it was.
        """
        sent: dict[str, Any] = {"json": body}
        if isinstance(body, BaseModel):
            sent = {
                "content": body.model_dump_json(exclude_none=True).encode(),
                "headers": {"content-type": "application/json"},
            }
        try:
            response = self._http.request(method, path, **sent)
        except httpx2.TimeoutException:
            raise errors.Unreachable(
                f"{self.url}{path}: no answer in time", "is the server overloaded?"
            ) from None
        except httpx2.TransportError as e:
            raise errors.Unreachable(f"{self.url}: {e}", "start one with `secondnature serve`") from None
        return self._read(response)

    def _read(self, response: httpx2.Response) -> Any:
        try:
            answer = response.json()
        except ValueError:
            raise errors.Unreachable(
                f"{response.request.url}: status {response.status_code}, not JSON",
                "is that a secondnature server?",
            ) from None
        if response.is_error:
            said = cast("dict[str, Any]", answer) if isinstance(answer, dict) else {}
            error: Any = said.get("error", answer)
            if isinstance(error, dict) and "hint" in error:
                raise errors.from_wire(cast("dict[str, Any]", error))
            if response.request.url.path not in ENGINES_OWN:
                raise self._stranger(response)
            raise _engines_own_error(response.status_code, error)
        return answer

    def _stranger(self, response: httpx2.Response) -> errors.Unreachable:
        """Who answers where one of our routes should: a vLLM without the plug-in, or something else."""
        path = response.request.url.path
        version = self._said("/version", "version")
        if isinstance(version, str) and self._said("/v1/health", "weights_version") is None:
            return errors.Unreachable(
                f"vLLM {version} answers at {self.url} without secondnature",
                "start it with VLLM_PLUGINS=secondnature, or by `secondnature serve --engine vllm`",
            )
        return errors.Unreachable(
            f"{self.url}{path}: status {response.status_code}, not an answer of secondnature",
            "is that a secondnature server, and of this version?",
        )

    def _said(self, path: str, field: str) -> Any:
        """A field of an open route's answer, or None."""
        try:
            found: Any = self._http.get(path).json()
        except (ValueError, httpx2.HTTPError):
            return None
        return cast("dict[str, Any]", found).get(field) if isinstance(found, dict) else None

    def health(self) -> Health:
        """Is it there, and what does it serve?"""
        return Health.model_validate(self.request("GET", "/v1/health"))

    def wiring(self) -> Wiring:
        """Does the engine compute with the memory that lessons are written into?"""
        return Wiring.model_validate(self.request("GET", "/v1/wiring"))

    def complete(self, prompt: str | list[int], **options: Any) -> dict[str, Any]:
        """One completion of a text or of token ids, whole."""
        return self.request("POST", "/v1/completions", body={"prompt": prompt, **options})

    def chat(self, messages: list[dict[str, str]], **options: Any) -> dict[str, Any]:
        """One chat completion, whole."""
        return self.request("POST", "/v1/chat/completions", body={"messages": messages, **options})

    def chat_stream(self, messages: list[dict[str, str]], **options: Any) -> Iterator[dict[str, Any]]:
        """One chat completion, chunk by chunk."""
        body = {"messages": messages, "stream": True, **options}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    self._read(response)
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        chunk = json.loads(line.removeprefix("data: "))
                        if "error" in chunk:
                            raise errors.from_wire(chunk["error"])
                        yield chunk
        except httpx2.TransportError as e:
            raise errors.Unreachable(f"{self.url}: {e}", "is the server still running?") from None

    def feedback(self, body: FeedbackRequest) -> FeedbackReply:
        """Record what the user thinks of a completion; durable when this returns."""
        return FeedbackReply.model_validate(self.request("POST", "/v1/feedback", body=body))

    def corrections(self) -> list[Correction]:
        """The ledger."""
        return CorrectionsReply.model_validate(self.request("GET", "/v1/corrections")).corrections

    def import_corrections(self, corrections: list[Correction]) -> list[Correction]:
        """Add corrections to the ledger, all or none; durable when this returns."""
        body = ImportRequest(corrections=corrections)
        return CorrectionsReply.model_validate(self.request("POST", "/v1/corrections", body=body)).corrections

    def train(self, body: TrainRequest) -> TrainReply:
        """Start a lesson (or plan it: `dry_run`)."""
        return TrainReply.model_validate(self.request("POST", "/v1/train", body=body))

    def status(self, job: str) -> JobStatus:
        """How a job is doing."""
        return JobStatus.model_validate(self.request("GET", f"/v1/train/status?job={job}"))

    def cancel(self, job: str) -> JobStatus:
        """End a job; its writes are undone."""
        return JobStatus.model_validate(self.request("DELETE", f"/v1/train/{job}"))

    def lessons(self) -> LessonList:
        """The log."""
        return LessonList.model_validate(self.request("GET", "/v1/lessons"))

    def lesson(self, lesson_id: str) -> LessonDetail:
        """One lesson, with its evidence and metrics."""
        return LessonDetail.model_validate(self.request("GET", f"/v1/lessons/{lesson_id}"))

    def keep(self, lesson_id: str) -> Lesson:
        """Keep a lesson that is on trial."""
        return Lesson.model_validate(self.request("POST", f"/v1/lessons/{lesson_id}/keep"))

    def revert(self, lesson_id: str) -> Lesson:
        """Undo a lesson to the byte; the entry of the log that says so."""
        return Lesson.model_validate(self.request("POST", f"/v1/lessons/{lesson_id}/revert"))

    def checkpoint(self) -> CheckpointReply:
        """Bring the working copy up to date now."""
        return CheckpointReply.model_validate(self.request("POST", "/v1/checkpoint"))
