"""The bodies of HTTP, in both directions (any process). The OpenAPI document is made from them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from secondnature.records import (
    Correction,
    ErrorInfo,
    Evidence,
    Example,
    GateSettings,
    GuardPack,
    KlSet,
    Lesson,
    LessonState,
    LookMetric,
    Name,
    OptimizerSettings,
    Probe,
    Prompt,
    Side,
    Text,
    Unicode,
    guard_name,
)
from secondnature.wire.completions import ChatMessage, with_plain_messages


class Body(BaseModel):
    """Base of our own bodies: an unknown field is an error that names it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Objective = Literal["sft", "orpo", "dpo", "dpop", "sdft"]
ReplayMatch = Literal["answer", "distribution"]
AsSent = Annotated[Correction, BeforeValidator(with_plain_messages)]


def _without_prefix(value: Any) -> Any:
    return value.removeprefix("pack:") if isinstance(value, str) else value


NamedPack = Annotated[GuardPack, BeforeValidator(_without_prefix)]
Identifier = Annotated[Unicode, Field(min_length=1, max_length=200)]


class FeedbackRequest(Body):
    """`POST /v1/feedback`: what the user thinks of an answer. Sent again, it amends: what is sent replaces, what is
    not sent stays, null takes back; where the rating turns round, what was said before it no longer counts."""

    completion_id: Identifier | None = None
    """Of the answer; known from its first chunk on."""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)] | None = None
    """Instead: the conversation, with or without the answer at its end. The server knows what it answered; an
    answer that is not the one it gave was edited, and is what was wanted. Where the client had shown the model more
    than the user wrote (files, search results), the answer as it was given says which it is."""
    id: Identifier | None = None
    """Of the correction: the client's own name for it, or that of one to amend, which needs no more."""
    rating: Annotated[int, Field(ge=-1, le=1)] | None = None
    corrected: Annotated[Text, Field(min_length=1)] | None = None
    text: Annotated[Text, Field(min_length=1)] | None = None
    """What the user said about the answer."""
    behaviour: Name | None = None
    source: Annotated[Unicode, Field(min_length=1, max_length=1000)] | None = None
    """The application in which it was said."""
    conversation_id: Identifier | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        sayings = ("rating", "corrected", "text")
        takes_back = self.id is not None and bool({*sayings} & self.model_fields_set)
        if not takes_back and all(getattr(self, x) is None for x in sayings):
            raise ValueError("nothing said: expected at least one of rating, corrected, text")
        if self.completion_id is not None and self.messages is not None:
            raise ValueError("found both `completion_id` and `messages`; expected one of them")
        if self.completion_id is None and self.messages is None and self.id is None:
            raise ValueError("about what? expected `completion_id` or `messages`")
        return self


class MetadataRequest(BaseModel):
    """`POST /v1/chat/completions/{id}`, OpenAI's update of a stored completion. `rating`, `corrected`, `text` and
    `behaviour` are feedback, as in `POST /v1/feedback`; whatever else is there is left alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metadata: dict[Unicode, Unicode]

    def feedback(self, completion_id: str) -> FeedbackRequest:
        """The feedback in it. Raises ValidationError."""
        known = {k: v for k, v in self.metadata.items() if k in ("rating", "corrected", "text", "behaviour")}
        return FeedbackRequest.model_validate({"completion_id": completion_id, **known})

    @model_validator(mode="after")
    def _is_feedback(self) -> Self:
        self.feedback("it")
        return self


class CorrectionState(Body):
    """What has become of a correction of the ledger."""

    id: str
    state: Literal["waiting", "taught", "candidate", "nothing_to_teach", "cannot_be_taught"]
    """`waiting` for a lesson. `nothing_to_teach`: praise, or a rating alone."""
    reason: str | None = None
    """Why it cannot be taught."""
    lessons: list[str] = []
    """Lessons in force that taught it as it is."""
    lessons_before: list[str] = []
    """Lessons in force that taught it as it was before it was amended, or that taught what is deleted now."""
    num_amended: int = 0


Outcome = Literal["added", "amended", "known"]


class FeedbackReply(Body):
    """The correction's id, after it is durable."""

    id: str
    correction: Correction
    outcome: Outcome
    """`known`: it says what is there already, and nothing was written."""
    state: CorrectionState


class DeleteReply(Body):
    """`DELETE /v1/corrections/{id}`: it is taught no more."""

    id: str
    lessons: list[str]
    """Lessons in force that taught it; they stay until they are reverted."""


