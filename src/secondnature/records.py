"""What lies on disk and crosses the wire: corrections, probes, examples, lessons, evidence (any process).

One pydantic model each, `extra="forbid"`: an unknown field is an error that names it, never silently lost.
Files carry `schema_version`; a reader migrates older ones upwards and refuses newer ones. Reading JSONL reports
the file, the line and the mend, and reads everything before anything is used (plan, validate, apply).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from secondnature.errors import BadRecord, TooLarge

SCHEMA_VERSION = 1
MAX_LINE_BYTES = 1_000_000
"""A longer line in a JSONL file is refused: no correction is a megabyte."""
MAX_FILE_BYTES = 100_000_000

Role = Literal["system", "user", "assistant"]
Side = Literal["right", "other"]


def _is_unicode(text: str) -> str:
    """JSON can smuggle in half a surrogate pair, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"not valid Unicode (a lone surrogate at character {e.start})") from None
    return text


Unicode = Annotated[str, AfterValidator(_is_unicode)]
Text = Annotated[Unicode, Field(max_length=200_000)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
LessonState = Literal["queued", "running", "on_trial", "kept", "undone", "failed", "cancelled"]
Verdict = Literal["kept", "undone", "inconclusive"]
KlSet = Literal["new", "replay"]

OPEN_STATES: tuple[LessonState, ...] = ("queued", "running", "on_trial")
"""States in which a lesson still holds the weights, or waits for them."""


def utc_now() -> datetime:
    """The present moment, with its zone, in whole milliseconds (what JSON keeps)."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


class Record(BaseModel):
    """Base: unknown fields are errors; instances are values, not state."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Message(Record):
    """One turn of a conversation."""

    role: Role
    content: Text


Conversation = Annotated[list[Message], Field(min_length=1, max_length=200)]


def _as_messages(value: Any, role: Role) -> Any:
    """Plain text where the data-set formats allow it: a string is one message of that role."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _with_messages(data: Any) -> Any:
    """A record whose `prompt` may be given as text."""
    if isinstance(data, dict) and isinstance(data.get("prompt"), str):  # pyright: ignore[reportUnknownMemberType]
        return {**data, "prompt": _as_messages(data["prompt"], "user")}  # pyright: ignore[reportUnknownVariableType]
    return data  # pyright: ignore[reportUnknownVariableType]


class Prompt(Record):
    """Something to ask: the user's turn last. A string stands for one message of the user."""

    prompt: Conversation

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"prompt": data}
        return _with_messages(data)

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if self.prompt[-1].role == "assistant":
            raise ValueError("`prompt` ends with the assistant; expected the user's turn last")
        return self


