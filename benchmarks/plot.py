"""Log-log charts as SVG files of their own, drawn by hand; colours hold on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#0b7285", "#d9480f", "#5f3dc4")
WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 44, 40


@dataclass(frozen=True)
class Line:
    """Points of one contender."""

    name: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One chart: what is drawn over what."""

    title: str
    x_label: str
    lines: list[Line]


def svg(panels: Sequence[Panel], *, title: str) -> str:
    """The charts side by side, as the text of a file."""
    width = WIDTH * len(panels)
    body = "".join(_panel(panel, i * WIDTH) for i, panel in enumerate(panels))
    style = (
        "text{font:11px sans-serif;fill:#868e96}.title{font-weight:600;font-size:12px}"
        "line{stroke:#868e96;stroke-opacity:.3}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" '
        f'height="{HEIGHT}" role="img"><title>{escape(title)}</title><style>{style}</style>{body}</svg>\n'
    )


def _panel(panel: Panel, left: float) -> str:
    xs = [x for line in panel.lines for x, _ in line.points]
    ys = [y for line in panel.lines for _, y in line.points]
    x_low, x_high = _ends(xs, 2)
    y_low, y_high = _ends(ys, 10)

    def px(x: float) -> float:
        share = (math.log(x) - math.log(x_low)) / (math.log(x_high) - math.log(x_low))
        return left + LEFT + share * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        share = (math.log(y) - math.log(y_low)) / (math.log(y_high) - math.log(y_low))
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [_text(left + LEFT, 14, panel.title, "start", "title")]
    for y in _ticks(y_low, y_high):
        parts.append(_rule(left + LEFT, py(y), left + WIDTH - RIGHT, py(y)))
        parts.append(_text(left + LEFT - 6, py(y) + 4, _short(y), "end"))
    ticks = sorted(set(xs))
    shown = ticks[:: math.ceil(len(ticks) / 8)]
    for x in shown:
        parts.append(_text(px(x), HEIGHT - BOTTOM + 16, _short(x), "middle"))
    parts.append(_text(left + (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, panel.x_label, "middle"))
    along = left + LEFT
    for colour, line in zip(COLOURS, panel.lines, strict=False):
        at = [(px(x), py(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts.extend(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.8" fill="{colour}"/>' for x, y in at)
        parts.append(f'<circle cx="{along + 4:.1f}" cy="28" r="4" fill="{colour}"/>')
        parts.append(_text(along + 12, 32, line.name, "start"))
        along += 24 + 6.2 * len(line.name)
    return "".join(parts)


def _ends(values: Sequence[float], least: float) -> tuple[float, float]:
    """The range of an axis; at least a factor of `least` wide."""
    low, high = min(values), max(values)
    return (low, high) if high >= least * low else (low / math.sqrt(least), high * math.sqrt(least))


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within the range; fewer where there would be more than seven."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    return found if len(found) <= 7 else [t for t in found if str(f"{t:e}")[0] == "1"]


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size and not (size == 1e3 and value < 1e4):
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _text(x: float, y: float, text: str, anchor: str, css: str = "") -> str:
    kind = f' class="{css}"' if css else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
