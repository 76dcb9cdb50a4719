"""What the pages name exists: links, commands, options, targets, tests, files; the README's head says enough."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pages import PAGES, REFERENCE, ROOT, VLLMS_OWN, blocks, name_of

from secondnature.cli.app import app

MEASURED = {"listening", "pushback", "code", "lookup", "yes_sayer", "yes_sayer_pushback"}
UNKNOWN = "not yet measured"


def test_the_readmes_first_forty_lines_say_it_all() -> None:
    head = "\n".join((ROOT / "README.md").read_text().split("\n")[:40])
    assert head.startswith("# secondnature\n")
    assert "| before | after |" in head
    assert "    make demo " in head
    assert "    make test " in head
    (code,) = re.findall(r"```(?:python|bash)\n(.*?)```", head, re.S)
    assert sum(bool(line.strip()) for line in code.split("\n")) <= 12


def test_every_row_of_the_readmes_table_is_a_measurement_or_says_that_it_is_none() -> None:
    rows = re.findall(r"^\|.*<!-- measured:(\w+) -->.*$", (ROOT / "README.md").read_text(), re.M)
    assert {name for name in rows if not name.startswith(("real_", "drilled_"))} == MEASURED
    for line in (ROOT / "README.md").read_text().split("\n"):
        if "<!-- measured:" in line:
            _, before, after, _ = (cell.strip() for cell in line.strip("|").split("|"))
            for cell in (before, after):
                assert cell == UNKNOWN or re.match(r"\d", cell), line
            assert (before == UNKNOWN) == (after == UNKNOWN), line


@pytest.mark.parametrize("page", [*PAGES, *REFERENCE], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


LOOKED_UP = {"benchmarks.md": 300, "CHANGELOG.md": 400}
"""Pages in which one looks for one thing, and that nobody reads through: how many lines they may have."""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_are_short(page: Path) -> None:
    limit = {"decisions": 40}.get(page.parent.name, LOOKED_UP.get(page.name, 150))
    assert len(page.read_text().splitlines()) <= limit


@pytest.mark.parametrize("page", [*PAGES, *REFERENCE], ids=name_of)
def test_named_files_and_tests_exist(page: Path) -> None:
    text = page.read_text()
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / name).exists() or (ROOT / "src" / "secondnature" / name).exists(), name


def test_every_guarantee_names_its_test() -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text()
    promised = page[page.index("## Guaranteed") : page.index("## Not guaranteed")]
    for part in re.split(r"\n\n(?=\*\*)", promised)[1:]:
        assert re.search(r"`tests/[\w/]+\.py::\w+`", part), part.split("\n")[0]
    assert [int(n) for n in re.findall(r"^\*\*(\d)\.", promised, re.M)] == list(range(1, 10))


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        for target in re.findall(r"`make ([a-z]+)`|^    make ([a-z]+)", page.read_text(), re.M):
            assert set(target) - {""} <= targets, f"{page}: make {target}"


def words_of(page: Path) -> list[list[str]]:
    """Every `secondnature ...` of a page, as words."""
    text = page.read_text().replace("\n", "\n ")
    code = [b.text for b in blocks(page)] + re.findall(r"`([^`]+)`", text)
    lines = [line for part in code for line in re.split(r"\n|\||&&", part)]
    found = [shlex.split(line, comments=True) for line in lines if re.match(r"\s*secondnature( |$)", line)]
    return [words[1:] for words in found if len(words) > 1]


@pytest.mark.parametrize("page", [*PAGES, *REFERENCE], ids=name_of)
def test_named_commands_and_options_exist(page: Path) -> None:
    for words in words_of(page):
        node: Any = typer.main.get_command(app)
        options = {o for p in node.params for o in p.opts} | {"--help"}
        passed_on = VLLMS_OWN if words[0] == "serve" and "vllm" in words else frozenset[str]()
        for word in words:
            commands: dict[str, Any] = getattr(node, "commands", {})
            if word.startswith("--"):
                assert word.split("=")[0] in options | passed_on, f"secondnature {' '.join(words)}"
            elif commands:
                assert word in commands, f"secondnature {' '.join(words)}"
                node = commands[word]
                options = {o for p in node.params for o in p.opts} | {"--help"}


def test_the_check_of_commands_sees_a_wrong_one(tmp_path: Path) -> None:
    for wrong in (
        "`secondnature teach x`",
        "`secondnature learn --fast`",
        "`secondnature serve --max-model-len 9`",
        "`secondnature serve --engine vllm --max-modle-len 9`",
        "```bash\nsecondnature lessons drop\n```",
    ):
        page = tmp_path / "page.md"
        page.write_text(wrong + "\n")
        with pytest.raises(AssertionError):
            test_named_commands_and_options_exist(page)


def test_decisions_are_dated_and_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    for note in folder.glob("*.md"):
        if note.name != "README.md":
            assert f"]({note.name})" in index
            assert re.match(r"# .+\n\n20\d\d-\d\d-\d\d", note.read_text()), note.name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks(page):
        assert block.language in ("python", "bash", "json"), f"{page.name}: a block of {block.language!r}"
        assert block.not_run is None or block.language in ("python", "bash")
