"""From counts to a certificate: every p, interval and verdict is a pure function of the counts (any process).

`compare` judges one probe set, `certify` the whole lesson; `recompute` does both again from the counts that a
certificate carries and `verify` refuses one whose figures differ. Precedence: harm shown, or no gain among enough
probes -> undone; everything shown -> kept; otherwise inconclusive, with what the probes could show.

"d' must not fall" for finite samples: d' = z(hits) - z(false accepts) is noisy (a standard error of 0.3 to 0.4 at
60 + 120 probes), so a rule on the point estimate would be a coin toss. What is asked: the lower limit of d'
after the lesson is above 0 (a yes-sayer has d' = 0), and the upper limit of its change is not below 0 (no fall is
shown). Both one-sided at alpha, by the delta method, paired. How far the other side may fall: the exact test's job.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from secondnature.errors import BadRecord
from secondnature.evidence.decision import HOPELESS, TOGETHER, compare, level, num_flipped, shared_by
from secondnature.evidence.lost import retest
from secondnature.evidence.reach import reach
from secondnature.evidence.statistics import d_prime, two_sided, upper_quantile, z_moments
from secondnature.records import (
    DEFAULT_GUARD_MARGIN,
    EVIDENCE_VERSION,
    Comparison,
    Decision,
    Evidence,
    GateSettings,
    Losses,
    Prompted,
    TagTest,
    Taught,
    Verdict,
)

VETOES: tuple[Decision, ...] = ("harmed", "pin_lost", "tag_harmed")
TAGS_ALONE = 4
"""The format from which on harm in a tag needs no concentration."""
MOST_SAID = 1000
"""More probes than these are nobody's set: that so many would do is no help, and not said."""


def certify(
    comparisons: Sequence[Comparison],
    *,
    behaviour: str,
    gate: GateSettings,
    num_retries: int,
    before_version: str,
    after_version: str,
    probes_sha256: str,
    seed: int,
    created_at: datetime,
    taught: Taught | None = None,
    prompted: Prompted | None = None,
) -> Evidence:
    """The certificate of a lesson from its judged probe sets."""
    alpha = level(gate, num_retries)
    comparisons = [_with_reach(c, gate, num_retries) for c in comparisons]
    discrimination = _discrimination(comparisons, alpha)
    verdict, reason = _decide(comparisons, discrimination, behaviour, taught)
    weaker = _weaker(gate)
    return Evidence(
        verdict=verdict,
        sentence=reason + (f" (A weaker gate than the standard one: {weaker}.)" if weaker else ""),
        before_version=before_version,
        after_version=after_version,
        comparisons=list(comparisons),
        behaviour=behaviour,
        gate=gate,
        alpha=alpha,
        num_retries=num_retries,
        seed=seed,
        probes_sha256=probes_sha256,
        created_at=created_at,
        taught=taught,
        prompted=prompted,
        **discrimination,
    )


def _with_reach(c: Comparison, gate: GateSettings, num_retries: int) -> Comparison:
    """What a set that said too little could have shown."""
    said_little = c.role == "retention" and c.decision == "not_judged"
    if not _is_open(c) and not said_little:
        return c
    found = reach(
        name=c.name,
        role=c.role,
        n=c.n,
        num_seeds=c.num_seeds,
        gate=gate,
        num_retries=num_retries,
        flip_rate=(c.gains + c.losses) / c.n,
        pinned=c.pinned,
        share=1 if c.harm_alpha is None else round(gate.alpha / c.harm_alpha),
    )
    return c.model_copy(update={"reach": found})


def _discrimination(comparisons: Sequence[Comparison], alpha: float) -> dict[str, Any]:
    """d' before and after, its limits, and whether it passed; empty where a side was not probed."""
    sides = {c.role: c for c in comparisons if c.role in ("gain", "other")}
    if len(sides) < 2:
        return {}
    right, other = sides["gain"], sides["other"]
    before = d_prime(right.before, right.n, other.n - other.before, other.n)
    after = d_prime(right.after, right.n, other.n - other.after, other.n)
    moments = [z_moments(c.n, c.before, c.after, c.losses) for c in (right, other)]
    copies = [c.n / c.num_seeds for c in (right, other)]  # probes of one scenario count as one
    reach = upper_quantile(alpha)
    low = after - reach * math.sqrt(sum(m[0] * k for m, k in zip(moments, copies, strict=True)))
    high = after - before + reach * math.sqrt(sum(m[1] * k for m, k in zip(moments, copies, strict=True)))
    return {
        "d_prime_before": before,
        "d_prime_after": after,
        "d_prime_after_low": low,
        "d_prime_change_high": high,
        "d_prime_passed": low > 0 and high >= 0,
    }


