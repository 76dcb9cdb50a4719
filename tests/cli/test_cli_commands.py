"""The grammar (frozen), `lessons`, `checkpoint`, `chat`, `doctor`, and what importing costs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from fake_server import AFTER, Fake

from secondnature.cli import main
from secondnature.cli.app import app
from secondnature.cli.connect import Where

OPTIONS = Path(__file__).with_name("options.txt")


def options() -> list[str]:
    """Every command with its arguments and options, one per line."""
    lines: list[str] = []

    def walk(command: Any, path: str) -> None:
        for parameter in command.params:
            names = "/".join(sorted(parameter.opts))
            lines.append(f"{path} {names}")
        for name, sub in sorted(getattr(command, "commands", {}).items()):
            walk(sub, f"{path} {name}")

    walk(typer.main.get_command(app), "secondnature")
    return lines


def test_the_set_of_options_is_frozen() -> None:
    """A new option is a decision: add it to options.txt and to docs/reference/cli.md."""
    assert options() == OPTIONS.read_text().splitlines()


@pytest.mark.parametrize("words", [["--help"], ["learn", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from secondnature.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'fastapi'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_learning_imports_no_torch(home: Path, fake: Fake, lesson_dir: Path) -> None:
    code = (
        "import sys; from secondnature.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'fastapi'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    words = ["learn", str(lesson_dir), "--home", str(home)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_lessons_log_show_keep_revert(
    fake: Fake, home: Path, lesson_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--home", str(home)]
    assert main(["lessons", "log", *at]) == 0
    assert "no lessons yet" in capsys.readouterr().out
    assert main(["learn", str(lesson_dir), *at]) == 0
    capsys.readouterr()

    assert main(["lessons", "log", *at]) == 0
    out = capsys.readouterr().out
    assert "0001-listening" in out
    assert "kept" in out
    assert AFTER in out
    assert main(["lessons", "log", *at, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lessons"][0]["state"] == "kept"

    assert main(["lessons", "show", "0001-listening", *at]) == 0
    assert "listening" in capsys.readouterr().out
    assert main(["lessons", "show", "0001-listening", *at, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["evidence"]["sentence"] == "The fake says kept."

    assert main(["lessons", "keep", "0001-listening", *at]) == 1
    assert "WrongState" in capsys.readouterr().err
    assert main(["lessons", "revert", "0001-listening", *at]) == 0
    assert "0001-listening undone" in capsys.readouterr().out
    assert fake.lessons["0001-listening"].reverted_by == "90001-listening"
    assert main(["lessons", "log", *at]) == 0
    assert "taken back" in capsys.readouterr().out
    assert main(["lessons", "show", "0009-none", *at]) == 64
    assert "no lesson 0009-none" in capsys.readouterr().err


def test_checkpoint(fake: Fake, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "--home", str(home), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == "/home/model/current"


def chat(text: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return main(["chat", "--home", str(home)])


def test_chat_records_what_was_wanted(
    fake: Fake, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "/no too early",
        "Use tabs.",
        "/no",
        "/no Done: tabs.",
        "/why too wordy",
        "/good",
        "/learn",
        "/help",
    ]
    assert chat("\n".join([*lines, "", "too long", "bye", "/quit", "never said"]), home, monkeypatch) == 0
    out, err = capsys.readouterr()
    assert out.startswith("you said Use tabs.\n")
    assert "you said bye\n" in out
    assert "never said" not in out
    assert f"secondnature learn --home {home}" in out
    assert "/no TEXT" in out
    assert f"[weights {AFTER}, on trial]" in err
    assert "nothing to correct yet" in err
    assert "/no needs a text" in err
    assert "ContextOverflow: 9 tokens" in err
    first, second, third = fake.ledger
    assert first.chosen is not None
    assert first.chosen[0].content == "Done: tabs."
    assert (first.rating, first.completion_id) == (-1, "chatcmpl-1")
    assert (second.feedback, second.chosen) == ("too wordy", None)
    assert third.rating == 1


def test_chat_prints_texts_as_they_are(
    fake: Fake, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "[bold]x[/] :smile: " + "long " * 60 + "end"
    assert chat(said, home, monkeypatch) == 0
    assert f"you said {said}\n" in capsys.readouterr().out


def test_doctor_looks_at_the_machine_and_the_server(
    fake: Fake, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--home", str(home), "--json"]) == 0
    found = {f["name"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert {"python", "torch", "transformers", "cores", "memfd", "home", "server", "key"} <= found.keys()
    assert found["key"]["level"] == "ok"
    assert "fake at http://127.0.0.1" in found["server"]["found"]
    (home / "key").write_text("wrong")
    assert main(["doctor", "--home", str(home)]) == 1
    assert "wrong key" in capsys.readouterr().out


def test_doctor_states_how_often_answers_flip_by_themselves(
    fake: Fake, home: Path, lesson_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["doctor", "--home", str(home), "--probes", str(lesson_dir / "probes.jsonl"), "--json"]
    assert main(command) == 0
    assert "0 of 3 verdicts flip by themselves (0.0%; 95 %: 0.0% to 70.8%)" in capsys.readouterr().out
    fake.flip = True  # only the first probe's check sees the difference
    assert main(command) == 0
    assert "1 of 3 verdicts flip" in capsys.readouterr().out
    Path("margins.jsonl").write_text('{"prompt": "a", "behaviour": "b", "check": {"prefers": ["x", "y"]}}')
    assert main([*command[:4], "margins.jsonl"]) == 64


def test_a_model_that_reads_little_is_asked_for_less(
    fake: Fake,
    home: Path,
    lesson_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake.reads_tokens = 8
    assert chat("bye", home, monkeypatch) == 0
    assert capsys.readouterr().out == "you said bye\n"
    assert main(["doctor", "--home", str(home), "--probes", str(lesson_dir / "probes.jsonl")]) == 0


def test_doctor_without_a_server_is_not_an_error(tmp_path: Path, home: Path, fake: Fake) -> None:
    assert main(["doctor", "--home", str(tmp_path / "new")]) == 0
    assert main(["doctor", "--url", "http://127.0.0.1:9"]) == 1


def test_a_command_that_is_proposed_leads_to_the_same_server(
    fake: Fake, home: Path, lesson_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = json.loads((home / "server.json").read_text())["url"]
    for number, given in enumerate((["--home", str(home)], ["--url", url, "--home", str(home)]), start=1):
        leads = " ".join(given[-4:])
        assert main(["learn", str(lesson_dir), "--report", "r.html", *given]) == 0
        assert f"secondnature lessons revert 000{number}-listening {leads}" in capsys.readouterr().out
        assert f"secondnature lessons revert 000{number}-listening {leads}" in Path("r.html").read_text()
        assert main(["review", "--keep", "none", *given]) == 64
        assert f"`secondnature review --json {leads}` has their ids" in capsys.readouterr().err


def test_a_text_is_completed_where_it_names_commands() -> None:
    where = Where(Path("/a b"), "http://x:1")
    assert where.complete("see `secondnature lessons log`, or `--yes`") == (
        "see `secondnature lessons log --url http://x:1 --home '/a b'`, or `--yes`"
    )
    assert where.complete("run `secondnature serve`") == "run `secondnature serve --home '/a b'`"
    assert Where().complete("run `secondnature serve`") == "run `secondnature serve`"
