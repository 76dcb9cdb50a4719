"""Small charts as inline SVG, drawn by hand: no dependency, no script, nothing fetched (process D).

Every chart has a title and a description that says its figures in words; lines differ by dash and marker as well as
by colour. Colours are CSS classes, so that dark mode and print follow the page. All text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from markupsafe import Markup, escape

Point = tuple[float, float]
Scale = Callable[[float], float]

WIDTH, HEIGHT = 360, 216
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 30, 36
MAX_POINTS = 300


@dataclass(frozen=True)
class Series:
    """One line: points (x, y), an optional band of (x, low, high), and how it is drawn."""

    name: str
    points: list[Point]
    css: Literal["right", "other", "plain"] = "plain"
    band: list[tuple[float, float, float]] = field(default_factory=list[tuple[float, float, float]])
    jumps: bool = False
    """Hold each value until the next one, as a step."""


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that cover [low, high], about `wanted` of them."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = power * min((1, 2, 5, 10), key=lambda m: abs(math.log(m * power / raw)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` points: of each stretch the lowest and the highest, so that spikes stay."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept.extend(sorted(ends))
    return kept


def picture(body: str, *, width: float, height: float, key: str, title: str, text: str, css: str) -> Markup:
    """An `svg` element that scales with its column and tells its content to a screen reader."""
    return Markup(
        '<svg class="{css}" viewBox="0 0 {w:g} {h:g}" role="img" aria-labelledby="{key}-t {key}-d">'
        '<title id="{key}-t">{title}</title><desc id="{key}-d">{text}</desc>{body}</svg>'
    ).format(css=css, w=width, h=height, key=key, title=title, text=text, body=Markup(body))  # noqa: S704


def label(x: float, y: float, text: str, css: str = "tick", anchor: str = "middle") -> str:
    """A text element, escaped."""
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _tick_text(value: float, step: float, unit: str) -> str:
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    return f"{value:.{digits}f}{unit}".replace("-", "−")


def chart(
    series: Sequence[Series],
    *,
    key: str,
    title: str,
    text: str,
    x_label: str = "step",
    zero: bool = False,
    y_range: tuple[float, float] | None = None,
    unit: str = "",
) -> Markup:
    """A line chart over steps: smooth lines with bands, or steps; the legend stands above the plot.

    `zero` draws the zero line; `y_range` fixes the axis (else it follows the data).
    """
    ys = [y for s in series for _, y in s.points] + [v for s in series for _, *b in s.band for v in b]
    xs = [x for s in series for x, _ in s.points]
    low, high = y_range or (min([*ys, 0.0] if zero else ys), max([*ys, 0.0] if zero else ys))
    y_ticks = ticks(low, high)
    x_low, x_high = min(xs), max(xs)
    x_high = x_high if x_high > x_low else x_low + 1
    x_ticks = [t for t in ticks(x_low, x_high, 5) if x_low <= t <= x_high and t == int(t)]

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    step = y_ticks[1] - y_ticks[0]
    parts: list[str] = []
    for t in y_ticks:
        parts.append(_line(LEFT, py(t), WIDTH - RIGHT, py(t), "zero" if zero and t == 0 else "grid"))
        parts.append(label(LEFT - 6, py(t) + 4, _tick_text(t, step, unit), anchor="end"))
    parts.extend(label(px(t), HEIGHT - BOTTOM + 16, f"{t:g}") for t in x_ticks)
    parts.append(label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label))
    for s in series:
        parts.append(_band(s, px, py))
        parts.append(_curve(s, px, py))
    parts.append(_legend(series))
    return picture("".join(parts), width=WIDTH, height=HEIGHT, key=key, title=title, text=text, css="chart")


def _band(s: Series, px: Scale, py: Scale) -> str:
    if len(s.band) < 2:
        return ""
    band = s.band[:: max(1, math.ceil(len(s.band) / MAX_POINTS))]
    ring = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
    return f'<polygon class="band {s.css}" points="{_path(ring, px, py)}"/>'


def _curve(s: Series, px: Scale, py: Scale) -> str:
    points = thin(s.points)
    drawn = points
    if s.jumps:
        drawn = points[:1]
        for (_, y0), (x1, y1) in pairwise(points):
            drawn = [*drawn, (x1, y0), (x1, y1)]
    parts = [f'<polyline class="curve {s.css}" points="{_path(drawn, px, py)}"/>']
    if len(points) <= 40:
        parts.extend(_marker(px(x), py(y), s.css) for x, y in points)
    return "".join(parts)


def _path(points: Sequence[Point], px: Scale, py: Scale) -> str:
    return " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)


def _marker(x: float, y: float, css: str) -> str:
    if css == "other":
        return f'<rect class="marker {css}" x="{x - 2.8:.1f}" y="{y - 2.8:.1f}" width="5.6" height="5.6"/>'
    return f'<circle class="marker {css}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'


def _legend(series: Sequence[Series]) -> str:
    parts: list[str] = []
    x = float(LEFT)
    for s in series:
        if s.css == "plain":
            continue
        parts.append(_line(x, 10, x + 22, 10, f"curve {s.css}"))
        parts.append(_marker(x + 11, 10, s.css))
        parts.append(label(x + 28, 14, s.name, "name", "start"))
        x += 44 + 6.4 * len(s.name)
    return "".join(parts)


def whisker(
    before: tuple[float, tuple[float, float]],
    after: tuple[float, tuple[float, float]],
    *,
    key: str,
    title: str,
    text: str,
    tone: str,
) -> Markup:
    """Two shares with their intervals on one axis from 0 to 100 %: before hollow above, after filled below."""
    width, height, left = 220.0, 46.0, 8.0

    def px(share: float) -> float:
        return left + share * (width - 2 * left)

    parts = [_line(px(t / 4), 2, px(t / 4), 32, "grid") for t in range(5)]
    parts += [label(px(t), 43, f"{100 * t:.0f}", "tick small") for t in (0, 0.5, 1)]
    for y, css, (share, (low, high)) in ((11, "before", before), (24, f"after tone-{tone}", after)):
        parts.append(_line(px(low), y, px(high), y, f"whisker {css}"))
        parts += [_line(px(end), y - 3.5, px(end), y + 3.5, f"whisker {css}") for end in (low, high)]
        parts.append(f'<circle class="dot {css}" cx="{px(share):.1f}" cy="{y}" r="4.2"/>')
    return picture(
        "".join(parts), width=width, height=height, key=key, title=title, text=text, css="whiskers"
    )


def strips(rows: Sequence[tuple[str, list[float], float]], *, key: str, title: str, text: str) -> Markup:
    """Rows of dots on one logarithmic axis with a bar at the mean: (name, values per prompt, mean)."""
    positive = [v for _, values, mean in rows for v in [*values, mean] if v > 0]
    low = math.floor(math.log10(min(positive, default=1e-3)))
    low = max(low, math.floor(math.log10(max(positive, default=1.0))) - 5)
    high = max(math.ceil(math.log10(max(positive, default=1.0))), low + 1)
    width, left, right, row = 360.0, 76.0, 16.0, 40.0
    height = row * len(rows) + 30

    def px(value: float) -> float:
        place = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return left + place * (width - left - right)

    parts: list[str] = []
    for exponent in range(low, high + 1):
        parts.append(_line(px(10.0**exponent), 4, px(10.0**exponent), height - 26, "grid"))
        parts.append(label(px(10.0**exponent), height - 12, f"{10.0**exponent:g}"))
    for i, (name, values, mean) in enumerate(rows):
        y = row * i + 22
        css = "right" if i == 0 else "other"
        parts.append(label(left - 10, y + 4, name, "name", "end"))
        for j, value in enumerate(values[:MAX_POINTS]):
            jitter = ((j * 7) % 11 - 5) * 1.4  # spread evenly, the same on every run
            parts.append(f'<circle class="speck {css}" cx="{px(value):.1f}" cy="{y + jitter:.1f}" r="2.4"/>')
        parts.append(_line(px(mean), y - 13, px(mean), y + 13, f"mean {css}"))
    return picture("".join(parts), width=width, height=height, key=key, title=title, text=text, css="strips")


HEAT_LEVELS = 8


def heat_level(value: float, low: float, high: float) -> int:
    """0 (nothing) or 1..HEAT_LEVELS on a logarithmic scale between `low` and `high`."""
    if value <= 0 or high <= 0:
        return 0
    if high <= low:
        return HEAT_LEVELS
    place = (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return 1 + min(HEAT_LEVELS - 1, max(0, int(place * HEAT_LEVELS)))


def heat(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: dict[tuple[str, str], float],
    *,
    key: str,
    title: str,
    text: str,
) -> Markup:
    """A heat map, rows x columns; each cell tells its value, and prints it where there is room.

    `cells` maps (row, column) to a value > 0; a pair that is missing stays empty. The printed figures are
    multiples of 1/1000.
    """
    shown = [v for v in cells.values() if v > 0]
    high = max(shown, default=0.0)
    low = max(min(shown, default=0.0), high / 1000)
    cell_w = 36.0 if len(columns) <= 16 else 17.0
    cell_h, top = 19.0, 22.0
    left = 14 + 6.3 * max((len(r) for r in rows), default=4)
    parts: list[str] = []
    stride = 1 if cell_w > 20 else 4
    for j, column in enumerate(columns):
        if j % stride == 0 or not column.isdigit():
            parts.append(label(left + (j + 0.5) * cell_w, 14, column))
    for i, row in enumerate(rows):
        y = top + i * cell_h
        parts.append(label(left - 8, y + 13.5, row, "name", "end"))
        for j, column in enumerate(columns):
            value = cells.get((row, column))
            x = left + j * cell_w
            box = f'x="{x:.1f}" y="{y:.1f}" width="{cell_w - 1.5:.1f}" height="{cell_h - 1.5:.1f}" rx="2"'
            if value is None:
                parts.append(f'<rect class="none" {box}/>')
                continue
            level = heat_level(value, low, high)
            said = f"{row}, layer {column}: {value:.2e}"
            parts.append(f'<g class="heat-{level}"><title>{escape(said)}</title><rect {box}/>')
            if cell_w > 20:
                parts.append(label(x + (cell_w - 1.5) / 2, y + 13, _thousandths(value), "cell"))
            parts.append("</g>")
    return picture(
        "".join(parts),
        width=left + len(columns) * cell_w + 2,
        height=top + len(rows) * cell_h + 2,
        key=key,
        title=title,
        text=text,
        css="heat" if len(columns) <= 16 else "heat wide",
    )


def _thousandths(value: float) -> str:
    scaled = 1000 * value
    if scaled >= 9.95:
        return f"{scaled:.0f}"
    return f"{scaled:.1f}" if scaled >= 0.095 else f"{scaled:.2f}".removeprefix("0")