class UnreadableLine(Body):
    """A whole line of the ledger that this version cannot read; it stays in the file."""

    line: int
    """Its number in ledger.jsonl, from 1 on."""
    reason: str


class CorrectionsReply(Body):
    """`GET /v1/corrections`, and the answer to an import."""

    corrections: list[Correction]
    outcomes: list[Outcome] | None = None
    """Of an import: what became of each."""
    states: list[CorrectionState] | None = None
    """Of each, where that was asked for; of an import always."""
    num_torn: int | None = None
    """1: the ledger ended with half a line, which a crash tore before it was acknowledged."""
    unreadable: list[UnreadableLine] | None = None
    """Lines that are not among `corrections`, because a newer version or a hand wrote them."""


class ImportRequest(Body):
    """`POST /v1/corrections`: an import; all of it or nothing."""

    corrections: Annotated[list[AsSent], Field(min_length=1, max_length=10_000)]
    """Their turns may be messages as clients send them: text parts, `refusal: null`, `developer`."""


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
    corrections: Annotated[list[AsSent], Field(min_length=1, max_length=10_000)] | None = None
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
    """Stop as soon as this share of the development probes of the side `right` passes. Those with `prefers` pass
    when the wanted answer is, token by token, the greedy one; the others are answered by the serving engine between
    two steps, and checked. With `until_margin`: both."""
    learned_loss: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 1e-3
    """Examples below this loss, nats per token, give no gradient: an answer can be the greedy one long before it
    is certain, and every step beyond that costs elsewhere."""
    look_every: Annotated[int, Field(ge=1, le=1000)] = 1
    """Steps between two looks at the development probes; one is made before the first step, one after the last."""
    development: Annotated[list[Probe], Field(max_length=1000)] = []
    """Probes that are looked at while training, with any check; never those of the gate. With neither
    `until_passed` nor `until_margin`, what is answered is only shown. Otherwise training stops, too, where more
    than half of the `other` probes whose answers passed before the first step fail."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    replay: ReplaySettings = ReplaySettings()
    dry_run: bool = False
    """Check and plan everything, write nothing."""
    keep: bool = False
    """Keep at once, unjudged. Not together with `probes`."""
    probes: Annotated[list[Probe], Field(max_length=20_000)] = []
    guards: Annotated[list[NamedPack], Field(max_length=5)] = []
    """Shipped packs of guards that are asked too (`pack:facts`): who sends no probes gets a verdict by them alone,
    kept where what is taught is answered as wanted and the guards hold. What the lesson teaches is left out."""
    prompting: bool = True
    """Ask the probes of what is taught once more, before the lesson, with the corrections in the question: what
    prompting alone would do, for the report."""
    gate: GateSettings = GateSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    lesson: LessonInfo = LessonInfo()
    idempotency_key: Annotated[Unicode, Field(min_length=1, max_length=200)] | None = None
    """Sent twice, a request with the same key starts one lesson: the second answer names the first one's."""

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
        if self.keep and (self.probes or self.guards):
            given = "probes" if self.probes else "guards"
            raise ValueError(f"found both `keep` and `{given}`; with {given} the gate decides")
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
        if self.probes and self.lesson.behaviour is None:
            raise ValueError("`probes` need `lesson.behaviour`: it says which probes must improve")
        self._has_margins_of_guards()
        return self

    def _has_margins_of_guards(self) -> None:
        """Raises ValueError: a margin for a guard that is not asked, perhaps misspelled."""
        margins = self.gate.guard_margin
        guards = {p.behaviour for p in self.probes if p.behaviour != self.lesson.behaviour}
        guards |= {guard_name(pack) for pack in self.guards}
        unknown = sorted(set(margins) - guards) if isinstance(margins, dict) else []
        if unknown:
            raise ValueError(
                f"`gate.guard_margin` names `{unknown[0]}`; the guards are: {', '.join(sorted(guards)) or 'none'}"
            )


class PassedOver(Body):
    """A correction of the ledger that cannot be taught to this model."""

    id: str
    reason: str


class TrainReply(Body):
    """202: accepted; `plan` says what a dry run found."""

    job: str
    lesson: str | None = None
    state: LessonState | Literal["planned"]
    plan: dict[str, Any] | None = None


class PhaseProgress(Body):
    """How far a phase is."""

    done: int
    total: int
    unit: str
    """Of both: `probes`, `steps`, `tensors`, ..."""
    per_s: float | None = None
    """None: nothing is done yet."""
    eta_s: float | None = None


