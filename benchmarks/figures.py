"""Line charts as SVG files, drawn from results.json alone: some panels, their lines with bands, one legend.

Files that are looked at on their own, so the styles are inside and the paper is white; colour, dash and marker tell
the lines apart. What a chart says in figures stands in its description, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import escape

from secondnature.report.svg import label, picture, ticks

PANEL_WIDTH, PANEL_HEIGHT = 370.0, 250.0
LEFT, RIGHT, TOP, BOTTOM, HEAD = 62.0, 16.0, 24.0, 40.0, 30.0
COLOURS = ("#1b5e9e", "#c05000", "#2a8a3a", "#7a3e9d")
DASHES = ("", "6 3", "2 2", "8 2 2 2")
STYLE = """<style>
text{font:11px sans-serif;fill:#333}text.head{font-weight:bold}line.grid{stroke:#e2e2e2}
line.mark{stroke:#999;stroke-dasharray:2 3}
polyline{fill:none;stroke-width:1.8}polygon{opacity:.15}
</style>"""


@dataclass(frozen=True)
class Line:
    """Points (x, middle, low, high); `look` chooses colour, dash and marker, the same in all panels."""

    look: int
    points: list[tuple[float, float, float, float]]
    dots: bool = True
    """Mark every point."""


@dataclass(frozen=True)
class Panel:
    """One plot. `top`: where the y axis ends (what is higher leaves it); `names`: x positions with their text."""

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    top: float | None = None
    mark: float | None = None
    """An x that a dashed line marks."""
    names: dict[float, str] = field(default_factory=dict[float, str])
    log: bool = False
    """Both axes logarithmic."""
    shades: list[tuple[float, float, str, str]] = field(default_factory=list[tuple[float, float, str, str]])
    """Stretches of x (from, to), what is written over them, and the colour of their ground."""


def draw(
    panels: Sequence[Panel], legend: Sequence[str], *, key: str, title: str, text: str, columns: int = 2
) -> str:
    """An SVG file with the panels in rows of `columns`; the legend names the looks, in their order."""
    rows = math.ceil(len(panels) / columns)
    width, height = columns * PANEL_WIDTH, HEAD + rows * PANEL_HEIGHT
    parts = [STYLE, f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>']
    x = LEFT
    for look, name in enumerate(legend):
        parts.append(_curve([(x, 15.0), (x + 28, 15.0)], look))
        parts.append(_marker(x + 14, 15.0, look))
        parts.append(label(x + 34, 19, name, "name", "start"))
        x += 58 + 6.2 * len(name)
    for i, panel in enumerate(panels):
        left, top = i % columns * PANEL_WIDTH, HEAD + i // columns * PANEL_HEIGHT
        parts.append(_panel(panel, left, top, f"{key}-{i}"))
    svg = picture("".join(parts), width=width, height=height, key=key, title=title, text=text, css="chart")
    return str(svg).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def _panel(panel: Panel, left: float, top: float, key: str) -> str:
    xs = [p[0] for line in panel.lines for p in line.points]
    ys = [y for line in panel.lines for p in line.points for y in p[1:]]
    number = (lambda t: f"{t:g}".replace("-", "−")) if not panel.log else _short
    x_low, x_high = min(xs), max(xs)
    if panel.log:
        names: dict[float, str] = {}
        for t in sorted(set(xs)):  # none within an eighth of the axis of the one before
            if all(math.log(t / other) > math.log(x_high / x_low) / 8 for other in names):
                names[t] = _short(t)
        y_low, y_high = _log_range(ys)
        y_ticks = _log_ticks(y_low, y_high)
    else:
        names = panel.names or {t: number(t) for t in ticks(x_low, x_high, 6) if x_low <= t <= x_high}
        y_ticks = ticks(min(0.0, *ys), min(panel.top or math.inf, max(ys)), 5)
        y_low, y_high = y_ticks[0], y_ticks[-1]
    scale = math.log if panel.log else float
    x0, x1, y0, y1 = left + LEFT, left + PANEL_WIDTH - RIGHT, top + PANEL_HEIGHT - BOTTOM, top + TOP

    def px(x: float) -> float:
        return x0 + (scale(x) - scale(x_low)) / (scale(x_high) - scale(x_low)) * (x1 - x0)

    def py(y: float) -> float:
        return y0 - (scale(y) - scale(y_low)) / (scale(y_high) - scale(y_low)) * (y0 - y1)

    parts = [label(x0, top + 14, panel.title, "head", "start")]
    names_of_shades: list[str] = []
    for x_from, x_to, text, ground in panel.shades:
        a, b = px(max(x_from, x_low)), px(min(x_to, x_high))
        parts.append(
            f'<rect x="{a:.1f}" y="{y1:g}" width="{b - a:.1f}" height="{y0 - y1:g}" fill="{ground}"/>'
        )
        names_of_shades.append(label((a + b) / 2, y1 + 12, text, "shade"))
    parts += names_of_shades  # over all grounds: one may be narrower than its name
    for t in y_ticks:
        parts.append(f'<line class="grid" x1="{x0:g}" y1="{py(t):.1f}" x2="{x1:g}" y2="{py(t):.1f}"/>')
        parts.append(label(x0 - 6, py(t) + 4, number(t), "tick", "end"))
    parts.extend(label(px(t), y0 + 16, name) for t, name in names.items())
    if panel.mark is not None:
        parts.append(
            f'<line class="mark" x1="{px(panel.mark):.1f}" y1="{y1:g}" x2="{px(panel.mark):.1f}" y2="{y0:g}"/>'
        )
    parts.append(label((x0 + x1) / 2, y0 + 32, panel.x_label))
    middle = (y0 + y1) / 2
    parts.append(
        f'<text transform="rotate(-90 {left + 12:g} {middle:g})" x="{left + 12:g}" y="{middle:g}" '
        f'text-anchor="middle">{escape(panel.y_label)}</text>'
    )
    parts.append(
        f'<clipPath id="{key}"><rect x="{x0 - 3:g}" y="{y1 - 3:g}" width="{x1 - x0 + 6:g}" '
        f'height="{y0 - y1 + 6:g}"/></clipPath><g clip-path="url(#{key})">'
    )
    for line in panel.lines:
        ring = [(p[0], p[3]) for p in line.points] + [(p[0], p[2]) for p in reversed(line.points)]
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in ring)
        parts.append(f'<polygon fill="{COLOURS[line.look]}" points="{path}"/>')
    for line in panel.lines:
        parts.append(_curve([(px(p[0]), py(p[1])) for p in line.points], line.look))
        if line.dots:
            parts.extend(_marker(px(p[0]), py(p[1]), line.look) for p in line.points)
    return "".join(parts) + "</g>"


def _log_range(values: Sequence[float]) -> tuple[float, float]:
    """Of a logarithmic axis: a factor of ten at least."""
    low, high = min(values), max(values)
    return (low, high) if high >= 10 * low else (low / math.sqrt(10), high * math.sqrt(10))


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within the range; powers alone where there would be more than seven."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    return found if len(found) <= 7 else [t for t in found if f"{t:e}".startswith("1")]


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / min(size, 1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _curve(points: Sequence[tuple[float, float]], look: int) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = f' stroke-dasharray="{DASHES[look]}"' if DASHES[look] else ""
    return f'<polyline stroke="{COLOURS[look]}"{dash} points="{path}"/>'


def _marker(x: float, y: float, look: int) -> str:
    fill = f'fill="{COLOURS[look]}"'
    if look % 2:
        return f'<rect {fill} x="{x - 2.6:.1f}" y="{y - 2.6:.1f}" width="5.2" height="5.2"/>'
    return f'<circle {fill} cx="{x:.1f}" cy="{y:.1f}" r="2.8"/>'
