"""The training curve as a picture: one small panel per category, drawn by hand as SVG (no torch, no dependency).

A file of its own beside the model card, so it brings its own colours and a white ground. The same points give the
same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secondnature.report.svg import label, picture

Points = Sequence[dict[str, Any]]

PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 150, 104, 5
LEFT, RIGHT, TOP, BOTTOM = 30, 8, 22, 20
HEAD = 24
STYLE = """<style>
text{font:10px sans-serif;fill:#333}text.name{font-weight:bold}text.head{font-size:12px}
line{stroke:#ddd}polyline{fill:none;stroke:#1b5e9e;stroke-width:1.5}
polyline.other{stroke:#c05000;stroke-dasharray:4 2}line.promise{stroke:#2a8a3a;stroke-dasharray:1 2}
</style>"""


def categories(points: Points) -> list[str]:
    """The categories that a curve holds, in their order."""
    return [k for k in points[-1] if k not in ("tokens", "seconds", "loss")] if points else []


def _line(x: Sequence[float], y: Sequence[float], css: str) -> str:
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return f'<polyline class="{css}" points="{path}"/>'


def _panel(
    name: str, left: float, top: float, lines: Sequence[tuple[Points, str]], last: int, promise: float | None
) -> str:
    width, height = PANEL_WIDTH - LEFT - RIGHT, PANEL_HEIGHT - TOP - BOTTOM
    x0, y0 = left + LEFT, top + TOP + height
    parts = [label(x0, top + TOP - 6, name, "name", "start")]
    for value in (0.0, 0.5, 1.0):
        y = y0 - value * height
        parts.append(f'<line x1="{x0}" y1="{y:.1f}" x2="{x0 + width}" y2="{y:.1f}"/>')
        parts.append(label(x0 - 4, y + 3, f"{value:g}", anchor="end"))
    if promise is not None:
        y = y0 - promise * height
        parts.append(f'<line class="promise" x1="{x0}" y1="{y:.1f}" x2="{x0 + width}" y2="{y:.1f}"/>')
    parts.append(label(x0, y0 + 13, "0", anchor="start"))
    parts.append(label(x0 + width, y0 + 13, f"{last / 1e6:.1f}M", anchor="end"))
    for points, css in lines:
        known = [p for p in points if name in p]
        xs = [x0 + p["tokens"] / last * width for p in known]
        parts.append(_line(xs, [y0 - p[name] * height for p in known], css))
    return "".join(parts)


def draw(points: Points, second: Points = (), promises: dict[str, float] | None = None) -> str:
    """An SVG file: pass rate over training tokens, one panel per category; `second` is another seed, dashed.

    `points` has at least one entry; each holds `tokens` and a rate (0 to 1) per category.
    """
    names = categories(points)
    last = max(p["tokens"] for p in points)
    height = HEAD + -(-len(names) // COLUMNS) * PANEL_HEIGHT
    lines = [(points, "first"), *([(second, "other")] if second else [])]
    parts = [
        f'{STYLE}<rect width="{COLUMNS * PANEL_WIDTH}" height="{height}" fill="#fff"/>',
        label(8, 16, _heading(bool(second), bool(promises)), "head", "start"),
    ]
    for i, name in enumerate(names):
        left, top = i % COLUMNS * PANEL_WIDTH, HEAD + i // COLUMNS * PANEL_HEIGHT
        parts.append(_panel(name, left, top, lines, last, (promises or {}).get(name)))
    at_end = ", ".join(f"{n} {points[-1][n]:.2f}" for n in names)
    svg = picture(
        "".join(parts),
        width=COLUMNS * PANEL_WIDTH,
        height=height,
        key="curve",
        title="Pass rate over training tokens",
        text=f"At the last point: {at_end}.",
        css="chart",
    )
    return str(svg).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def _heading(second: bool, promises: bool) -> str:
    text = "Pass rate over training tokens, held-out combinations"
    text += "; blue: this model, dashed orange: a second seed" if second else ""
    return text + ("; dotted green: promised" if promises else "")


def side_by_side(points: Points, second: Points) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Points of two runs at the same token counts: for each of `second` the nearest of `points`.

    Runs count tokens in whole steps, so counts may differ by 3 %; what has no partner is left out.
    """
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for other in second:
        nearest = min(points, key=lambda p: abs(p["tokens"] - other["tokens"]), default=None)
        if nearest and abs(nearest["tokens"] - other["tokens"]) <= 0.03 * other["tokens"]:
            pairs.append((nearest, other))
    return pairs


def largest_differences(points: Points, second: Points) -> dict[str, float]:
    """Per category the largest difference of the pass rates of two runs at the same token counts."""
    pairs = side_by_side(points, second)
    shared = [n for n in categories(points) if n in categories(second)]
    return {
        n: round(max(abs(a[n] - b[n]) for a, b in pairs if n in a and n in b), 3)
        for n in shared
        if any(n in a and n in b for a, b in pairs)
    }
