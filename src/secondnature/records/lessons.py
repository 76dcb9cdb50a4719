"""A lesson of the log: what made it, how it was trained, what it did, its metrics (any process)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from secondnature.records.base import SCHEMA_VERSION, Record
from secondnature.records.evidence import Verdict
from secondnature.records.probes import Side

LessonState = Literal["queued", "running", "on_trial", "kept", "undone", "failed", "cancelled"]
KlSet = Literal["new", "replay"]
OPEN_STATES: tuple[LessonState, ...] = ("queued", "running", "on_trial")
"""States in which a lesson still holds the weights, or waits for them."""
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=131_072)]


class Example(Record):
    """Token ids that are trained on: the gradient is in the continuation only."""

    context_ids: Annotated[TokenIds, Field(min_length=1)]
    continuation_ids: Annotated[TokenIds, Field(min_length=1)]
    rejected_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    weight: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0


class OptimizerSettings(Record):
    """APOLLO's settings (arXiv 2412.05270). `lr: None` takes the model card's value, else 1e-5."""

    lr: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Steps of a lesson, from its first, over which the learning rate rises in a straight line. Every lesson warms
    up anew, also where it continues with the optimizer's state of an earlier one."""
    scale: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0
    """Multiplies the per-tensor alpha."""
    proj_refresh: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    """Steps after which the projections are drawn anew."""
    norm_growth_limit: Annotated[float, Field(gt=1, le=1e6, allow_inf_nan=False)] = 1.01
    cooldown: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    """Share of a lesson's steps, at its end, over which the learning rate falls towards 0 in a straight line; like
    `warmup_steps` it counts the lesson's own steps."""


class ErrorInfo(Record):
    """Why a job ended without a result."""

    type: str
    message: str
    hint: str = ""


class Cause(Record):
    """What made a lesson: the corrections, by content hash, and how many examples came of them."""

    corrections: list[str] = []
    """Digests (`Correction.digest`), in order; the texts lie beside it in corrections.jsonl."""
    examples: list[str] = []
    """Digests of the examples' tokens, in order, however they were given; empty in entries of older versions."""
    num_examples: int = 0
    num_replay: int = 0
    num_replay_left_out: int = 0
    num_passed_over: int = 0
    """Corrections of the ledger that could not be taught to the model."""
    passed_over: dict[str, str] = {}
    """The first of them, by id, with the reason."""
    """Examples that were not replayed: a probe asks just that, or they do not fit the model."""
    num_retries: int = 0
    """How often the same set of examples was judged before this lesson began: each halves the gate's alpha."""


class Moved(Record):
    """How far one tensor was moved by a lesson."""

    name: str
    """The tensor's name in the Hugging Face model, e.g. `model.layers.3.mlp.up_proj.weight`."""
    layer: int | None = None
    """None: it belongs to no layer (embeddings, last norm)."""
    intended: float
    """Frobenius norm of the intended, un-rounded update."""
    relative: float
    """`intended` over the norm of the tensor before the lesson."""
    written: float
    """Norm of the difference that was written: with bf16 rounding mostly noise at small learning rates."""