class Correction(Record):
    """A moment when the model said one thing and the user wanted another.

    Accepted shapes (the data-set formats that TRL users know): `{prompt, chosen, rejected?}`,
    `{prompt, completion}` or `{messages}` whose last turn is the assistant's; a string stands for one message.
    """

    prompt: Conversation
    chosen: list[Message] | None = None
    """The wanted answer: one assistant message. None when only `feedback` says what was wrong."""
    rejected: list[Message] | None = None
    """What the model said: one assistant message."""
    behaviour: Name | None = None
    feedback: Text | None = None
    """What the user said about the answer."""
    rating: Annotated[int, Field(ge=-1, le=1)] | None = None
    id: str | None = None
    completion_id: str | None = None
    weights_version: str | None = None
    created_at: datetime | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_dataset_formats(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        messages = data.pop("messages", None)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        if messages is not None:
            if "prompt" in data:
                raise ValueError("found both `messages` and `prompt`; expected one of them")
            if not isinstance(messages, list) or len(messages) < 2:  # pyright: ignore[reportUnknownArgumentType]
                raise ValueError("`messages` needs at least a user turn and the assistant's answer")
            data["prompt"], data["chosen"] = messages[:-1], messages[-1:]
        completion = data.pop("completion", None)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        if completion is not None:
            if data.get("chosen") is not None:  # pyright: ignore[reportUnknownMemberType]
                raise ValueError("found both `completion` and `chosen`; expected one of them")
            data["chosen"] = completion
        data["prompt"] = _as_messages(data.get("prompt"), "user")  # pyright: ignore[reportUnknownMemberType]
        for key in ("chosen", "rejected"):
            data[key] = _as_messages(data.get(key), "assistant")  # pyright: ignore[reportUnknownMemberType]
        return data  # pyright: ignore[reportUnknownVariableType]

    @model_validator(mode="after")
    def _is_teachable(self) -> Self:
        for key in ("chosen", "rejected"):
            answer: list[Message] | None = getattr(self, key)
            if answer is not None and (len(answer) != 1 or answer[0].role != "assistant"):
                raise ValueError(f"`{key}` must be exactly one assistant message")
            if answer is not None and not answer[0].content:
                raise ValueError(f"`{key}` is empty; expected the text of the answer")
        if self.prompt[-1].role == "assistant":
            raise ValueError("`prompt` ends with the assistant; expected the user's turn last")
        if self.chosen is None and self.feedback is None and self.rating is None:
            raise ValueError("nothing to learn: expected `chosen` (or `completion`), `feedback` or `rating`")
        return self

    def digest(self) -> str:
        """Content hash of what is taught (16 hex digits): the same correction twice has the same digest."""
        return digest(self.model_dump(mode="json", include={"prompt", "chosen", "rejected", "feedback"}))


class Check(Record):
    """How an answer is judged: exactly one of the fields."""

    matches: Unicode | None = None
    """A regular expression that the answer must contain (`re.search`)."""
    not_matches: Unicode | None = None
    """A regular expression that the answer must not contain."""
    prefers: tuple[Text, Text] | None = None
    """(A, B): the model must give A the higher log-probability."""
    python: Text | None = None
    """Assertions that must hold after the answer was run as Python, in a subprocess with limits."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [k for k in ("matches", "not_matches", "prefers", "python") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"found {given or 'no check'}; expected one of matches, not_matches, prefers, python"
            )
        for key in ("matches", "not_matches"):
            pattern: str | None = getattr(self, key)
            if pattern is not None:
                if len(pattern) > 2000:
                    raise ValueError(f"`{key}` has {len(pattern)} characters; expected at most 2000")
                try:
                    re.compile(pattern)
                except (re.error, OverflowError, RecursionError) as e:
                    raise ValueError(f"`{key}` is not a regular expression: {e}") from None
        return self


class Probe(Record):
    """A held-out scenario with a check.

    The behaviour that a lesson teaches is measured on the probes of that name; `side: other` marks the scenarios
    where it must *not* show; probes of every other name are guards.
    """

    prompt: Conversation
    behaviour: Name
    check: Check
    seed: Annotated[Unicode, Field(max_length=200)] | None = None
    """The scenario this probe is a variation of: the unit of the cluster test. None: a scenario of its own."""
    side: Side = "right"
    margin: tuple[Text, Text] | None = None
    """(wanted, unwanted) answers whose log-probability margin is the smooth curve beside the yes/no."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return _with_messages(data)

    def digest(self) -> str:
        """Content hash of the probe (16 hex digits)."""
        return digest(self.model_dump(mode="json"))

    @property
    def cluster(self) -> str:
        """The scenario id, or the hash of the prompt where none was given."""
        return self.seed if self.seed is not None else digest([m.model_dump() for m in self.prompt])


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


class GateSettings(Record):
    """When a lesson is kept. Lowering a minimum is allowed and said in the evidence."""

    alpha: Annotated[float, Field(gt=0, le=0.5, allow_inf_nan=False)] = 0.025
    min_gain_probes: Annotated[int, Field(ge=1, le=100_000)] = 60
    min_gain_seeds: Annotated[int, Field(ge=1, le=100_000)] = 20
    guard_margin: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.05
    min_guard_probes: Annotated[int, Field(ge=1, le=100_000)] = 300
    other_margin: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.10
    min_other_probes: Annotated[int, Field(ge=1, le=100_000)] = 120


class Cause(Record):
    """What made a lesson: the corrections, by content hash, and how many examples came of them."""

    corrections: list[str] = []
    """Digests (`Correction.digest`), in order; the texts lie beside it in corrections.jsonl."""
    num_examples: int = 0
    num_replay: int = 0
    num_retries: int = 0
    """How often the same corrections were tried before: each halves the gate's alpha."""


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
    optimizer_before: str | None = None
    """Id of the lesson whose directory holds the optimizer's state before this one; None: a fresh state."""
    optimizer_after: str | None = None
    verdict: Verdict | None = None
    reason: str = ""
    """One sentence: why it was kept or undone."""
    error: ErrorInfo | None = None
    created_at: datetime
    started_at: datetime | None = None
    trial_until: datetime | None = None
    """When the trial's lease ends and the lesson is undone."""
    ended_at: datetime | None = None


class Outcome(Record):
    """One probe asked once."""

    probe: str
    """`Probe.digest`."""
    passed: bool
    answer: str = ""
    margin: float | None = None
    """log p(wanted) - log p(unwanted), nats over the whole answers; None where the probe names no pair."""


class Flip(Record):
    """A probe whose verdict changed, with both answers."""

    prompt: str
    before: str
    after: str
    gained: bool


class Comparison(Record):
    """One probe set before and after a lesson: the counts, and what follows from them."""

    name: str
    """The behaviour the set measures."""
    role: Literal["gain", "other", "guard"]
    n: int
    num_seeds: int
    before: int
    """How many passed before."""
    after: int
    gains: int
    """fail -> pass"""
    losses: int
    """pass -> fail"""
    before_interval: tuple[float, float]
    """Clopper-Pearson, 95 %."""
    after_interval: tuple[float, float]
    difference_interval: tuple[float, float] | None = None
    margin: float | None = None
    """Non-inferiority margin (a share); None for the gain."""
    alpha: float
    method: str
    """Name and version of the test, e.g. `mcnemar-midp/1`."""
    p: float | None = None
    passed: bool | None = None
    """None: not judged (a guard the model failed anyway, or too few probes)."""
    harm_p: float | None = None
    """One-sided p of "more losses than gains"; harm is shown where it is small and the test was not passed."""
    harmed: bool = False
    n_needed: int | None = None
    """The n that would do, where the set was too small to say; None where no n would."""
    mean_margin_before: float | None = None
    mean_margin_after: float | None = None
    clusters: list[tuple[int, int, int]] = []
    """Per scenario seed: (n, gains, losses); p of the cluster test follows from it. Empty: one probe per seed."""
    flips: list[Flip] = []
    note: str = ""


class Evidence(Record):
    """The certificate of a lesson: every figure can be recomputed from the counts in it."""

    schema_version: int = SCHEMA_VERSION
    verdict: Verdict
    sentence: str
    """The verdict in one sentence."""
    before_version: str
    after_version: str
    comparisons: list[Comparison]
    behaviour: str = ""
    gate: GateSettings = GateSettings()
    d_prime_before: float | None = None
    """z(hit rate on the right side) - z(false-accept rate on the other side); 0 for a yes-sayer."""
    d_prime_after: float | None = None
    d_prime_after_low: float | None = None
    """One-sided lower limit of d' after the lesson (delta method, level alpha)."""
    d_prime_change_high: float | None = None
    """One-sided upper limit of the change of d'; below 0 a fall is shown."""
    d_prime_passed: bool | None = None
    alpha: float
    """The level of the tests: `gate.alpha` halved `num_retries` times."""
    num_retries: int = 0
    seed: int = 0
    probes_sha256: str
    """Hash over the digests of all probes that were asked."""
    created_at: datetime


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


class LookMetric(Record):
    """A line of metrics.jsonl: the development probes of both sides, asked after that step (0: before any)."""

    kind: Literal["look"] = "look"
    step: int
    margins: dict[Side, list[float]] = {}
    """Per probe: log p(wanted) - log p(unwanted), nats over the whole answers. Smooth."""
    passed: dict[Side, float | None] = {}
    """Share of probes whose greedy answer is, token by token, the wanted one. Jumps."""


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
}
"""Why training stopped: what the trainer says (`wire.Done.stopped_by`), and the sentence for whoever reads it."""