def _weaker(gate: GateSettings) -> str:
    """What this gate asks less of than the standard one, in words; empty where nothing."""
    standard = GateSettings()
    parts: list[str] = []
    for key in ("min_gain_probes", "min_gain_seeds", "min_guard_probes", "min_other_probes"):
        if getattr(gate, key) < getattr(standard, key):
            parts.append(f"{key} {getattr(gate, key)} instead of {getattr(standard, key)}")
    table = gate.guard_margin if isinstance(gate.guard_margin, dict) else {"": gate.guard_margin}
    levels = {
        "alpha": (gate.alpha, standard.alpha),
        **{
            f"guard_margin{f' of {name}' if name else ''}": (margin, DEFAULT_GUARD_MARGIN)
            for name, margin in table.items()
        },
        "other_margin": (gate.other_margin, standard.other_margin),
    }
    parts += [f"{key} {own:g} instead of {usual:g}" for key, (own, usual) in levels.items() if own > usual]
    return ", ".join(parts)


def _decide(
    comparisons: Sequence[Comparison], d: dict[str, Any], behaviour: str, taught: Taught | None
) -> tuple[Verdict, str]:
    gain = next((c for c in comparisons if c.role == "gain"), None)
    guards = [c for c in comparisons if c.role in ("other", "guard")]
    harmed = sorted(
        (c for c in comparisons if c.decision == "harmed"), key=lambda c: (c.after - c.before) / c.n
    )
    vetoes = ["the lesson did harm: " + "; ".join(map(_fall, harmed))] if harmed else []
    vetoes += [_pins_lost(c) for c in comparisons if c.pinned_losses]
    vetoes += [_concentrated(c, tag) for c in comparisons if c.lost for tag in c.lost.tags if tag.harmed]
    if vetoes:
        return "undone", "Undone: " + "; ".join([*vetoes, *_meant(comparisons)]) + "."
    if d and d["d_prime_change_high"] < 0:
        return "undone", (
            f"Undone: the model tells the two sides of {behaviour} apart less well than before "
            f"(d' {d['d_prime_before']:.2f} -> {d['d_prime_after']:.2f})."
        )
    if gain is not None and gain.decision == "no_gain":
        return "undone", f"Undone: no gain. {_rates(gain)}."
    open_ends = [_open_end(c) for c in comparisons if _is_open(c)]
    alone = gain is None and taught is not None and any(c.decision == "held" for c in guards)
    if alone and taught is not None and not _learned(taught):
        return "undone", f"Undone: not learned: {_as_wanted(taught)}."
    if gain is None and not alone:
        open_ends.insert(0, f"no probe of {behaviour} was asked, so no gain can be shown")
    if d and not d["d_prime_passed"]:
        open_ends.append(
            f"d' after the lesson is {d['d_prime_after']:.2f}, not shown to be above 0: it may be a yes-sayer"
        )
    if open_ends:
        return "inconclusive", "Not enough evidence, so undone: " + "; ".join(open_ends) + "."
    if gain is None:
        assert taught is not None, "else it is open"
        return "kept", (
            f"Kept: {_as_wanted(taught)} (no probe of {behaviour} was asked: nothing is known of other prompts); "
            f"{_held(guards)}{_retained(comparisons)}."
        )
    return "kept", f"Kept: {_rates(gain)} ({_p(gain)}); {_held(guards)}{_retained(comparisons)}."


def _meant(comparisons: Sequence[Comparison]) -> list[str]:
    """What to do where a lesson is to change what an earlier one taught."""
    if all(c.role != "retention" or c.decision not in VETOES for c in comparisons):
        return []
    return [
        "if it is meant to change what an earlier lesson taught, take that one back first, or teach with "
        "`retention: false` (`--no-retention`)"
    ]


