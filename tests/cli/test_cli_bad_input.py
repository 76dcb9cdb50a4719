"""Bad input: one line that says where and what to do, exit code 64, and nothing was sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_server import Fake

from secondnature.cli import main

GOOD = b'{"prompt": "a", "completion": "b"}\n'
BROKEN: dict[str, tuple[bytes, str]] = {
    "broken line 3": (GOOD * 2 + b'{"prompt": "a", \n', "line 3, column"),
    "empty": (b"", "no records found"),
    "only blank lines": (b"\n \n", "no records found"),
    "unknown field": (
        GOOD + b'{"prompt": "a", "completion": "b", "chosn": "c"}\n',
        "line 2: unknown field `chosn`",
    ),
    "10 MB line": (GOOD + b'{"prompt": "' + b"a" * 10_000_000 + b'"}\n', "line 2: 10,000,01"),
    "binary": (bytes(range(128, 256)) * 9, "line 1: not UTF-8"),
    "zeros": (b"\0" * 4096, "line 1, column 1: not JSON"),
    "a list": (b"[1]\n", "a JSON array of plain values"),
    "deep": (b"[" * 200_000, "line 1"),
    "number of 5,000 digits": (
        GOOD + b'{"prompt": "a", "completion": ' + b"7" * 5000 + b"}\n",
        "line 2: a whole number of more than 4,300 digits",
    ),
    "no answer": (b'{"prompt": "a", "feedback": "bad"}\n', "none with a wanted answer"),
    "neither answer nor comment": (b'{"prompt": "a", "rating": -1}\n', "none with a wanted answer"),
    "two behaviours": (
        b'{"prompt": "a", "completion": "b", "behaviour": "x"}\n'
        b'{"prompt": "a", "completion": "b", "behaviour": "y"}\n',
        "name 2 behaviours: x, y",
    ),
}


def refused(words: list[str], expected: str, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 64
    out, err = capsys.readouterr()
    assert expected in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 2
    assert out == ""
    assert main([*words, "--json"]) == 64
    assert expected in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not [call for call in fake.calls if not call.startswith("GET")]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_corrections_file_is_refused(
    name: str, fake: Fake, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, expected = BROKEN[name]
    Path("c.jsonl").write_bytes(data)
    refused(["learn", "c.jsonl", "--keep", "--home", str(home)], expected, fake, capsys)
    assert fake.calls == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("probes.jsonl", '{"prompt": "a", "behaviour": "listening", "check": {}}', "probes.jsonl, line 1"),
        (
            "probes.jsonl",
            '{"prompt": "a", "behaviour": "other", "check": {"matches": "x"}}',
            "no probe measures",
        ),
        (
            "development.jsonl",
            '{"prompt": "a", "behaviour": "listening", "check": {"contains": "x"}}',
            "development.jsonl, line 1",
        ),
        ("replay.jsonl", "{", "replay.jsonl, line 1"),
        ("replay_prompts.jsonl", '{"prompt": "a"}\n{"promt": "b"}', "replay_prompts.jsonl, line 2"),
        (
            "replay_prompts.jsonl",
            '[{"role": "user", "content": "a"}]',
            "replay_prompts.jsonl, line 1",
        ),
        ("lesson.toml", "[sdft]\nsamples = 0", "sdft.samples"),
        ("lesson.toml", "objective = 'sdtf'", "objective"),
        ("lesson.toml", "max_stepz = 3", "unknown field `max_stepz`"),
        ("lesson.toml", "max_steps = 0", "max_steps"),
        ("lesson.toml", "[optimizer]\nlr = -1", "optimizer.lr"),
        ("lesson.toml", "max_steps =", "lesson.toml"),
    ],
)
def test_a_broken_file_beside_the_corrections_is_refused(
    file: str,
    text: str,
    expected: str,
    fake: Fake,
    home: Path,
    lesson_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (lesson_dir / file).write_text(text)
    refused(["learn", str(lesson_dir), "--home", str(home)], expected, fake, capsys)
    assert fake.calls == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["missing.jsonl"], "missing.jsonl: No such file"),
        (["empty"], "empty: no corrections.jsonl in this folder"),
        (["listening", "--probes", "none.jsonl"], "none.jsonl: No such file"),
        (["listening", "--report", "no/such/r.html"], "no folder no/such"),
        (["listening", "--report", "empty"], "is a folder"),
        (["listening", "--behaviour", "sums ums"], "no probe measures `sums ums`"),
        (
            ["listening", "--behaviour", "listning"],
            "no probe measures `listning`; the probes measure: listening, sums",
        ),
        (["listening", "--max-steps", "0"], "max_steps"),
        (["listening", "--lr", "nan"], "lr"),
        (["listening", "--keep", "--probes", "listening/probes.jsonl"], "--keep and --probes"),
        (["listening/corrections.jsonl", "--model", "other"], "already serves fake"),
    ],
)
def test_bad_options_of_learn_are_refused(
    words: list[str],
    expected: str,
    fake: Fake,
    home: Path,
    lesson_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("empty").mkdir()
    refused(["learn", *words, "--home", str(home)], expected, fake, capsys)


def test_calibrate_needs_a_margin(
    fake: Fake, home: Path, lesson_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (lesson_dir / "lesson.toml").unlink()
    refused(["learn", str(lesson_dir), "--home", str(home), "--calibrate"], "without a margin", fake, capsys)


@pytest.mark.parametrize(
    "words", [["learn", "--no-such"], ["nonsense"], ["lessons", "show"], ["serve", "--port", "x"]]
)
def test_usage_errors_have_their_own_code(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 64
    assert "Traceback" not in capsys.readouterr().err


def test_nobody_there(home: Path, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lessons", "log", "--url", "http://127.0.0.1:9", "--home", str(home)]) == 69
    assert "secondnature serve" in capsys.readouterr().err
    assert main(["lessons", "log", "--home", "elsewhere"]) == 69
    assert "there is no such folder" in capsys.readouterr().err
    assert not Path("elsewhere").exists()


def test_the_wrong_key_is_said(home: Path, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "key").write_text("wrong")
    assert main(["lessons", "log", "--home", str(home)]) == 64
    assert "Unauthorized: wrong key" in capsys.readouterr().err


def test_a_server_that_speaks_otherwise_is_said(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from secondnature.wire import Client

    monkeypatch.setattr(Client, "request", lambda *_, **__: {"status": "fine"})
    assert main(["lessons", "log", "--home", str(home)]) == 69
    assert "not a LessonList of this version" in capsys.readouterr().err


def test_an_unknown_setting_is_said(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SECONDNATURE_HOEM", "x")
    assert main(["lessons", "log"]) == 64
    assert "did you mean `home`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "no prompts found"),
        (b" \n\n", "no prompts found"),
        (b"\xff\xfe", "general.txt"),
        (None, "general.txt"),
    ],
)
def test_a_broken_list_of_prompts_is_refused(
    data: bytes | None, expected: str, fake: Fake, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("c.jsonl").write_bytes(GOOD)
    if data is not None:
        Path("general.txt").write_bytes(data)
    words = ["learn", "c.jsonl", "--keep", "--home", str(home), "--replay-prompts", "general.txt"]
    refused(words, expected, fake, capsys)


def test_sdft_without_a_comment_is_refused(
    fake: Fake, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("c.jsonl").write_bytes(b'{"prompt": "a", "rating": -1}\n')
    words = ["learn", "c.jsonl", "--keep", "--objective", "sdft", "--home", str(home)]
    refused(words, "none says what was wrong (`feedback`)", fake, capsys)


def test_a_number_of_too_many_digits_is_named_wherever_it_is_read(
    fake: Fake, home: Path, lesson_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = "7" * 5000
    Path("body.json").write_text('{"seed": ' + digits + "}")
    refused(
        ["train", "body.json", "--home", str(home)], "body.json: a whole number of more than", fake, capsys
    )
    (lesson_dir / "lesson.toml").write_text(f"max_steps = {digits}\n")
    refused(["learn", str(lesson_dir), "--home", str(home)], "lesson.toml: ", fake, capsys)
    (lesson_dir / "lesson.toml").write_text("x = " + "[" * 100_000 + "\n")
    refused(["learn", str(lesson_dir), "--home", str(home)], "lesson.toml: ", fake, capsys)
    Path("secondnature.toml").write_text(f"port = {digits}\n")
    assert main(["lessons", "log", "--home", str(home)]) != 0
    err = capsys.readouterr().err
    assert "secondnature.toml: " in err
    assert "Traceback" not in err