class SampleAnswer(Record):
    """A line of answers.jsonl: the same prompt answered before and after the lesson (greedy)."""

    prompt: Conversation
    before: Text
    after: Text
    wanted: Text | None = None
    """The answer that the user wanted, where this prompt was corrected."""
    behaviour: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return _with_messages(data)


def digest(value: Any) -> str:
    """First 16 hex digits of sha256 over the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


R = TypeVar("R", bound=BaseModel)


def describe_errors(problems: Sequence[Any]) -> str:
    """The first of pydantic's problems in one line: where, what, how many more."""
    first: dict[str, Any] = problems[0]
    where = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        what = f"unknown field `{where}`"
    else:
        what = str(first["msg"]).removeprefix("Value error, ")
        what = f"{where}: {what}" if where else what
        if isinstance(first.get("input"), bool | int | float):
            what += f" (found {first['input']!r})"[:80]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return what + more


def describe(error: ValidationError) -> str:
    """`describe_errors` of a validation error."""
    return describe_errors(error.errors(include_url=False, include_input=False, include_context=False))


def parse_jsonl(data: bytes, kind: type[R], *, source: str) -> list[R]:
    """All records of a JSONL text, or an error that names the line; nothing is half read.

    Raises:
        BadRecord: not UTF-8, not JSON, an unknown field, a wrong value, or no record at all.
        TooLarge: a line over `MAX_LINE_BYTES`.
    """
    expected = f"expected one {kind.__name__.lower()} per line, as JSON"
    records: list[R] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise TooLarge(
                f"{where}: {len(line):,} bytes; at most {MAX_LINE_BYTES:,} are read", "split or shorten it"
            )
        try:
            records.append(kind.model_validate(json.loads(line.decode("utf-8"))))
        except UnicodeDecodeError as e:
            raise BadRecord(
                f"{where}: not UTF-8 text (byte {e.start}); {expected}", "is it a binary file?"
            ) from None
        except json.JSONDecodeError as e:
            raise BadRecord(
                f"{where}, column {e.colno}: not JSON ({e.msg}); {expected}", "mend the line"
            ) from None
        except RecursionError:
            raise BadRecord(f"{where}: nested too deeply; {expected}", "mend the line") from None
        except ValidationError as e:
            raise BadRecord(f"{where}: {describe(e)}", "see docs/reference/files.md for the fields") from None
    if not records:
        raise BadRecord(f"{source}: no records found; {expected}", "is it the right file?")
    return records


def read_jsonl(path: Path, kind: type[R]) -> list[R]:
    """All records of a JSONL file (see `parse_jsonl`).

    Raises:
        BadRecord: the file is missing, unreadable or has a broken line.
        TooLarge: the file is over `MAX_FILE_BYTES`.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise TooLarge(f"{path}: {size:,} bytes; at most {MAX_FILE_BYTES:,} are read", "split the file")
        data = path.read_bytes()
    except OSError as e:
        raise BadRecord(f"{path}: {e.strerror or e}", "check the path") from None
    return parse_jsonl(data, kind, source=str(path))


def to_jsonl(records: list[Any]) -> str:
    """Records as JSONL, fields that are None left out."""
    return "".join(r.model_dump_json(exclude_none=True) + "\n" for r in records)
