"""What the gate asks for, and the certificate that says what it found: counts, and what follows (any process)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from secondnature.records.base import Name, Record

EVIDENCE_VERSION = 4
"""Format 1 had no `decision`, and its `difference_interval` was not that of the tests. Format 2 said in
its sentence how many probes would do, where format 3 says what these could show. Format 4 may have probe sets of
what earlier lessons taught (`role: retention`)."""
Verdict = Literal["kept", "undone", "inconclusive"]
ProbeRole = Literal["gain", "other", "guard", "retention"]
"""Of a probe set: what is taught, its other side, what must stay as it is, what earlier lessons taught."""
Decision = Literal["gained", "held", "harmed", "pin_lost", "tag_harmed", "no_gain", "not_shown", "not_judged"]
"""What the tests of one probe set say: `gained` and `no_gain` of what was taught, `held` of a guard. `harmed`: more
losses than gains are shown. `pin_lost`: a pinned probe was lost. `tag_harmed`: losses concentrate in a tag, and
there more losses than gains are shown. `not_shown`: none of these. `not_judged`: too few probes, a guard that fails
anyway, or probes of an earlier lesson that show neither."""
Margin = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
DEFAULT_GUARD_MARGIN = 0.05


def _number_or_table(value: Any) -> str:
    return "table" if isinstance(value, dict) else "number"


class GateSettings(Record):
    """When a lesson is kept. Lowering a minimum is allowed and said in the evidence."""

    alpha: Annotated[float, Field(gt=0, le=0.5, allow_inf_nan=False)] = 0.025
    min_gain_probes: Annotated[int, Field(ge=1, le=100_000)] = 60
    min_gain_seeds: Annotated[int, Field(ge=1, le=100_000)] = 20
    guard_margin: Annotated[
        Annotated[Margin, Tag("number")] | Annotated[dict[Name, Margin], Tag("table")],
        Discriminator(_number_or_table),
    ] = DEFAULT_GUARD_MARGIN
    """A fall of this share of a guard's probes, or a larger one, must be ruled out. A number for all guards, or a
    table by guard name (`{code = 0.02}`): guards that it does not name have 0.05."""
    min_guard_probes: Annotated[int, Field(ge=1, le=100_000)] = 300
    other_margin: Margin = 0.10
    min_other_probes: Annotated[int, Field(ge=1, le=100_000)] = 120

    def margin_of(self, guard: str) -> float:
        """The margin of one guard (a share)."""
        if isinstance(self.guard_margin, dict):
            return self.guard_margin.get(guard, DEFAULT_GUARD_MARGIN)
        return self.guard_margin


class Flip(Record):
    """A probe whose verdict changed, with both answers."""

    prompt: str
    before: str
    after: str
    gained: bool
    pinned: bool = False
    tags: list[str] = []


class TagTest(Record):
    """One tag of a probe set, counted in scenarios: whether the losses concentrate in it."""

    tag: str
    n: int
    before: int
    """Scenarios of which a probe passed before: those that can be lost."""
    gains: int
    losses: int
    p: float
    """Exact, one-sided: so many of the set's losses in this tag, were they drawn from all that can be lost."""
    p_adjusted: float
    """Holm's, over the tags of the set."""
    harm_p: float
    """One-sided p of "more losses than gains" in the tag."""
    harm_alpha: float
    """The level of that test: the gate's, shared by the tags in which flips of any kind concentrate."""
    harm_p_adjusted: float | None = None
    """`harm_p`, by Holm over the tags of the set. None before format 4."""
    concentrated: bool | None = None
    """`p_adjusted` and `harm_p` are both at most their levels. None before format 4: `harmed` says it."""
    harmed: bool
    """`concentrated`, or `harm_p_adjusted` is at most half of the gate's level."""


class SharedWords(Record):
    """Words that the prompts of lost probes share more often than those of the others."""

    words: str
    before: int
    """Scenarios with these words that can be lost."""
    losses: int
    p: float
    """Exact, one-sided, as in `TagTest`."""
    p_adjusted: float
    """Multiplied by the number of word sequences that were looked at. Above 0.05 it may be chance."""


class Losses(Record):
    """What the losses of a probe set have in common, counted in scenarios (probes of one fall together)."""

    before: int
    """Scenarios of which a probe passed before."""
    gains: int
    """Scenarios with more gains than losses."""
    losses: int
    """Scenarios with more losses than gains."""
    tags: list[TagTest] = []
    """Every tag of the set, the most concentrated first."""
    shared: list[SharedWords] = []
    """Described, never judged."""
    num_sequences: int = 0
    """Word sequences that were looked at."""


class Reach(Record):
    """What a probe set could show."""

    name: str
    role: ProbeRole
    n: int
    num_seeds: int
    """Scenarios: each counts once."""
    pinned: int = 0
    margin: float | None = None
    """The fall that must be ruled out; None for the gain and earlier lessons, and where all are pinned."""
    at_best: float | None = None
    """Of a guard: the smallest fall (a share) that it rules out where nothing flips. Of the behaviour: the smallest
    gain that it shows where nothing is lost. Of an earlier lesson: the smallest fall that it shows where nothing is
    gained, which undoes. None: none."""
    usual: float | None = None
    """The same where answers flip by themselves at `flip_rate`, both ways alike."""
    flip_rate: float
    too_few: bool
    """Fewer than the gate asks for."""
    chance: float | None = None
    """Of a guard: that it passes where nothing changed, but answers flip at that rate."""


