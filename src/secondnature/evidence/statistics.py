"""The tests behind the gate: paired counts in, p values and intervals out (any process; numpy and scipy only).

Everything is paired: the same probes before and after a lesson, so only the flips carry information. All tests
are one-sided and computed from counts, without random numbers, so that a certificate can be recomputed to the
digit. `gains` are probes that went fail -> pass, `losses` pass -> fail. Sources: McNemar mid-p (Fagerland,
Lydersen, Laake 2013); score statistic for paired differences (Tango 1998) and the exact unconditional test ordered
by it (Hsueh, Liu, Chen 2001); log-linear correction of d' (Hautus 1995). Sample sizes: `power`; alarm: `alarm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import asin, exp, pi, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

Floats = NDArray[np.float64]
Cluster = tuple[int, int, int]
"""(n, gains, losses) of the probes that share one scenario seed."""

_TIE = 1e-9
"""Two score statistics closer than this are the same outcome, whatever the order of the additions was."""
_LEAST_LOG_MASS = -40.0
LEFT_OUT = exp(_LEAST_LOG_MASS)
"""Numbers of losses less likely than this are not summed."""


def normal_quantile(q: float) -> float:
    """The standard normal quantile: z with P(Z <= z) = q."""
    return float(special.ndtri(q))


def upper_quantile(alpha: float) -> float:
    """z with P(Z > z) = alpha; finite also where 1 - alpha would round to 1."""
    return -float(special.ndtri(alpha))


def binomial_sf(k: Any, n: Any, p: Any) -> Floats:
    """P(X > k) for X ~ Binomial(n, p), element by element; k may be -1 or >= n."""
    k, n = np.asarray(k, dtype=np.float64), np.asarray(n, dtype=np.float64)
    inside = (k >= 0) & (k < n)
    value = special.betainc(np.where(inside, k, 0) + 1, np.where(inside, n - k, 1), p)
    return np.where(inside, value, np.where(k < 0, 1.0, 0.0))


def binomial_pmf(k: Any, n: Any, p: float) -> Floats:
    """P(X = k) for X ~ Binomial(n, p), element by element; 0 <= k <= n."""
    return np.exp(log_choose(n, k) + special.xlogy(k, p) + special.xlog1py(n - k, -p))


def log_choose(n: Any, k: Any) -> Floats:
    """Logarithm of the binomial coefficient."""
    return np.asarray(special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1))


def concentration_p(population: int, drawn: int, marked: int, found: int) -> float:
    """P(X >= found): so many of the `drawn` are `marked`, were they drawn from the `population` at random.

    The exact (Fisher, hypergeometric) one-sided test, all four margins given.

    Raises:
        ValueError: counts that no draw can have.
    """
    if not (0 <= found <= min(drawn, marked) and max(drawn, marked) <= population >= drawn + marked - found):
        raise ValueError(
            f"found population={population}, drawn={drawn}, marked={marked}, found={found}; "
            "expected parts of a population"
        )
    if found <= max(0, drawn + marked - population):
        return 1.0
    k = np.arange(found, min(drawn, marked) + 1)
    log_mass = log_choose(marked, k) + log_choose(population - marked, drawn - k)
    return float(min(1.0, np.exp(log_mass - log_choose(population, drawn)).sum()))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order of `ps`: the chance of a false claim among all keeps a level."""
    adjusted, largest = [1.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def check_counts(n: int, gains: float, losses: float) -> None:
    """Refuse counts that no set of n probes can have.

    Raises:
        ValueError: negative, or more flips than probes.
    """
    if n < 0 or gains < 0 or losses < 0 or gains + losses > n + _TIE:
        raise ValueError(f"found n={n}, gains={gains}, losses={losses}; expected 0 <= gains + losses <= n")


def mcnemar_mid_p(gains: int, losses: int) -> float:
    """One-sided McNemar mid-p: how likely are so many gains among the flips if gain and loss were equally likely.

    P(X > gains) + P(X = gains) / 2 with X ~ Binomial(gains + losses, 1/2); 0.5 where nothing flipped. Less timid
    than the exact test; with 60 probes or more its true level at alpha 0.025 is at most 0.030 (found with 137
    probes that *all* flip; computed in the tests).
    """
    check_counts(gains + losses, gains, losses)
    flips = gains + losses
    above = float(binomial_sf(gains, flips, 0.5))
    return above + 0.5 * (float(binomial_sf(gains - 1, flips, 0.5)) - above)


def cluster_sign_flip(clusters: Sequence[Cluster]) -> float:
    """Exact one-sided sign-flip test of sum(gains - losses), one sign per scenario seed.

    Under "no effect" the net change of a seed is as likely to be +d as -d, whatever the dependence of the probes
    within it. The net changes are integers, so the whole distribution of the sum is a convolution: exact for any
    number of seeds, no sampling. With one probe per seed it is the exact (not mid-p) McNemar test.
    """
    return _sign_flips([gains - losses for _, gains, losses in clusters])


def _sign_flips(values: Sequence[int]) -> float:
    """The share of all choices of signs whose sum is at least that of `values`."""
    sizes = [abs(v) for v in values if v]
    reach = sum(sizes)
    mass = np.zeros(2 * reach + 1)  # index: sum + reach
    mass[reach] = 1.0
    for size in sizes:
        mass = 0.5 * (np.roll(mass, size) + np.roll(mass, -size))
    return float(min(1.0, mass[reach + sum(values) :].sum()))


def shifted_sign_flip(clusters: Sequence[Cluster], shift: float) -> float:
    """One-sided sign-flip test of "the change is `shift`", the net change of each scenario less its share of it.

    At 0 it is `cluster_sign_flip`. Elsewhere it takes the shifted changes as symmetric, and as whole multiples of
    1 / 4096 of their sum.
    """
    if shift == 0:
        return cluster_sign_flip(clusters)
    values = np.array([gains - losses - shift * size for size, gains, losses in clusters])
    total = float(np.abs(values).sum())
    if total == 0:
        return 1.0
    return _sign_flips([round(4096 * float(v) / total) for v in values])


def score_z(n: Any, gains: Any, losses: Any, shift: float) -> Floats:
    """Tango's score statistic of H0: rate after - rate before = `shift`; large values speak for a larger change.

    Vectorised over counts. The nuisance rate is its maximum-likelihood value under H0 (a quadratic). Source: Tango
    1998, Statistics in Medicine 17, eq. 9 ff.
    """
    n, b, c = (np.asarray(v, dtype=np.float64) for v in (n, gains, losses))
    linear = b * (1 + shift) + c * (1 - shift) - 2 * n * shift
    root = np.sqrt(np.maximum(linear**2 + 8 * n * c * shift * (1 - shift), 0.0))
    loss_rate = (linear + root) / (4 * n)
    variance = np.maximum(n * (2 * loss_rate + shift - shift**2), 0.0)
    distance = b - c - n * shift
    flat = variance <= _TIE
    limit = np.where(distance > _TIE, np.inf, np.where(distance < -_TIE, -np.inf, 0.0))
    return np.where(flat, limit, distance / np.sqrt(np.where(flat, 1.0, variance)))


def fewest_gains(n: int, z: float, margin: float) -> NDArray[np.int64]:
    """For 0..n losses: the fewest gains with a statistic >= z (n - losses + 1 where there are none)."""
    losses = np.arange(n + 1)
    low, high = np.zeros(n + 1, dtype=np.int64), n - losses + 1
    while np.any(low < high):
        middle = (low + high) // 2
        enough = score_z(n, np.minimum(middle, n - losses), losses, -margin) >= z - _TIE
        open_ = low < high
        high = np.where(open_ & enough, middle, high)
        low = np.where(open_ & ~enough, middle + 1, low)
    return low


def tail(n: int, bound: NDArray[np.int64], gain_rate: Floats, loss_rate: Floats) -> Floats:
    """P(gains >= bound[losses]) for the trinomial (n; gain_rate, loss_rate), for each pair of rates.

    `bound`: [n + 1], one per number of losses; rates: [R]. Returns [R].
    """
    losses = np.arange(n + 1, dtype=np.float64)[:, None]
    log_mass = (
        log_choose(n, losses) + special.xlogy(losses, loss_rate) + special.xlog1py(n - losses, -loss_rate)
    )
    rest = np.maximum(1 - loss_rate, 1e-300)
    row, column = np.nonzero((log_mass > _LEAST_LOG_MASS) & (bound[:, None] <= n - losses))
    given = np.minimum(gain_rate / rest, 1.0)[column]
    terms = np.exp(log_mass[row, column]) * binomial_sf(bound[row] - 1, n - row, given)
    return np.bincount(column, weights=terms, minlength=len(gain_rate)).astype(np.float64)


def _worst_tail(n: int, bound: NDArray[np.int64], margin: float) -> float:
    """The supremum of `tail` over all pairs of rates whose difference (gain - loss) is -`margin`.

    The smaller rate u runs over [0, (1 - |margin|) / 2]. The tail ripples in u, evenly on the arcsine scale of the
    flip rate 2 u + |margin|: there the grid is even.
    """
    apart = abs(margin)
    angles: Floats = np.linspace(asin(sqrt(apart)), pi / 2, 40 + int(4 * sqrt(n)))
    best = 0.0
    for zoom in range(3):
        us: Floats = np.minimum(np.maximum((np.sin(angles) ** 2 - apart) / 2, 0), (1 - apart) / 2)
        values = tail(n, bound, us + max(-margin, 0.0), us + max(margin, 0.0))
        best = max(best, float(values.max()))
        inner = np.r_[-1.0, values, -1.0]
        peaks = np.nonzero((inner[1:-1] >= inner[:-2]) & (inner[1:-1] >= inner[2:]))[0]
        peaks = peaks[np.argsort(values[peaks])[-4 if zoom == 0 else -1 :]]
        pieces = [np.linspace(angles[max(i - 1, 0)], angles[min(i + 1, len(angles) - 1)], 13) for i in peaks]
        angles = np.unique(np.concatenate(pieces))
    return min(1.0, best)


def p_at_score(n: int, z: float, margin: float) -> float:
    """The exact p value of a score statistic z: the largest P(Z >= z) over all nuisance rates at the margin.

    What `tail` leaves out as negligible is added, so that a p is never stated smaller than it is.
    """
    return min(1.0, _worst_tail(n, fewest_gains(n, z, margin), margin) + (n + 1) * LEFT_OUT)


@lru_cache(maxsize=4096)
def noninferiority_p(n: int, losses: float, gains: float, margin: float) -> float:
    """Exact paired non-inferiority: p of H0 "the pass rate fell by `margin` or more".

    The supremum over the nuisance gain rate of P(Z >= Z_observed), by summing the trinomial; Z is Tango's score
    statistic, which alone (with normal quantiles) is too liberal at small n. Exact up to the search for the
    supremum (a grid, refined twice; relative error below 1e-3 in the tests).

    Raises:
        ValueError: counts that no set can have, or a margin outside (0, 1).
    """
    check_counts(n, gains, losses)
    if not 0 < margin < 1:
        raise ValueError(f"found margin {margin}; expected a share between 0 and 1")
    return difference_p(n, losses, gains, -margin)


@lru_cache(maxsize=4096)
def difference_p(n: int, losses: float, gains: float, shift: float) -> float:
    """Exact p of H0 "pass rate after - pass rate before <= `shift`", -1 < shift < 1: the family to which the
    non-inferiority test belongs, and whose inversion gives limits of the difference.
    """
    if n == 0:
        return 1.0
    return p_at_score(n, float(score_z(n, gains, losses, shift)), -shift)


def score_p(n: int, losses: float, gains: float, shift: float) -> float:
    """`difference_p` with the normal distribution of the score statistic instead of its exact one."""
    if n == 0:
        return 1.0
    return float(special.ndtr(-score_z(n, gains, losses, shift)))


def scenario_counts(clusters: Sequence[Cluster]) -> tuple[int, float, float]:
    """(n, gains, losses) where probes share scenarios: one observation per scenario, the mean of its probes.

    Safe whatever the dependence within a scenario: each mean lies between the values that a single probe can have
    and scatters no more than one, so the exact test for n single probes is conservative for the n means. Counting
    the probes as independent is not (the tests simulate both).
    """
    gains = sum(gained / size for size, gained, _ in clusters)
    losses = sum(lost / size for size, _, lost in clusters)
    return len(clusters), gains, losses


def difference_interval(n: int, gains: float, losses: float, confidence: float = 0.95) -> tuple[float, float]:
    """Tango's score interval of (pass rate after - pass rate before), paired; (-1, 1) without probes.

    It inverts the statistic that orders the exact test, with normal quantiles: near the border the exact test may
    still say no where the interval just clears the margin.
    """
    check_counts(n, gains, losses)
    if n == 0:
        return (-1.0, 1.0)
    z = normal_quantile(0.5 + confidence / 2)
    point = (gains - losses) / n

    def border(outer: float, bound: float) -> float:
        inner = point
        for _ in range(40):
            middle = (inner + outer) / 2
            if float(score_z(n, gains, losses, middle)) * bound < z:
                inner = middle
            else:
                outer = middle
        return inner

    return (border(-1.0, 1.0), border(1.0, -1.0))


def clopper_pearson(passed: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact binomial interval (for certificates): it covers at least as often as it says; (0, 1) for n = 0."""
    check_counts(n, passed, 0)
    tail_ = (1 - confidence) / 2
    low = float(special.betaincinv(passed, n - passed + 1, tail_)) if passed else 0.0
    high = float(special.betaincinv(passed + 1, n - passed, 1 - tail_)) if passed < n else 1.0
    return (low, high)


def wilson(passed: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (for pictures): right on average, narrower than Clopper-Pearson; (0, 1) for n = 0."""
    check_counts(n, passed, 0)
    if n == 0:
        return (0.0, 1.0)
    z = normal_quantile(0.5 + confidence / 2)
    rate, weight = passed / n, 1 + z**2 / n
    centre = (rate + z**2 / (2 * n)) / weight
    half = z * sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / weight
    return (max(0.0, centre - half), min(1.0, centre + half))


def d_prime(hits: int, n_right: int, false_accepts: int, n_other: int) -> float:
    """z(hit rate) - z(false-accept rate), log-linear corrected: 0 for one who answers all alike (a yes-sayer)."""
    check_counts(n_right, hits, 0)
    check_counts(n_other, false_accepts, 0)
    return normal_quantile((hits + 0.5) / (n_right + 1)) - normal_quantile(
        (false_accepts + 0.5) / (n_other + 1)
    )


def z_moments(n: int, before: int, after: int, losses: int) -> tuple[float, float]:
    """(variance of z after, variance of z after - z before) for paired pass rates, by the delta method.

    z is the normal quantile of the log-linear corrected rate. Both passed: `before - losses`.
    """
    rate_b, rate_a = (before + 0.5) / (n + 1), (after + 0.5) / (n + 1)
    both = (before - losses + 0.25) / (n + 1)
    slope_b, slope_a = (exp(-(normal_quantile(r) ** 2) / 2) / sqrt(2 * pi) for r in (rate_b, rate_a))
    var_b, var_a = rate_b * (1 - rate_b) / (n * slope_b**2), rate_a * (1 - rate_a) / (n * slope_a**2)
    shared = (both - rate_a * rate_b) / (n * slope_a * slope_b)
    return var_a, max(var_a + var_b - 2 * shared, 0.0)
