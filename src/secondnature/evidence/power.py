"""How many probes would do: power of the gain test and of the guards' test (any process; numpy and scipy only).

"Not enough evidence" is only useful with the n that would be enough. Power is summed exactly (not simulated) up
to `EXACT_N` probes, with the normal approximation beyond. It is a saw-tooth in n, because counts are whole: the n
found has the power asked for, a slightly larger n may miss it by a hair. The flip rate comes from the probes
themselves or from an A/A run (the same weights asked twice), whose flips are the floor under every lesson.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, sqrt

import numpy as np

from secondnature.evidence.statistics import (
    binomial_pmf,
    binomial_sf,
    fewest_gains,
    normal_quantile,
    p_at_score,
    tail,
    upper_quantile,
)

EXACT_N = 600
"""Above this many probes the normal approximation is within 2 % of the exact n."""
MAX_N = 100_000
"""More than this is nobody's probe set: the answer is None."""


def gain_power(n: int, gain_rate: float, loss_rate: float, alpha: float) -> float:
    """The chance that n probes with these flip rates show a gain (McNemar mid-p <= alpha)."""
    flip_rate = gain_rate + loss_rate
    if flip_rate <= 0 or n == 0:
        return 0.0
    flips = np.arange(1, n + 1)
    fewest, high = np.zeros(n, dtype=np.int64), flips + 1  # bisection, all numbers of flips at once
    while np.any(fewest < high):
        middle = (fewest + high) // 2
        above = binomial_sf(middle, flips, 0.5)
        enough = above + 0.5 * (binomial_sf(middle - 1, flips, 0.5) - above) <= alpha
        open_ = fewest < high
        high = np.where(open_ & enough, middle, high)
        fewest = np.where(open_ & ~enough, middle + 1, fewest)
    share = binomial_sf(fewest - 1, flips, gain_rate / flip_rate)
    return float((binomial_pmf(flips, n, min(flip_rate, 1.0)) * share).sum())


@lru_cache(maxsize=512)
def gain_n_needed(gain_rate: float, loss_rate: float, alpha: float, power: float = 0.8) -> int | None:
    """The n with which a gain of these rates is shown with the given power; None where there is no gain to show."""
    net, flip_rate = gain_rate - loss_rate, gain_rate + loss_rate
    if net <= 0:
        return None
    spread = upper_quantile(alpha) * sqrt(flip_rate) + normal_quantile(power) * sqrt(
        max(flip_rate - net**2, 0.0)
    )
    guess = spread**2 / net**2
    if guess > MAX_N:
        return None
    if guess > 5 * EXACT_N:
        return ceil(guess)
    low, high = 0, ceil(2 * guess) + 20  # power(low) < target <= power(high)
    while high - low > 1:
        middle = (low + high) // 2
        if gain_power(middle, gain_rate, loss_rate, alpha) >= power:
            high = middle
        else:
            low = middle
    return high


@lru_cache(maxsize=1024)
def critical_score(n: int, margin: float, alpha: float) -> float:
    """The smallest score statistic that is significant with n probes in the exact non-inferiority test."""
    around = upper_quantile(alpha)
    low, high = max(0.0, around - 1), around + 1.5
    if p_at_score(n, high, margin) > alpha:  # so few probes that nothing may be significant
        return float("inf")
    for _ in range(14):
        middle = (low + high) / 2
        if p_at_score(n, middle, margin) <= alpha:
            high = middle
        else:
            low = middle
    return high


def noninferiority_power(n: int, gain_rate: float, loss_rate: float, margin: float, alpha: float) -> float:
    """The chance that n probes pass the exact non-inferiority test when flips have these rates."""
    bound = fewest_gains(n, critical_score(n, margin, alpha), margin)
    return float(tail(n, bound, np.array([gain_rate]), np.array([loss_rate]))[0])


@lru_cache(maxsize=512)
def noninferiority_n_needed(
    gain_rate: float, loss_rate: float, margin: float, alpha: float, power: float = 0.8
) -> int | None:
    """The n with which a set with these flip rates passes its guard with the given power.

    None where the drop reaches the margin (no n would do) or more than `MAX_N` would be needed.
    """
    room = margin + gain_rate - loss_rate
    if room <= 0:
        return None
    linear = gain_rate * (1 - margin) + loss_rate * (1 + margin) + 2 * margin
    loss_null = (linear + sqrt(linear**2 - 8 * loss_rate * margin * (1 + margin))) / 4
    null = 2 * loss_null - margin - margin**2
    true = max(gain_rate + loss_rate - (gain_rate - loss_rate) ** 2, 0.0)
    guess = (upper_quantile(alpha) * sqrt(null) + normal_quantile(power) * sqrt(true)) ** 2 / room**2
    if guess > MAX_N:
        return None
    if guess > EXACT_N:
        return ceil(guess)
    low, high = int(0.6 * guess), ceil(1.3 * guess) + 20
    while high - low > 1:
        middle = (low + high) // 2
        if noninferiority_power(middle, gain_rate, loss_rate, margin, alpha) >= power:
            high = middle
        else:
            low = middle
    return high