class Reaches(Record):
    """What the probes of a lesson could show."""

    alpha: float
    sets: list[Reach]
    chance: float | None = None
    """That all guards pass a lesson that changes nothing else; None: nothing is guarded by a test."""
    gate: GateSettings


class Opening(Record):
    """First words of answers that became more or less frequent."""

    words: str
    before: int
    after: int


class Style(Record):
    """How answers sounded before and after, over the probes of a set answered in text. Judged by nobody."""

    n: int
    words_before: float
    """Mean length of an answer."""
    words_after: float
    shorter: int
    """Answers that have fewer words than before."""
    longer: int
    length_p: float
    """Two-sided, exact (mid-p), of "as many became shorter as longer"."""
    openings_moved: float
    """Share of the answers whose first two words would have to change back (total variation distance)."""
    openings: list[Opening] = []
    """Those that moved most."""


class Comparison(Record):
    """One probe set before and after a lesson: the counts, and what follows from them."""

    name: str
    """The behaviour the set measures; `listening (lesson 0003)` where an earlier lesson taught it."""
    role: ProbeRole
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
    """Of (share after - share before), by inverting the tests: the lower limit is above minus the margin (for the
    gain: above 0) where p <= alpha, the upper one below 0 where harm_p <= harm_alpha, and not elsewhere."""
    margin: float | None = None
    """Non-inferiority margin (a share); None for the gain, and where every probe is pinned."""
    alpha: float
    method: str
    """Name and version of the test, e.g. `mcnemar-midp/1`."""
    p: float | None = None
    decision: Decision = "not_judged"
    """What table, sentence and page say, each in its own words."""
    passed: bool | None = None
    """`decision` is gained or held; None: not judged."""
    harm_p: float | None = None
    """One-sided p of "more losses than gains"."""
    harm_alpha: float | None = None
    """The level of that test: `gate.alpha`, which retries do not halve, so that they hide no harm. The sets of
    earlier lessons share it: those in which enough flipped that harm could be shown at all (Tarone 1990)."""
    harmed: bool = False
    """`decision` is harmed."""
    n_needed: int | None = None
    """The n that would do, where the set was too small to say; None where no n would."""
    mean_margin_before: float | None = None
    mean_margin_after: float | None = None
    clusters: list[tuple[int, int, int]] = []
    """Per scenario seed: (n, gains, losses); p of the cluster test follows from it. Empty: one probe per seed."""
    pinned: int = 0
    """How many of the n probes are pinned."""
    pinned_before: int = 0
    """Pinned probes that passed before."""
    pinned_losses: int = 0
    """Pinned probes that were lost: one undoes the lesson."""
    reach: Reach | None = None
    """What the set could have shown with as many flips as there were; None where it said something."""
    style: Style | None = None
    lost: Losses | None = None
    """None: there was nothing to compare, neither tags nor losses."""
    flips: list[Flip] = []
    note: str = ""

    @model_validator(mode="before")
    @classmethod
    def _of_format_1(cls, data: Any) -> Any:
        """What was written without a decision gets it from its figures, and loses an interval of another test."""
        if not isinstance(data, dict) or "decision" in data:
            return data  # pyright: ignore[reportUnknownVariableType]
        old: dict[str, Any] = {**data}  # pyright: ignore[reportUnknownVariableType]
        old.pop("difference_interval", None)
        return {**old, "decision": _decision_of(old)}


def _decision_of(old: dict[str, Any]) -> Decision:
    gain, passed, p, alpha = old.get("role") == "gain", old.get("passed"), old.get("harm_p"), old.get("alpha")
    worse = gain and isinstance(p, float) and isinstance(alpha, float) and p <= alpha
    if old.get("harmed") or (worse and passed is False):
        return "harmed"
    if passed is not False:
        return "not_judged" if passed is None else "gained" if gain else "held"
    return "no_gain" if gain and old.get("gains", 0) <= old.get("losses", 0) else "not_shown"


class Taught(Record):
    """The prompts of corrections, asked before and after: no evidence of a gain, but of learning."""

    n: int
    before: int
    """Answered as wanted, greedily: word for word."""
    after: int
    """Word for word, or with at least half of the words that the wanted answer adds to the question, in order, and
    nearer to it than to the answer before the lesson."""
    exact: int | None = None
    """Of `after`, word for word. None: all of them, by versions that counted no others."""


class Prompted(Record):
    """The probes of what was taught, asked before the lesson with the corrections in them. Decides nothing."""

    n: int
    num_corrections: int
    """That were put into the question."""
    prompting: int
    """Passed so."""
    lesson: int
    """Passed after the lesson, without the corrections in the question."""
    only_prompting: int
    only_lesson: int
    p: float
    """Two-sided McNemar mid-p, of "as many pass by prompting alone as by the lesson alone"."""


class Evidence(Record):
    """The certificate of a lesson: every figure can be recomputed from the counts in it."""

    schema_version: int = EVIDENCE_VERSION
    verdict: Verdict
    sentence: str
    """The verdict in one sentence."""
    before_version: str
    after_version: str
    comparisons: list[Comparison]
    behaviour: str = ""
    gate: GateSettings = GateSettings()
    taught: Taught | None = None
    """Some of the corrections themselves. It decides only where no probe asks for what was taught."""
    prompted: Prompted | None = None
    """Prompting alone, beside the lesson."""
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