def _learned(taught: Taught) -> bool:
    """Where no probe asks for what was taught: at least half of it is answered as wanted, and more than before."""
    return taught.after > taught.before and 2 * taught.after >= taught.n


def _as_wanted(taught: Taught) -> str:
    exact = taught.after if taught.exact is None else taught.exact
    word = "all" if exact == taught.after > 0 else f"{exact} of them"
    return (
        f"of {taught.n} corrections {taught.after} are answered as wanted ({word} word for word), "
        f"{taught.before} before"
    )


def _is_open(c: Comparison) -> bool:
    hopeless = c.role == "retention" or (c.role != "gain" and c.before < HOPELESS * c.n)
    return c.decision in ("not_shown", "not_judged") and not hopeless


def _label(c: Comparison) -> str:
    return f"the other side of {c.name}" if c.role == "other" else c.name


def _points(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0")


def _p(c: Comparison) -> str:
    assert c.p is not None
    return _small(c.p)


def _rates(c: Comparison) -> str:
    return f"{_label(c)} went from {c.before} to {c.after} of {c.n} probes"


def _fall(c: Comparison) -> str:
    assert c.difference_interval is not None
    most, least = (_points(-end) for end in c.difference_interval)
    fall = _points((c.before - c.after) / c.n)
    asked = (
        f"; it had to be shown to be less than {_points(c.margin)}"
        if c.margin is not None and c.role != "retention"
        else ""
    )
    return f"{_rates(c)}, a fall of {fall} points (limits of the tests: {least} to {most}{asked})"


def _pins_lost(c: Comparison) -> str:
    probes = "probe" if c.pinned == 1 else "probes"
    return f"{c.pinned_losses} of {c.pinned} pinned {probes} of {_label(c)} lost, where none may be"


def _concentrated(c: Comparison, tag: TagTest) -> str:
    assert c.lost is not None
    whose = f"of the {c.lost.losses} losses of {_label(c)} {tag.losses} are tagged {tag.tag}"
    if tag.concentrated is False:
        return (
            f"{whose}, where {tag.gains} were gained ({_small(tag.harm_p_adjusted or 0.0)} over "
            f"{len(c.lost.tags)} tags)"
        )
    return (
        f"{whose}, of which {tag.before} of {c.lost.before} could be lost (they concentrate there: "
        f"{_small(tag.p_adjusted)}; {tag.losses} lost and {tag.gains} gained: {_small(tag.harm_p)})"
    )


def _small(p: float) -> str:
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"


def _could_show(c: Comparison) -> str:
    """What these probes could have shown, and how many would do where that is a number somebody would write."""
    r = c.reach
    assert r is not None, "an open set has one"
    what = "show a gain" if c.role == "gain" else "rule out a fall"
    if r.at_best is None:
        said = f"; {r.num_seeds} can {what} of no size"
    else:
        said = f"; at best they {what} of {_points(r.at_best)} points"
        if r.usual is not None and r.usual > r.at_best:
            said += f", with as many flips one of {_points(r.usual)}"
    return said + (
        f"; about {c.n_needed:,} probes would do" if c.n_needed and c.n_needed <= MOST_SAID else ""
    )


def _open_end(c: Comparison) -> str:
    would_do = _could_show(c)
    if c.role == "gain":
        said = c.note or f"the gain could be chance ({_p(c)}, alpha {c.alpha:.2g})"
        return f"{_rates(c)}, {said}{would_do}"
    assert c.margin is not None
    if c.decision == "not_judged":
        return f"{_rates(c)}, not judged: {c.note}{would_do}"
    few = f" ({c.note})" if c.note else ""
    return f"{_rates(c)}{few}, which does not rule out a fall of {_points(c.margin)} points{would_do}"


def _held(guards: Sequence[Comparison]) -> str:
    """What was guarded, and what was not."""
    judged = [c for c in guards if c.decision == "held" and c.margin is not None]
    pinned = [c for c in guards if c.pinned_before]
    parts: list[str] = []
    if judged:
        falls = ", ".join(f"of {_points(c.margin or 0)} points in {_label(c)}" for c in judged)
        parts.append(f"ruled out are falls {falls}")
    elif not pinned:
        parts.append("nothing guarded the rest of what the model can do")
    parts += [f"none of {c.pinned_before} pinned probes of {_label(c)} was lost" for c in pinned]
    if all(c.role != "other" for c in guards):
        parts.append("where the behaviour must not show was not probed")
    parts += [f"{_label(c)} {c.note}" for c in guards if c.decision == "not_judged"]
    return "; ".join(parts)


def _retained(comparisons: Sequence[Comparison]) -> str:
    """What is known of what earlier lessons taught, of all of it at once where it was asked in several sets."""
    again = [c for c in comparisons if c.role == "retention"]
    if not again:
        return ""
    sets = [c for c in again if c.name != TOGETHER]
    n, losses, gains = (sum(getattr(c, key) for c in sets) for key in ("n", "losses", "gains"))
    of = sets[0].name if len(sets) == 1 else "earlier lessons"
    held = again[-1].decision == "held" and again[-1].margin is not None
    shown = f"a fall of {_points(again[-1].margin or 0)} points is ruled out" if held else "no harm is shown"
    return f"; of {n} probes of {of} {losses} were lost and {gains} gained: {shown}"


def recompute(evidence: Evidence) -> Evidence:
    """The same certificate, every figure and the verdict computed again from its counts.

    Raises:
        BadRecord: the counts contradict each other.
    """
    comparisons: list[Comparison] = []
    flips = [
        num_flipped(c.gains, c.losses, c.clusters)
        for c in evidence.comparisons
        if c.role == "retention" and c.pinned < c.n
    ]
    among_sets = shared_by(flips, evidence.gate.alpha)
    for c in evidence.comparisons:
        _check_counts(c)
        share = among_sets if c.role == "retention" else 1
        fresh = compare(
            name=c.name,
            role=c.role,
            n=c.n,
            num_seeds=c.num_seeds,
            before=c.before,
            gains=c.gains,
            losses=c.losses,
            clusters=c.clusters,
            gate=evidence.gate,
            num_retries=evidence.num_retries,
            pins=(c.pinned, c.pinned_before, c.pinned_losses),
            lost=_retested(c, evidence.gate.alpha / share, alone=evidence.schema_version >= TAGS_ALONE),
            share=share,
        )
        kept = {k: getattr(c, k) for k in ("flips", "style", "mean_margin_before", "mean_margin_after")}
        comparisons.append(fresh.model_copy(update=kept))
    return certify(
        comparisons,
        behaviour=evidence.behaviour,
        gate=evidence.gate,
        num_retries=evidence.num_retries,
        before_version=evidence.before_version,
        after_version=evidence.after_version,
        probes_sha256=evidence.probes_sha256,
        seed=evidence.seed,
        created_at=evidence.created_at,
        taught=_checked(evidence.taught),
        prompted=_recomputed(evidence.prompted),
    )


def _checked(taught: Taught | None) -> Taught | None:
    """Raises BadRecord."""
    if taught is None:
        return None
    exact = 0 if taught.exact is None else taught.exact
    if not (0 <= taught.before <= taught.n > 0 and 0 <= exact <= taught.after <= taught.n):
        raise BadRecord(
            f"taught: {taught.before} and {taught.after} of {taught.n} corrections, {exact} of the latter word for "
            "word; expected parts of them",
            "this certificate was changed or damaged",
        )
    return taught


def _recomputed(p: Prompted | None) -> Prompted | None:
    """Raises BadRecord."""
    if p is None:
        return None
    both, none = p.prompting - p.only_prompting, p.n - p.lesson - p.only_prompting
    if min(p.only_prompting, p.only_lesson, both, none) < 0 or p.lesson - p.only_lesson != both:
        raise BadRecord(
            f"prompted: {p.prompting} and {p.lesson} of {p.n}; expected counts that fit each other",
            "this certificate was changed or damaged",
        )
    return p.model_copy(update={"p": two_sided(p.only_lesson, p.only_prompting)})


def _retested(c: Comparison, alpha: float, *, alone: bool) -> Losses | None:
    """Raises BadRecord."""
    try:
        return None if c.lost is None else retest(c.lost, c.num_seeds, alpha, alone=alone)
    except ValueError as e:
        raise BadRecord(
            f"{c.name} ({c.role}): the counts of tags or words contradict each other: {e}",
            "this certificate was changed or damaged",
        ) from None


def _check_counts(c: Comparison) -> None:
    problems = {
        "before, gains and losses fit n": 0 <= c.losses <= c.before and 0 <= c.gains <= c.n - c.before,
        "after = before + gains - losses": c.after == c.before + c.gains - c.losses,
        "clusters add up to the counts": not c.clusters
        or (
            [sum(column) for column in zip(*c.clusters, strict=True)] == [c.n, c.gains, c.losses]
            and len(c.clusters) == c.num_seeds
            and all(min(k) >= 0 and k[1] + k[2] <= k[0] for k in c.clusters)
        ),
        "one scenario per probe where no clusters are given": bool(c.clusters) or c.num_seeds == c.n,
        "at least one probe": c.n > 0,
        "pinned probes are among the probes": 0 <= c.pinned_losses <= c.pinned_before <= c.pinned <= c.n
        and c.pinned_losses <= c.losses
        and c.pinned_before <= c.before,
        "scenarios that were lost or gained are those of the clusters": c.lost is None
        or [c.lost.gains, c.lost.losses]
        == (
            [sum(k[1] > k[2] for k in c.clusters), sum(k[1] < k[2] for k in c.clusters)]
            if c.clusters
            else [c.gains, c.losses]
        ),
    }
    for expected, holds in problems.items():
        if not holds:
            raise BadRecord(
                f"{c.name} ({c.role}): the counts contradict each other; expected {expected}",
                "this certificate was changed or damaged",
            )


def verify(evidence: Evidence) -> None:
    """Recompute a certificate and refuse it where a figure, the verdict or the sentence differs.

    Raises:
        BadRecord: names the first figure that differs, what it says and what its counts give.
    """
    found, fresh = evidence.model_dump(), recompute(evidence).model_dump()
    if evidence.schema_version == 1:
        found = _of_format_1(found, fresh)
    elif evidence.schema_version == 2:
        found |= {key: fresh[key] for key in ("schema_version", "sentence")}
        for old, new in zip(found["comparisons"], fresh["comparisons"], strict=True):
            old["reach"] = new["reach"]
    elif evidence.schema_version < EVIDENCE_VERSION:  # what was added since can be in none of them
        found["schema_version"] = fresh["schema_version"]
    _same(found, fresh, "evidence")


def _of_format_1(found: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """An older certificate: its counts, p values and verdict, with today's words and limits, which it did not have.

    Guards with several probes a scenario were judged by a milder test then, and harm to what was taught was not
    named: where one of the two tells, what hangs on it is not compared.
    """
    filled = {**fresh, "alpha": found["alpha"], "gate": found["gate"]}
    comparisons: list[dict[str, Any]] = []
    milder = False
    for old, new in zip(found["comparisons"], fresh["comparisons"], strict=True):
        own = {"before_interval", "after_interval", "margin", "alpha", "harm_p", "n", "before", "after"}
        own |= {"p"} if old["method"] == new["method"] else set()
        milder |= old["method"] != new["method"] or old["harmed"] != new["harmed"]
        own |= set() if milder else {"passed", "harmed"}
        comparisons.append({**new, **{key: old[key] for key in own}})
    if not milder:
        filled["verdict"] = found["verdict"]
    return {**filled, "comparisons": comparisons}


def _same(found: Any, expected: Any, where: str) -> None:
    if isinstance(found, dict):
        for key in found:  # pyright: ignore[reportUnknownVariableType]
            _same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(found, list | tuple) and len(found) == len(expected):  # pyright: ignore[reportUnknownArgumentType]
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
            _same(a, b, f"{where}[{i}]")
    elif isinstance(found, float) and isinstance(expected, float):
        if not math.isclose(found, expected, rel_tol=1e-6, abs_tol=0 if where.endswith("alpha") else 1e-12):
            _refuse(where, found, expected)
    elif found != expected:
        _refuse(where, found, expected)


def _refuse(where: str, found: Any, expected: Any) -> None:
    raise BadRecord(
        f"{where}: found {found!r}; the counts give {expected!r}", "this certificate was changed or damaged"
    )
