"""What probe sets could show: the smallest fall they rule out, the smallest gain they show, the chance that they
pass a lesson that changes nothing else (any process).

Said before a lesson, when it still helps, and beside a set that said too little. "At best" is where nothing flips
the wrong way; "usually" where answers flip by themselves at a stated rate, both ways alike, as often as it gives.
All by the gate's own tests at its own level; a scenario counts once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import prod, sqrt

from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from secondnature.evidence.decision import TOGETHER, level, margin_of, too_few
from secondnature.evidence.power import EXACT_N, noninferiority_power
from secondnature.evidence.statistics import (
    cluster_sign_flip,
    mcnemar_mid_p,
    noninferiority_p,
    upper_quantile,
)
from secondnature.records import GateSettings, Probe, ProbeRole, Reach, Reaches

__all__ = ["FLIP_RATE", "reach", "reaches"]

FLIP_RATE = 0.04
"""Of answers that change their verdict although the weights did not: assumed where nothing was measured
(`secondnature doctor --probes` measures it)."""
RESOLUTION = 5e-4


def reach(
    *,
    name: str,
    role: ProbeRole,
    n: int,
    num_seeds: int,
    gate: GateSettings,
    num_retries: int = 0,
    flip_rate: float = FLIP_RATE,
    pinned: int = 0,
    share: int = 1,
) -> Reach:
    """What n probes of so many scenarios could show under this gate. `share`: as in `compare`."""
    alpha, margin = level(gate, num_retries), margin_of(gate, role, name)
    size = min(n, num_seeds)
    flips = round(size * flip_rate / 2)
    few, _ = too_few(role, n, num_seeds, gate)
    if pinned == n and role != "gain":
        at_best = usual = margin = None
        few, chance = False, None
    elif role == "retention":  # it must rule out nothing; what it shows is harm
        levels = ((0, gate.alpha), (flips, gate.alpha / share))
        at_best, usual = (_smallest_gain(size, k, a, several=num_seeds < n) for k, a in levels)
        margin = chance = None
    elif margin is None:
        at_best, usual = (_smallest_gain(size, lost, alpha, several=num_seeds < n) for lost in (0, flips))
        chance = None
    else:
        at_best, usual = (_smallest_fall(size, k, alpha) for k in (0, flips))
        chance = 0.0 if few else _chance(size, flip_rate / 2, margin, alpha)
    return Reach(
        name=name,
        role=role,
        n=n,
        num_seeds=num_seeds,
        pinned=pinned,
        margin=margin,
        at_best=at_best,
        usual=usual,
        flip_rate=flip_rate,
        too_few=few,
        chance=chance,
    )


def reaches(
    probes: Sequence[Probe],
    behaviour: str,
    gate: GateSettings,
    num_retries: int = 0,
    retained: Mapping[str, Sequence[Probe]] | None = None,
) -> Reaches | None:
    """What the probes of a lesson could show, set by set; None where there are none.

    `retained`: what is asked again of earlier lessons, by the name of each set.
    """
    sets: dict[tuple[int, str], list[Probe]] = defaultdict(list)
    roles: tuple[ProbeRole, ...] = ("gain", "other", "guard")
    for probe in {p.digest(): p for p in probes}.values():
        role = 2 if probe.behaviour != behaviour else int(probe.side == "other")
        sets[role, probe.behaviour].append(probe)
    found = [
        reach(
            name=name,
            role=roles[role],
            n=len(of),
            num_seeds=len({p.cluster for p in of}),
            gate=gate,
            num_retries=num_retries,
            pinned=sum(p.pin for p in of),
        )
        for (role, name), of in sorted(sets.items())
    ]
    found += _of_earlier(retained or {}, gate)
    if not found:
        return None
    chances = [r.chance for r in found if r.chance is not None]
    return Reaches(
        alpha=level(gate, num_retries), sets=found, chance=prod(chances) if chances else None, gate=gate
    )


def _of_earlier(retained: Mapping[str, Sequence[Probe]], gate: GateSettings) -> list[Reach]:
    """What the sets of earlier lessons could show, each and, where they are several, together."""
    sizes = {
        name: (len(of), len({p.cluster for p in of}), sum(p.pin for p in of)) for name, of in retained.items()
    }
    if len(sizes) > 1:
        n, num_seeds = (sum(size[i] for size in sizes.values()) for i in (0, 1))
        sizes[TOGETHER] = (n, num_seeds, 0)
    return [
        reach(name=name, role="retention", n=n, num_seeds=k, gate=gate, pinned=pinned, share=len(sizes))
        for name, (n, k, pinned) in sizes.items()
    ]


def _smallest_gain(n: int, lost: int, alpha: float, *, several: bool) -> float | None:
    """The smallest gain (a share, net) that n scenarios show where so many are lost; None: they show none.

    `several`: scenarios have several probes, so the exact sign-flip test judges, not the mid-p of McNemar's.
    """

    def p(gained: int) -> float:
        return (
            cluster_sign_flip([(1, 1, 0)] * gained + [(1, 0, 1)] * lost)
            if several
            else mcnemar_mid_p(gained, lost)
        )

    gained = next((k for k in range(lost + 1, n - lost + 1) if p(k) <= alpha), None)
    return None if gained is None else (gained - lost) / n


def _smallest_fall(n: int, flips: int, alpha: float) -> float | None:
    """The smallest fall (a share) that is ruled out where so many are lost and as many gained."""

    def ruled_out(margin: float) -> bool:
        return noninferiority_p(n, flips, flips, margin) <= alpha

    return _bisect(ruled_out) if n and 2 * flips <= n and ruled_out(1 - RESOLUTION) else None


def _bisect(holds: Callable[[float], bool]) -> float:
    low, high = 0.0, 1 - RESOLUTION
    while high - low > RESOLUTION:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _chance(n: int, rate: float, margin: float, alpha: float) -> float:
    """That a guard passes where losses and gains have this rate each; beyond `EXACT_N` the normal approximation."""
    if n <= EXACT_N:
        return noninferiority_power(n, rate, rate, margin, alpha)
    if rate == 0:
        return float(noninferiority_p(n, 0, 0, margin) <= alpha)
    linear = 2 * rate + 2 * margin
    null = (linear + sqrt(linear**2 - 8 * rate * margin * (1 + margin))) / 2 - margin - margin**2
    return float(special.ndtr((margin * sqrt(n) - upper_quantile(alpha) * sqrt(null)) / sqrt(2 * rate)))