class DevelopmentLook(Body):
    """How many development probes passed at a look, by side."""

    step: int
    """After which it was made; 0: before any."""
    passed: dict[Side, int]
    asked: dict[Side, int]
    lost: int = 0
    """Of the side `other`: passed at step 0, and fail now."""

    @classmethod
    def of(cls, look: LookMetric) -> Self:
        """What a look's line in metrics.jsonl says."""
        passed: dict[Side, int] = {
            side: round(num * (look.passed.get(side) or 0.0)) for side, num in look.asked.items()
        }
        return cls(step=look.step, passed=passed, asked=look.asked, lost=len(look.lost))


class JobStatus(Body):
    """`GET /v1/train/status?job=`."""

    job: str
    lesson: str
    state: LessonState
    phase: str = ""
    """What is being done: waiting, measuring before, training, measuring after, ..."""
    progress: PhaseProgress | None = None
    """Of this phase; None where it cannot be counted."""
    step: int = 0
    steps: int = 0
    loss: float | None = None
    losses: list[float] = []
    """Of the steps after `?after=` (without it the last 100), while the job lives; metrics.jsonl has them all."""
    tokens_per_s: float | None = None
    look: DevelopmentLook | None = None
    """The last one at the development probes, while the job lives; metrics.jsonl has them all."""
    eta_s: float | None = None
    """Until this phase ends."""
    stopped_by: str = ""
    """Why training stopped."""
    kl: dict[KlSet, float] = {}
    """After training: KL(before || after) on the new and on replayed prompts, nats per token."""
    weights_version: str
    evidence: Evidence | None = None
    error: ErrorInfo | None = None
    num_passed_over: int = 0
    """Corrections of the ledger that cannot be taught to this model."""
    passed_over: list[PassedOver] = []
    """The first hundred of them."""


class JobList(Body):
    """`GET /v1/train/status` without a job."""

    jobs: list[JobStatus]


class LessonList(Body):
    """`GET /v1/lessons`: oldest first, without `moved`."""

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
    metrics_skipped: int | None = None
    """Lines of metrics.jsonl that a power loss garbled: they are not promised to be durable."""
    answers: list[dict[str, Any]] = []


class CheckpointReply(Body):
    """`POST /v1/checkpoint` and `GET /v1/checkpoint`."""

    path: str
    weights_version: str
    """The version that the files hold."""
    current: bool
    """Whether that is the version being served."""
    saved_at: datetime | None = None
    progress: PhaseProgress | None = None
    """Of the new working copy, while it is being written."""


class PruneRequest(Body):
    """`POST /v1/lessons/prune`: remove what no undo within reach needs."""

    keep_states: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """So many of the newest kept entries can be taken back with their optimizer's state. None: the setting's."""
    keep_deltas: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """So many can be taken back at all, and never fewer than the working copy stands on. None: all, no delta is
    removed."""
    dry_run: bool = False
    """Only say what would be removed."""


class PruneReply(Body):
    """What was removed, and what can still be undone."""

    removed: list[str]
    """Below the home's `lessons`: `0001-listening/optimizer.safetensors`."""
    nbytes: int
    dry_run: bool
    undoable: list[str]
    """Entries that can be taken back, one after another from the newest on."""
    undoable_with_state: list[str]
    """Those of them after whose undo the optimizer's state of then is there; the others leave a fresh one."""


class ErrorDetail(ErrorInfo):
    """An error as OpenAI's clients read it: they show `message` only, so the hint stands there, too."""

    param: str | None = None
    """The field that is wrong."""
    code: str | None = None
    """Which kind of error, for programs: `context_length_exceeded`, `model_not_found`, ..."""


class ErrorReply(Body):
    """Every error answer: found / expected / what to do in the message, what to do in the hint once more."""

    error: ErrorDetail


class Health(Body):
    """`GET /v1/health` (with the local engine also `/health`)."""

    status: Literal["ok", "degraded"]
    model: str
    weights_version: str
    trial: bool
    trainer: Literal["ready", "starting", "busy", "down"]
    detail: str = ""


class EndToken(Body):
    """A token that ends an answer."""

    id: int
    text: str
    named_by: list[str]
    """Who says so: files, the tokenizer, the chat template."""


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
    ends: list[EndToken] = []
    """What ends an answer, whoever asks for it."""
