"""The gate: what the probes said before and after a lesson, in; kept, undone or inconclusive, out (process A).

A pure function of its arguments: it asks nothing, writes nothing, draws no random number. It pairs the outcomes by
probe, counts, and leaves all figures and the verdict to `certificate`, which needs the counts alone. Probes of the
lesson's behaviour measure the gain (`side: right`) and the restraint (`side: other`); probes of every other name
are guards; what earlier lessons taught comes in sets of its own. The same prompt asked twice is one probe.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from secondnature.errors import BadInput
from secondnature.evidence.certificate import certify
from secondnature.evidence.decision import TOGETHER, compare, num_flipped, shared_by
from secondnature.evidence.lost import Scenario, describe
from secondnature.evidence.power import noninferiority_n_needed
from secondnature.evidence.statistics import clopper_pearson
from secondnature.evidence.style import style
from secondnature.records import (
    DEFAULT_GUARD_MARGIN,
    Comparison,
    Correction,
    Evidence,
    Flip,
    GateSettings,
    Outcome,
    Probe,
    ProbeRole,
    Prompted,
    Taught,
    digest,
    utc_now,
)

MAX_FLIPS = 20
"""How many flips per set keep their texts, the losses first, and of those the pinned."""
MAX_FLIP_CHARACTERS = 2000
"""Longer prompts and answers are cut in `Flip`; the whole answers lie in the run directory."""


@dataclass(frozen=True)
class _Pair:
    probe: Probe
    before: Outcome
    after: Outcome
    scenario: str

    @property
    def lost(self) -> bool:
        return self.before.passed and not self.after.passed


def judge_lesson(
    probes: Sequence[Probe],
    before: Iterable[Outcome],
    after: Iterable[Outcome],
    *,
    behaviour: str,
    before_version: str,
    after_version: str,
    gate: GateSettings | None = None,
    num_retries: int = 0,
    seed: int = 0,
    created_at: datetime | None = None,
    taught: Taught | None = None,
    prompted: Prompted | None = None,
    retained: Mapping[str, Sequence[Probe]] | None = None,
) -> Evidence:
    """The certificate of a lesson: its verdict, and all counts and figures that lead to it.

    Args:
        retained: probes of what earlier lessons taught, by the name of each set; none of them among `probes`.

    Raises:
        BadInput: a probe has no outcome before or after.
    """
    gate = gate or GateSettings()
    again = [p for of in (retained or {}).values() for p in of]
    pairs = _pair([*probes, *again], before, after)
    own = {p.digest() for p in probes}
    sets: dict[tuple[int, str], list[_Pair]] = defaultdict(list)
    roles: tuple[ProbeRole, ...] = ("gain", "other", "guard")
    for digest_, pair in pairs.items():
        if digest_ in own:
            sets[roles.index(_role(pair.probe, behaviour)), pair.probe.behaviour].append(pair)
    comparisons = [
        _compare(name, roles[role], found, gate, num_retries) for (role, name), found in sorted(sets.items())
    ]
    comparisons += _retained(
        {name: [pairs[p.digest()] for p in of] for name, of in (retained or {}).items()}, gate, num_retries
    )
    return certify(
        comparisons,
        behaviour=behaviour,
        gate=gate,
        num_retries=num_retries,
        before_version=before_version,
        after_version=after_version,
        probes_sha256=hash_probes([pair.probe for pair in pairs.values()]),
        seed=seed,
        created_at=created_at or utc_now(),
        taught=taught,
        prompted=prompted,
    )


def hash_probes(probes: Iterable[Probe]) -> str:
    """sha256 over the sorted digests of the probes: the same set in another order has the same hash."""
    return hashlib.sha256("\n".join(sorted({p.digest() for p in probes})).encode()).hexdigest()


def _role(probe: Probe, behaviour: str) -> ProbeRole:
    if probe.behaviour != behaviour:
        return "guard"
    return "gain" if probe.side == "right" else "other"


def _pair(probes: Sequence[Probe], before: Iterable[Outcome], after: Iterable[Outcome]) -> dict[str, _Pair]:
    """By the digest of each probe."""
    was = {o.probe: o for o in before}
    now = {o.probe: o for o in after}
    asked = {p.digest(): p for p in probes}
    for name, outcomes in (("before", was), ("after", now)):
        missing = [d for d in asked if d not in outcomes]
        if missing:
            raise BadInput(
                f"{len(missing)} of {len(asked)} probes have no outcome {name} the lesson "
                f"(the first: {missing[0]})",
                "ask the same probes before and after",
            )
    return {d: _Pair(p, was[d], now[d], p.cluster) for d, p in asked.items()}


def _retained(sets: Mapping[str, list[_Pair]], gate: GateSettings, num_retries: int) -> list[Comparison]:
    """What earlier lessons taught, set by set and together; the level of harm is shared among them."""
    together = [replace(x, scenario=f"{name}/{x.scenario}") for name, of in sets.items() for x in of]
    told = dict(sets)
    if len(sets) > 1:
        told[TOGETHER] = [replace(x, probe=x.probe.model_copy(update={"pin": False})) for x in together]
    flips = [
        num_flipped(sum(c[1] for c in found), sum(c[2] for c in found), found)
        for of in told.values()
        if not all(x.probe.pin for x in of)
        for found in [_scenario_counts(of)]
    ]
    share = shared_by(flips, gate.alpha)
    return [
        _compare(name, "retention", of, gate, num_retries, share, described=name != TOGETHER)
        for name, of in told.items()
    ]


def _scenario_counts(pairs: Iterable[_Pair]) -> list[tuple[int, int, int]]:
    """(probes, gains, losses) of each scenario."""
    counts: dict[str, list[int]] = {}
    for pair in pairs:
        of = counts.setdefault(pair.scenario, [0, 0, 0])
        of[0] += 1
        of[1] += pair.after.passed and not pair.before.passed
        of[2] += pair.lost
    return [(c[0], c[1], c[2]) for c in counts.values()]


def _compare(
    name: str,
    role: ProbeRole,
    pairs: Sequence[_Pair],
    gate: GateSettings,
    num_retries: int,
    share: int = 1,
    *,
    described: bool = True,
) -> Comparison:
    """One probe set. `described`: with its flips and what its losses share; else others have told of them."""
    pinned = [pair for pair in pairs if pair.probe.pin]
    whole = [pair for pair in pairs if pair.before.whole and pair.after.whole]
    clusters = _scenario_counts(pairs)
    comparison = compare(
        name=name,
        role=role,
        n=len(pairs),
        num_seeds=len(clusters),
        before=sum(pair.before.passed for pair in pairs),
        gains=sum(c[1] for c in clusters),
        losses=sum(c[2] for c in clusters),
        clusters=clusters if len(clusters) < len(pairs) else [],
        gate=gate,
        num_retries=num_retries,
        pins=(len(pinned), sum(p.before.passed for p in pinned), sum(p.lost for p in pinned)),
        lost=describe(_scenarios(pairs), gate.alpha / share) if described else None,
        share=share,
    )
    return comparison.model_copy(
        update={
            "flips": _flips(pairs) if described else [],
            "style": None
            if role == "retention"  # none of their answers is generated to its end for that
            else style([p.before.answer for p in whole], [p.after.answer for p in whole]),
            "mean_margin_before": _mean_margin(pair.before for pair in pairs),
            "mean_margin_after": _mean_margin(pair.after for pair in pairs),
        }
    )


def _scenarios(pairs: Iterable[_Pair]) -> list[Scenario]:
    grouped: dict[str, list[_Pair]] = defaultdict(list)
    for pair in pairs:
        grouped[pair.scenario].append(pair)
    return [
        Scenario(
            text="\n".join(p.probe.prompt[-1].content for p in of),
            tags=frozenset(tag for p in of for tag in p.probe.tags),
            at_risk=any(p.before.passed for p in of),
            net=sum(p.after.passed - p.before.passed for p in of),
        )
        for of in grouped.values()
    ]


def _mean_margin(outcomes: Iterable[Outcome]) -> float | None:
    margins = [o.margin for o in outcomes if o.margin is not None]
    return sum(margins) / len(margins) if margins else None


def _flips(pairs: Iterable[_Pair]) -> list[Flip]:
    flips = [
        Flip(
            prompt=pair.probe.prompt[-1].content[:MAX_FLIP_CHARACTERS],
            before=pair.before.answer[:MAX_FLIP_CHARACTERS],
            after=pair.after.answer[:MAX_FLIP_CHARACTERS],
            gained=pair.after.passed,
            pinned=pair.probe.pin,
            tags=pair.probe.tags,
        )
        for pair in pairs
        if pair.before.passed != pair.after.passed
    ]
    return sorted(flips, key=lambda flip: (flip.gained, not flip.pinned))[:MAX_FLIPS]


def held_out(probes: Iterable[Probe], corrections: Iterable[Correction]) -> list[Probe]:
    """The probes whose prompt is not also the prompt of a correction: nothing that was taught is evidence."""
    taught = {digest([m.model_dump() for m in c.prompt]) for c in corrections}
    return [p for p in probes if digest([m.model_dump() for m in p.prompt]) not in taught]


ReadAs = Literal["example", "replay", "own answer", "development probe", "earlier lesson", "student"]
"""As what a context is read in training: corrections and token ids of the lesson, replay (by answer or by
distribution), the model's own answers, development probes, corrections of earlier lessons, SDFT's own students."""


def read_in_training(
    probes: Sequence[Sequence[int]], read: Mapping[ReadAs, Iterable[Sequence[int]]]
) -> dict[int, list[ReadAs]]:
    """Which probes are not held out: index -> as what their context is read in training, in the order of `read`.

    All contexts are the token ids that the model reads before its answer, rendered as it is asked; a probe is read
    where one of them is the same, token by token. What is not in the answer is held out.
    """
    places: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, context in enumerate(probes):
        places[tuple(context)].append(i)
    found: dict[int, list[ReadAs]] = defaultdict(list)
    for role, contexts in read.items():
        for context in {tuple(ids) for ids in contexts} & places.keys():
            for i in places[context]:
                found[i].append(role)
    return {i: found[i] for i in sorted(found)}


@dataclass(frozen=True)
class Floor:
    """The A/A floor: how often a probe's verdict changes although the weights did not."""

    n: int
    flips: int
    rate: float
    interval: tuple[float, float]
    """Clopper-Pearson, 95 %, of the flip rate."""
    guard_probes: int | None
    """How many probes a guard needs with this many flips (both ways alike), at 80 % power."""


def _strictest(gate: GateSettings) -> float:
    """The smallest margin of all guards."""
    margins = gate.guard_margin
    return min(margins.values(), default=DEFAULT_GUARD_MARGIN) if isinstance(margins, dict) else margins


def aa_floor(first: Iterable[Outcome], second: Iterable[Outcome], gate: GateSettings | None = None) -> Floor:
    """The flip rate between two runs of the same probes on the same weights (batching moves greedy answers).

    Raises:
        BadInput: the runs share no probe.
    """
    gate = gate or GateSettings()
    was: Mapping[str, bool] = {o.probe: o.passed for o in first}
    now: Mapping[str, bool] = {o.probe: o.passed for o in second}
    both = was.keys() & now.keys()
    if not both:
        raise BadInput(
            "the two runs share no probe; expected the same probes twice", "ask the same set again"
        )
    flips = sum(was[d] != now[d] for d in both)
    rate = flips / len(both)
    return Floor(
        n=len(both),
        flips=flips,
        rate=rate,
        interval=clopper_pearson(flips, len(both)),
        guard_probes=noninferiority_n_needed(rate / 2, rate / 2, _strictest(gate), gate.alpha),
    )
