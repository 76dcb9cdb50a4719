"""The before/after table in the terminal and as Markdown."""

from __future__ import annotations

import io

import report_fixture as fixture
from rich.console import Console

from secondnature import report
from secondnature.records import Evidence


def printed(evidence: Evidence, width: int = 140) -> str:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(report.before_after_table(evidence))
    return file.getvalue()


def test_the_terminal_table_says_shares_intervals_and_verdicts() -> None:
    sets = [
        fixture.comparison("listening", "gain", 60, 3, 51, 1, passed=True),
        fixture.comparison("code", "guard", 300, 300, 0, 246, passed=False),
        fixture.comparison("look-up", "guard", 90, 47, 2, 4, passed=False, n_needed=310),
        fixture.comparison("rhyme", "guard", 40, 2, 0, 0, passed=None),
    ]
    text = printed(fixture.evidence(sets))
    for part in ("5 % [1, 14]", "88 % [77, 95]", "+83 pts", "✓ improved", "✕ harmed", "? not shown to hold"):
        assert part in text, part
    assert "– not judged" in text
    assert "Kept: listening rose" in text


def test_names_are_text_not_markup() -> None:
    odd = fixture.comparison("[bold red]x[/] | y", "guard", 40, 2, 0, 0, passed=True)
    evidence = fixture.evidence([odd], sentence="[link=file:///x]see[/link]")
    assert "[bold red]x[/] | y" in printed(evidence)
    assert "[link=file:///x]see[/link]" in printed(evidence)
    assert r"[bold red]x[/] \| y (guard)" in report.markdown_table(evidence)


def test_markdown_has_one_row_per_set_and_an_empty_set_has_no_share() -> None:
    empty = fixture.comparison("none", "guard", 40, 2, 0, 0, passed=None).model_copy(update={"n": 0})
    lines = report.markdown_table(fixture.evidence([empty])).splitlines()
    assert lines[0] == "| probes | n | before | after | change | p | verdict |"
    assert lines[2].startswith("| none (guard) | 0 | – | – |")
    assert len(lines) == 5
