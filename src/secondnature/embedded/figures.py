"""Rates with their exact intervals, as the model card holds them (no torch)."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import beta


def interval(passed: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a rate (Clopper and Pearson 1934)."""
    alpha = 1.0 - confidence
    low = 0.0 if passed == 0 else float(beta.ppf(alpha / 2, passed, n - passed + 1))
    high = 1.0 if passed == n else float(beta.ppf(1 - alpha / 2, passed + 1, n - passed))
    return low, high


def figure(passed: Sequence[bool]) -> dict[str, float | int]:
    """Counts, rate and interval of a list of outcomes, which must not be empty."""
    low, high = interval(sum(passed), len(passed))
    return {
        "n": len(passed),
        "passed": sum(passed),
        "rate": round(sum(passed) / len(passed), 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }
