"""How figures are written on the page: units, spreads, tables (measures nothing)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Spread = dict[str, float]
Format = Callable[[float], str]


def ms(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def mb(size: float) -> str:
    return f"{size / 1e6:.3g} MB" if size < 1e8 else f"{size / 1e6:.0f} MB"


def seconds(value: float) -> str:
    """For what takes long: seconds from ten on."""
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s" if value >= 1 else ms(value)


def times(value: float) -> str:
    return f"{value:.2f}×"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def percent(value: float) -> str:
    return f"{value:.1%}" if abs(value) >= 0.01 else f"{value:.2%}"


def both(found: Spread, form: Format) -> str:
    """The median, and the smallest and the largest value behind it."""
    return f"{form(found['median'])} ({form(found['low'])} to {form(found['high'])})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
