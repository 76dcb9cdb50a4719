"""What the tests say of one probe set: one decision, with the p, levels and limits that belong to it (any process).

`compare` is a pure function of the counts. All that people read (table, sentence, page) is worded from `decision`,
so no two places say different things. The limits of the difference invert the tests: the lower one that for the
gain (at 0) or against the margin, the upper one that for harm (at 0). Where a test has no form of its own at other
differences (McNemar), the exact score test is inverted there, and the tested difference falls on the side that the
test says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from secondnature.evidence.power import EXACT_N, gain_n_needed, noninferiority_n_needed
from secondnature.evidence.statistics import (
    Cluster,
    clopper_pearson,
    cluster_sign_flip,
    difference_p,
    mcnemar_mid_p,
    noninferiority_p,
    scenario_counts,
    score_p,
    shifted_sign_flip,
)
from secondnature.records import Comparison, Decision, GateSettings, Losses, ProbeRole, TagTest

HOPELESS = 0.20
"""A guard with a lower pass rate before the lesson guards nothing: it is shown, not judged."""
POWER = 0.80
"""With this chance the n that is asked for would do."""
LEAST_LEVEL = 1e-300
"""No p is told apart from 0 below this; about a thousand retries."""
RESOLUTION = 5e-4
"""Of the limits: a twentieth of a point."""

TOGETHER = "earlier lessons, together"
"""Name of the set of all that was asked again of earlier lessons, where that is several sets: each may be too small
to show a harm that all of them share."""
Pins = tuple[int, int, int]
"""Of the pinned probes of a set: (how many, passed before, lost)."""
Family = Callable[[float], float]
"""The p of "the difference is at most this", for each difference."""


def level(gate: GateSettings, num_retries: int) -> float:
    """The level of the tests: halved for each earlier try with the same corrections."""
    return max(math.ldexp(gate.alpha, -num_retries), LEAST_LEVEL)


def shared_by(flips: Iterable[int], alpha: float) -> int:
    """Among how many sets of earlier lessons the level of harm is shared (Tarone 1990).

    A set in which so few scenarios changed that even all of them lost would show nothing costs no level: how many
    changed says nothing of the direction.

    Args:
        flips: per set, the scenarios with more gains than losses or the reverse.
        alpha: of all sets together.
    """
    least, share = [0.5 ** (k + 1) for k in flips], 1
    while sum(p <= alpha / share for p in least) > share:
        share += 1
    return share


def num_flipped(gains: int, losses: int, clusters: Sequence[Cluster]) -> int:
    """Scenarios of a set that have more gains than losses, or the reverse."""
    return sum(up != down for _, up, down in clusters) if clusters else gains + losses


def compare(
    *,
    name: str,
    role: ProbeRole,
    n: int,
    num_seeds: int,
    before: int,
    gains: int,
    losses: int,
    clusters: Sequence[Cluster],
    gate: GateSettings,
    num_retries: int = 0,
    pins: Pins = (0, 0, 0),
    lost: Losses | None = None,
    share: int = 1,
) -> Comparison:
    """Judge one probe set by its counts.

    Args:
        clusters: empty where each probe is a scenario of its own.
        share: among so many sets the level of harm is shared (`shared_by`).
    """
    decided = _of_tests(
        name, role, n, num_seeds, before, gains, losses, clusters, gate, num_retries, pins, gate.alpha / share
    )
    vetoed = _vetoed(decided, pins, [] if lost is None else [t for t in lost.tags if t.harmed])
    return decided.model_copy(
        update={
            "pinned": pins[0],
            "pinned_before": pins[1],
            "pinned_losses": pins[2],
            "lost": lost,
            **vetoed,
        }
    )


def _vetoed(c: Comparison, pins: Pins, harmed: Sequence[TagTest]) -> dict[str, Any]:
    """What one lost pin, or a tag that was destroyed, changes about a set; nothing where it was harmed anyway."""
    if c.decision == "harmed" or not (pins[2] or harmed):
        return {}
    note = ", ".join(f"{t.losses} of {t.before} in {t.tag}" for t in harmed)
    if pins[2]:
        note = f"{pins[2]} of {pins[0]} pinned"
    decision: Decision = "pin_lost" if pins[2] else "tag_harmed"
    return {"decision": decision, "passed": False, "note": note, "n_needed": None}


def margin_of(gate: GateSettings, role: ProbeRole, name: str) -> float | None:
    """The non-inferiority margin of a probe set; None for the gain."""
    margins = {"gain": None, "other": gate.other_margin}
    return margins[role] if role in margins else gate.margin_of(name)


def _of_tests(
    name: str,
    role: ProbeRole,
    n: int,
    num_seeds: int,
    before: int,
    gains: int,
    losses: int,
    clusters: Sequence[Cluster],
    gate: GateSettings,
    num_retries: int,
    pins: Pins,
    harm_alpha: float,
) -> Comparison:
    """What the tests of the whole set say, or its pins where it has no other probes."""
    alpha = level(gate, num_retries)
    after = before + gains - losses
    margin = margin_of(gate, role, name)
    mirrored = [(size, lost, gained) for size, gained, lost in clusters]
    harm_p = cluster_sign_flip(mirrored) if clusters else mcnemar_mid_p(losses, gains)
    counted: dict[str, Any] = {
        "name": name,
        "role": role,
        "n": n,
        "num_seeds": num_seeds,
        "before": before,
        "after": after,
        "gains": gains,
        "losses": losses,
        "before_interval": clopper_pearson(before, n),
        "after_interval": clopper_pearson(after, n),
        "alpha": alpha,
        "harm_p": harm_p,
        "harm_alpha": harm_alpha,
        "clusters": list(clusters),
    }
    if pins[0] == n and role != "gain":
        decision = "held" if before else "not_judged"
        note = "all pinned" if before else "none of them passed before the lesson: they guard nothing"
        passed = True if before else None
        return Comparison(**counted, method="pins/1", decision=decision, passed=passed, note=note)
    p, method = _p(n, gains, losses, clusters, margin)
    few, notes = too_few(role, n, num_seeds, gate)
    hopeless = role != "gain" and before < HOPELESS * n
    point, tested = (gains - losses) / n, 0.0 if margin is None else -margin
    shown, harm = p <= alpha and point > tested, harm_p <= harm_alpha and point < 0
    decision = _decide(role, shown, harm, few or hopeless, hopeless, gains > losses)
    if role != "retention" and decision in ("not_shown", "not_judged", "no_gain") and not hopeless:
        needed = _n_needed(role, margin, n, num_seeds, gains, losses, clusters, alpha, gate)
    else:
        needed = None
    if hopeless:
        notes = [f"passed only {before} of {n} before the lesson: it guards nothing and is not judged"]
    elif role == "retention" and decision == "not_judged":
        notes = [*notes, f"no harm is shown, nor a fall of {100 * (margin or 0):g} points ruled out"]
    if decision == "harmed":
        notes = []
    return Comparison(
        **counted,
        difference_interval=(
            _lower_limit(n, gains, losses, clusters, margin, alpha, shown),
            0.0 - _lower_limit(n, losses, gains, mirrored, None, harm_alpha, harm),  # and never -0.0
        ),
        margin=margin,
        method=method,
        p=p,
        decision=decision,
        passed=None if decision == "not_judged" else decision in ("gained", "held"),
        harmed=decision == "harmed",
        n_needed=needed,
        note="; ".join(notes),
    )


def _decide(role: ProbeRole, shown: bool, harm: bool, unjudged: bool, hopeless: bool, more: bool) -> Decision:
    """`shown` and `harm` are what the two tests say, `more` whether there are more gains than losses."""
    if harm and not shown and (role == "retention" or not hopeless):
        return "harmed"
    if unjudged:
        return "not_judged"
    if shown:
        return "gained" if role == "gain" else "held"
    if role == "retention":
        return "not_judged"  # it is asked to find harm; a set too small for more keeps nobody from a verdict
    return "no_gain" if role == "gain" and not more else "not_shown"


def _p(
    n: int, gains: int, losses: int, clusters: Sequence[Cluster], margin: float | None
) -> tuple[float, str]:
    """p of what is to be shown, and the name of the test."""
    if margin is None:
        if clusters:
            return cluster_sign_flip(clusters), "cluster-sign-flip/1"
        return mcnemar_mid_p(gains, losses), "mcnemar-midp/1"
    size, up, down = _observations(clusters, n, gains, losses)
    p = noninferiority_p(size, down, up, margin)
    if not clusters:
        return p, "exact-paired-noninferiority/1"
    p = max(p, shifted_sign_flip(clusters, -margin))
    return p, "exact-paired-noninferiority/1+scenario-means/1+shifted-sign-flip/1"


def _observations(clusters: Sequence[Cluster], n: int, gains: int, losses: int) -> tuple[int, float, float]:
    return scenario_counts(clusters) if clusters else (n, gains, losses)


def too_few(role: ProbeRole, n: int, num_seeds: int, gate: GateSettings) -> tuple[bool, list[str]]:
    """Whether there are fewer probes than the gate asks for, and what is said of their number."""
    if role == "gain":
        if n >= gate.min_gain_probes and num_seeds >= gate.min_gain_seeds:
            return False, []
        return True, [
            f"{n} probes from {num_seeds} scenarios; at least {gate.min_gain_probes} from "
            f"{gate.min_gain_seeds} are asked for"
        ]
    minimum = {"other": gate.min_other_probes, "guard": gate.min_guard_probes}.get(role, 0)
    notes = [f"{n} probes of {num_seeds} scenarios count as {num_seeds}"] if num_seeds < n else []
    return n < minimum, notes + ([f"at least {minimum} probes are asked for"] if n < minimum else [])


def _n_needed(
    role: ProbeRole,
    margin: float | None,
    n: int,
    num_seeds: int,
    gains: int,
    losses: int,
    clusters: Sequence[Cluster],
    alpha: float,
    gate: GateSettings,
) -> int | None:
    """How many probes with these flip rates would do; None where no number would."""
    size, up, down = _observations(clusters, n, gains, losses)
    few, _ = too_few(role, n, num_seeds, gate)
    if margin is None:
        needed = gain_n_needed(up / size, down / size, alpha, POWER)
        least = gate.min_gain_probes
        if num_seeds < gate.min_gain_seeds:
            least = max(least, math.ceil(gate.min_gain_seeds * n / num_seeds))
    else:
        needed = noninferiority_n_needed(up / size, down / size, margin, alpha, POWER)
        least = gate.min_other_probes if role == "other" else gate.min_guard_probes
    if needed is not None:
        return max(least, math.ceil(needed * n / size))
    return least if few else None


def _lower_limit(
    n: int,
    gains: int,
    losses: int,
    clusters: Sequence[Cluster],
    margin: float | None,
    alpha: float,
    shown: bool,
) -> float:
    """The lower limit of the difference: all below it is refused at `alpha`.

    What was tested (minus the margin, or 0) lies outside exactly where it was refused (`shown`), and the observed
    difference inside.
    """
    tested, point = (0.0 if margin is None else -margin), (gains - losses) / n
    outer, inner = (tested, max(point, tested)) if shown else (-1.0, min(point, tested))
    if not clusters:
        border = _border(lambda d: score_p(n, losses, gains, d), alpha, outer, inner)
        if n > EXACT_N:
            return border

        def exact(d: float) -> float:
            return difference_p(n, losses, gains, d)

        return _past_ripples(exact, alpha, outer, _border_near(exact, alpha, outer, inner, border), n)
    low = _border(lambda d: shifted_sign_flip(clusters, d), alpha, outer, inner)
    if margin is None:
        return low
    size, up, down = scenario_counts(clusters)
    return min(low, _border(lambda d: score_p(size, down, up, d), alpha, outer, inner))


def _border(p: Family, alpha: float, outer: float, inner: float) -> float:
    """By bisection: the smallest difference that is not refused, between one that is and one that is not."""
    while inner - outer > RESOLUTION:
        middle = (inner + outer) / 2
        if p(middle) <= alpha:
            outer = middle
        else:
            inner = middle
    return inner


def _past_ripples(p: Family, alpha: float, outer: float, border: float, n: int) -> float:
    """An exact p is not monotone: it ripples as the difference moves from one possible count to the next, so beyond
    the border another difference may not be refused. The outermost that is not, as far as a ripple reaches.
    """
    reach = math.ceil(1 / (n * RESOLUTION))
    k = 1
    while k <= reach and border - k * RESOLUTION > outer:
        if p(border - k * RESOLUTION) > alpha:
            border, k = border - k * RESOLUTION, 0
        k += 1
    return border


def _border_near(p: Family, alpha: float, outer: float, inner: float, guess: float) -> float:
    """The same, where each p costs and a guess is good: steps away from it until the border lies between two."""
    step = 8 * RESOLUTION
    refused = p(guess) <= alpha
    while True:
        outer, inner = (guess, inner) if refused else (outer, guess)
        guess += step if refused else -step
        if not outer < guess < inner:
            return _border(p, alpha, outer, inner)
        if (p(guess) <= alpha) != refused:
            return _border(p, alpha, *((outer, guess) if refused else (guess, inner)))
        step *= 2
