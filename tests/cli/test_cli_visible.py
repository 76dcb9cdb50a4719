"""Nothing that a model says steers the terminal: its escape sequences are shown, whole or in pieces, everywhere."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from fake_server import Fake
from rich.table import Table
from rich.text import Text

from secondnature.cli import main, output
from secondnature.cli.output import Output, write_json
from secondnature.records.visible import visible, visible_json

CLIPBOARD = "\x1b]52;c;cm0gLXJm\x07"
CURSOR = "\x1b[2A\x1b[2K"
HARD = "a\x9b31mb\x7f c\u202ed\u2066e\x00\x08\r"
STEERING = {
    chr(c) for c in [*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
} - {"\n", "\t"}


@pytest.fixture(params=[False, True], ids=["pipe", "terminal"])
def terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The same on a terminal as in a pipe."""
    monkeypatch.setenv("NO_COLOR", "1")
    if request.param:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    return bool(request.param)


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    got = capsys.readouterr()
    return (
        (got.out + got.err).replace("\x1b[1m", "").replace("\x1b[0m", "")
    )  # bold headings of a table are ours


@pytest.mark.parametrize("text", [CLIPBOARD, CURSOR, HARD, "\x1b", "\x1b[31mred"])
def test_what_is_said_noted_or_put_in_a_table_is_visible(
    text: str, terminal: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Output()
    out.say(text)
    out.note(text)
    out.say(Text(text))
    table = Table("x")
    table.add_row(Text(text))
    table.title = Text(text)
    out.say(table)
    said = printed(capsys)
    assert not STEERING & set(said)
    assert "␛" in said or "\\u009b" in said


def test_a_sequence_in_two_pieces_of_a_stream_is_visible(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    for piece in ("good \x1b", "]52;c;cm0=", "\x07 day \x1b[", "2J", "\x9b", "1A"):
        out.say(piece, end="")
    said = printed(capsys)
    assert said == "good ␛]52;c;cm0= day ␛[2J\\u009b1A"  # a bell is left out by the console itself
    assert not STEERING & set(said)


def test_text_as_people_write_it_is_not_changed(capsys: pytest.CaptureFixture[str]) -> None:
    text = "def f():\n\treturn 'é ü 漢 🙂 שלום [bold]'"
    assert visible(text) == visible_json(text) == text
    Output().say(text)
    assert "é ü 漢 🙂 שלום [bold]'" in printed(capsys)


def test_json_for_machines_reads_back_and_steers_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"answer": CLIPBOARD + CURSOR + HARD}
    write_json(value)
    said = capsys.readouterr().out
    assert not STEERING & set(said)
    assert json.loads(said) == value


def test_every_console_of_the_commands_is_the_one_that_makes_visible() -> None:
    """Whoever prints past it would bring the sequences back."""
    room = Path(output.__file__).parent
    past = [
        f"{file.name}: {line.strip()}"
        for file in sorted(room.glob("*.py"))
        for line in file.read_text("utf-8").splitlines()
        if ("print(" in line or "sys.stdout.write" in line or "Console(" in line)
        and "_print_error" not in line
    ]
    assert past == [
        "output.py: self._people.print(thing, style=style, end=end, soft_wrap=isinstance(thing, str))",
        "output.py: self.err.print(text, style=style, end=end, soft_wrap=True)",
        'output.py: sys.stdout.write(visible_json(json.dumps(value, ensure_ascii=False)) + "\\n")',
        "output.py: class _VisibleConsole(Console):",
        "output.py: console = _VisibleConsole(stderr=stderr, markup=False, highlight=False, emoji=False)",
    ]


def test_what_a_model_says_in_a_chat_is_visible(
    fake: Fake, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hello {CLIPBOARD}{CURSOR}\n"))
    assert main(["chat", "--home", str(home)]) == 0
    got = capsys.readouterr()
    assert not STEERING & set(got.out + got.err)
    assert "you said hello ␛]52;c;cm0gLXJm␛[2A␛[2K" in got.out
