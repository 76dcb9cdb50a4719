"""The before/after table of a lesson: for the terminal (rich) and as Markdown (process D: `secondnature learn`)."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from secondnature.records import Comparison, Evidence
from secondnature.records.visible import visible
from secondnature.report.words import (
    difference,
    difference_interval,
    interval,
    judgement,
    p_value,
    percent,
    points,
    set_name,
)

_COLOURS = {"good": "green", "bad": "red", "warn": "yellow", "info": "blue", "quiet": "dim"}
_HEADINGS = ("probes", "n", "before", "after", "change", "p", "verdict")


def _cells(c: Comparison) -> tuple[str, ...]:
    def share(passed: int, pair: tuple[float, float]) -> str:
        return f"{percent(passed / c.n, c.n)} {interval(pair)}" if c.n else "–"

    said = judgement(c)
    return (
        set_name(c.name, c.role),
        str(c.n),
        share(c.before, c.before_interval),
        share(c.after, c.after_interval),
        f"{points(difference(c))} {difference_interval(c)}".strip(),
        p_value(c.p).removeprefix("p = ").removeprefix("p "),
        f"{said.mark} {said.word}" + (f": {said.detail}" if said.detail else ""),
    )


def before_after_table(evidence: Evidence) -> Table:
    """One row per probe set: shares with 95 % intervals, the change with its tests' limits, p, the decision."""
    table = Table(title="before and after the lesson", title_justify="left", caption_justify="left")
    table.caption = Text(
        f"{evidence.sentence} [shares: 95 % intervals; change: limits of the tests; alpha {evidence.alpha:g}]"
    )
    for heading in _HEADINGS:
        table.add_column(heading, justify="right" if heading in {"n", "p"} else "left")
    for c in evidence.comparisons:
        cells = _cells(c)
        plain = [Text(cell) for cell in cells[:-1]]  # Text, not str: a name is never read as markup
        table.add_row(*plain, Text(cells[-1], style=_COLOURS[judgement(c).tone]))
    return table


def markdown_table(evidence: Evidence) -> str:
    """The same table as Markdown, for logs, pull requests and terminals without colour; ends with a newline."""

    def row(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"

    lines = [row(_HEADINGS), "|" + " --- |" * len(_HEADINGS)]
    lines += [row(_cells(c)) for c in evidence.comparisons]
    return visible("\n".join([*lines, "", evidence.sentence.replace("\n", " "), ""]))