class Lesson(Record):
    """One training job on the weights: parent, cause, settings, state. Like a commit."""

    schema_version: int = SCHEMA_VERSION
    id: str
    """`0001-listening`: number and behaviour."""
    number: int
    job: str
    idempotency_key: str | None = None
    """Of the request that made it: sent again, it gets the same answer, and no second lesson."""
    request_digest: str | None = None
    """Of that request, where it had such a key."""
    kind: Literal["train", "revert"] = "train"
    state: LessonState = "queued"
    behaviour: str | None = None
    note: str = ""
    parent: str | None = None
    """The version of the weights before it. None while it waits."""
    version: str | None = None
    """The version of the weights after its last write. None until it is on trial."""
    reverts: str | None = None
    """For `kind: revert`: the lesson that it takes back."""
    reverted_by: str | None = None
    cause: Cause = Cause()
    settings: dict[str, Any] = {}
    """The resolved settings of the job: every default spelled out."""
    steps: int = 0
    loss: float | None = None
    kl: dict[KlSet, float] = {}
    """KL(before || after) on the lesson's own prompts (`new`) and on replayed ones, nats per token: what is
    forgotten grows with that on `new` (arXiv 2509.04259). See `KlMetric`."""
    moved: list[Moved] = []
    delta_sha256: str | None = None
    """Checksum of the delta's file."""
    delta_pruned: bool = False
    """Its delta was removed, as asked (`lessons prune`): it can no longer be taken back."""
    optimizer_before: str | None = None
    """Id of the lesson whose directory holds the optimizer's state before this one; None: a fresh state."""
    optimizer_after: str | None = None
    optimizer_sha256: str | None = None
    """Checksum of the file with the optimizer's state after it."""
    stopped_by: str = ""
    """Why training stopped."""
    verdict: Verdict | None = None
    reason: str = ""
    """One sentence: why it was kept or undone."""
    error: ErrorInfo | None = None
    created_at: datetime
    started_at: datetime | None = None
    trial_until: datetime | None = None
    """When the trial's lease ends and the lesson is undone."""
    ended_at: datetime | None = None


class StepMetric(Record):
    """A line of metrics.jsonl: one optimizer step."""

    kind: Literal["step"] = "step"
    step: int
    loss: float | None = None
    """Mean over the batch, nats per token; None: not finite."""
    tokens_per_s: float | None = None
    grad_norm: float | None = None
    drift: float | None = None
    """With replay by distribution: mean KL(before the lesson || now) of the step's replay, nats per token."""


class LookAnswer(Record):
    """What was answered to a development probe at a look."""

    probe: int
    """Its place in `development`, from 0."""
    passed: bool
    answer: str
    """As far as its check needed it, at most 200 characters."""


class LookMetric(Record):
    """A line of metrics.jsonl: the development probes of both sides, asked after that step (0: before any).

    Those with `prefers` are read by the trainer; the others are answered by the serving engine between two steps.
    """

    kind: Literal["look"] = "look"
    step: int
    margins: dict[Side, list[float]] = {}
    """Per probe: log p(wanted) - log p(unwanted), nats over the whole answers. Smooth."""
    passed: dict[Side, float | None] = {}
    """Share of probes that pass: whose answer does what its check says; with `prefers`, whose greedy answer is,
    token by token, the wanted one. Jumps."""
    asked: dict[Side, int] = {}
    """How many probes that is a share of. Empty in lessons of older versions."""
    lost: list[int] = []
    """Of the side `other`, those that passed at step 0 and fail now: places in `development`, from 0."""
    answers: list[LookAnswer] = []
    """Some of the answers that were generated, at most 16: those of `lost` first."""


class KlMetric(Record):
    """A line of metrics.jsonl: KL(before || after) of the next-token distributions, nats per token.

    Exact over the vocabulary, at the positions of the answers that the model gave before the lesson (greedy).
    """

    kind: Literal["kl"] = "kl"
    on: KlSet
    mean: float
    """Over the prompts."""
    per_prompt: list[float] = []
    """Mean over the prompt's positions."""
    num_tokens: int = 0
    """Positions that were compared, of all prompts together."""


STOPPED_BY: dict[str, str] = {
    "max_steps": "all steps that were asked for were made",
    "until_margin": "the margin that was asked for was reached",
    "until_passed": "as many development probes passed as were asked for",
    "until_margin and until_passed": "the margin was reached, and as many probes passed as were asked for",
    "the other side gave way": "the other side of the behaviour gave way: more steps would have done harm",
    "learned": "every example was learned: no further step would have had anything to learn from",
    "nothing moved": "no weight changed: nothing in the model got a gradient from these examples",
}
"""Why training stopped: what the trainer says (`wire.Done.stopped_by`), and the sentence for whoever reads it."""
