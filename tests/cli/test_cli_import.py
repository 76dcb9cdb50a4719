"""`import`, `review` and `hooks` from the command line: shown before it is written, and nothing twice."""

from __future__ import annotations

import io
import json
import os
import pty
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_server import Fake
from importers.import_files import BAD, CLAUDE_CODE, CODEX, GOOD, WHY, Q

from secondnature.cli import importing, main, review
from secondnature.cli.output import Output
from secondnature.records import Correction, read_jsonl

PAIR = {"prompt": Q, "chosen": GOOD, "rejected": BAD}


def lines(path: str, *rows: Any) -> str:
    Path(path).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_it_shows_asks_and_adds(home: Path, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    lines("f.jsonl", PAIR, {**PAIR, "prompt": "Other", "colour": "red"})
    assert main(["import", "f.jsonl", "--home", str(home)]) == 64
    shown = capsys.readouterr()
    assert fake.ledger == []
    assert "2 rows -> 2 records: 2 pairs" in shown.out
    assert "example 2 of 2" in shown.out
    assert f"wanted: {GOOD}" in shown.out
    assert "`colour` (1)" in shown.out
    assert "--yes" in shown.err
    assert main(["import", "f.jsonl", "--home", str(home), "--yes", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["added"], result["known"], result["records"]) == (2, 0, 2)
    assert [c.provenance.line for c in fake.ledger if c.provenance] == [1, 2]


def test_the_same_file_again_adds_nothing(home: Path, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["import", lines("f.jsonl", PAIR), "--home", str(home), "--yes"]
    assert main(words) == main(words) == 0
    assert len(fake.ledger) == 1
    assert "0 added to the ledger; 1 were there already" in capsys.readouterr().out


def test_into_a_file(home: Path, fake: Fake) -> None:
    lines("f.jsonl", PAIR, {**PAIR, "prompt": "Other"})
    for _ in range(2):
        assert main(["import", "f.jsonl", "--out", "o.jsonl", "--yes"]) == 0
        assert len(read_jsonl(Path("o.jsonl"), Correction)) == 2
    lines("g.jsonl", {**PAIR, "prompt": "Third"}, PAIR)
    assert main(["import", "g.jsonl", "--out", "o.jsonl", "--yes"]) == 0
    assert [c.prompt[0].content for c in read_jsonl(Path("o.jsonl"), Correction)] == [Q, "Other", "Third"]
    assert main(["import", "o.jsonl", "--out", "o.jsonl", "--yes"]) == 64
    assert fake.ledger == []


def test_a_bad_row_stops_it_unless_it_is_left_out(
    home: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    lines("f.jsonl", PAIR, {"prompt": "x", "chosen": "a", "rejected": "a"})
    assert main(["import", "f.jsonl", "--home", str(home), "--yes"]) == 64
    assert fake.ledger == []
    assert "f.jsonl, line 2: `chosen` and `rejected` are the same" in capsys.readouterr().err
    assert main(["import", "f.jsonl", "--home", str(home), "--yes", "--skip-bad"]) == 0
    assert len(fake.ledger) == 1


def test_it_is_sent_in_batches(home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    lines("f.jsonl", *({**PAIR, "prompt": str(i)} for i in range(25)))
    monkeypatch.setattr(importing, "BATCH_RECORDS", 10)
    assert main(["import", "f.jsonl", "--home", str(home), "--yes"]) == 0
    assert fake.calls.count("POST /v1/corrections") == 3
    assert len(fake.ledger) == 25


def test_a_batch_over_the_servers_limit_is_halved(home: Path, fake: Fake) -> None:
    fake.takes_bytes = 900
    lines("f.jsonl", *({**PAIR, "prompt": str(i)} for i in range(8)))
    assert main(["import", "f.jsonl", "--home", str(home), "--yes"]) == 0
    assert [c.prompt[0].content for c in fake.ledger] == [str(i) for i in range(8)]
    assert (
        main(["import", lines("g.jsonl", {**PAIR, "prompt": "x" * 2000}), "--home", str(home), "--yes"]) == 64
    )


@pytest.mark.parametrize("text", ["answer", "answer=reject", "=chosen"])
def test_a_wrong_map_is_refused(text: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", lines("f.jsonl", PAIR), "--map", text, "--home", str(home)]) == 64
    assert "COLUMN=FIELD" in capsys.readouterr().err


def test_learn_says_what_a_foreign_file_is_and_reads_a_mark(
    home: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": GOOD}]}
    Path("f.json").write_text(json.dumps([talk] * 3))
    assert main(["learn", "f.json", "--keep", "--home", str(home)]) == 64
    err = capsys.readouterr().err
    assert "a JSON array of 3 rows with `conversations`: ShareGPT" in err
    assert "secondnature import f.json --out" in err
    Path("bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode())
    assert main(["learn", "bom.jsonl", "--keep", "--home", str(home)]) == 0


# ---------------------------------------------------------------------------------------------------- review


def candidates(fake: Fake, home: Path) -> None:
    rows = [e for i in range(3) for e in json.loads(json.dumps(CLAUDE_CODE).replace(Q, f"{Q} {i}"))]
    for i, row in enumerate(rows):
        row["sessionId"] = f"s{i // len(CLAUDE_CODE)}"
    assert main(["import", lines("log.jsonl", *rows), "--home", str(home), "--yes"]) == 0
    assert [c.state for c in fake.ledger] == ["candidate"] * 3


def test_candidates_are_kept_and_dropped_by_id(
    home: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    candidates(fake, home)
    one, two, three = (str(c.id) for c in fake.ledger)
    capsys.readouterr()
    assert main(["review", "--home", str(home), "--json"]) == 0
    assert [c["id"] for c in json.loads(capsys.readouterr().out)["candidates"]] == [one, two, three]
    assert main(["review", "--keep", one, "--drop", two, "--home", str(home)]) == 0
    assert [(c.id, c.state) for c in fake.ledger] == [(one, None), (three, "candidate")]
    assert main(["review", "--keep", one, "--home", str(home)]) == 64
    assert main(["review", "--keep", three, "--drop", three, "--home", str(home)]) == 64
    assert main(["review", "--drop", "all", "--home", str(home)]) == 0
    assert [c.id for c in fake.ledger] == [one]


def test_candidates_are_looked_at_one_by_one(
    home: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    candidates(fake, home)
    first = fake.ledger[0].id
    editor = Path("editor.py")
    editor.write_text(
        f"import json,sys\np=sys.argv[1]\nd=json.load(open(p))\nd['chosen']={GOOD!r}\njson.dump(d,open(p,'w'))\n"
    )
    monkeypatch.setenv("EDITOR", f"{sys.executable} {editor.absolute()}")
    monkeypatch.delenv("VISUAL", raising=False)
    keys = iter("?edsq")
    monkeypatch.setattr(review, "_key", lambda _: next(keys))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr(type(Output().err), "is_terminal", property(lambda _: True))
    assert main(["review", "--home", str(home)]) == 0
    kept, left = fake.ledger
    assert (kept.id, kept.state, kept.feedback) == (first, None, WHY)
    assert kept.chosen is not None
    assert kept.chosen[0].content == GOOD
    assert kept.rejected == kept.said
    assert left.state == "candidate"
    assert "1 kept, 1 dropped, 1 left" in capsys.readouterr().out


def test_a_key_is_read_without_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    try:
        with os.fdopen(theirs, "r", closefd=False) as terminal:
            monkeypatch.setattr("sys.stdin", terminal)
            os.write(ours, b"K")
            assert review._key(Output()) == "k"  # pyright: ignore[reportPrivateUsage]
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(
    ("data", "words", "to_do"),
    [
        ('[{"conversations": [{"from": "human", "value": "x"}]}]', ["JSON array of 1 row", "ShareGPT"], "import"),
        ('{"text": "x"}', ["plain text"], "split it"),
        ('{"prompt": "x", "completions": ["a"], "labels": [true]}', ["stepwise"], "whole answers"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 1}]}',
         ["line 1: unknown field `messages[-1].weight`"], "import"),
        ('{"prompt": "x", "chosen": 4}', ["line 1: chosen: expected text, or a list of messages"], "import"),
        ('{"chosen": "x", "colour": "red"}', ["`prompt` is missing; unknown field `colour`"], "for the fields"),
        ('{"prompt": "x", "chosen": "a", "chosen": "b"}', ["the field `chosen` stands there twice"], "leave one"),
    ],
)  # fmt: skip
def test_what_learn_does_not_read_is_named_with_what_to_do(
    data: str, words: list[str], to_do: str, home: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f.jsonl").write_text(data + "\n")
    assert main(["learn", "f.jsonl", "--home", str(home)]) == 64
    err = capsys.readouterr().err
    for word in [*words, to_do]:
        assert word in err
    for word in ("Input should", "not JSON", "dictionary", "(and"):
        assert word not in err
    assert fake.calls == []


def test_learn_says_what_may_be_meant_otherwise(
    home: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    lines("f.jsonl", PAIR, {**PAIR, "chosen": BAD, "rejected": GOOD})
    assert main(["learn", "f.jsonl", "--home", str(home), "--keep"]) == 0
    assert "1 of 2: contradicts another one" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- hooks


@pytest.fixture
def person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HOME of its own."""
    folder = tmp_path / "person"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    for name in ("CLAUDE_CONFIG_DIR", "CODEX_HOME"):
        monkeypatch.delenv(name, raising=False)
    return folder


def test_the_hook_of_claude_code_is_merged_and_removed(
    home: Path, person: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = person / ".claude" / "settings.json"
    words = ["hooks", "install", "claude-code", "--home", str(home)]
    assert main(words) == 64
    assert "+" in capsys.readouterr().out
    assert not path.exists()
    theirs = {
        "model": "x",
        "hooks": {"SessionEnd": [{"hooks": [{"type": "command", "command": "say bye"}]}], "Stop": []},
    }
    path.parent.mkdir()
    path.write_text(json.dumps(theirs))
    path.chmod(0o640)
    for _ in range(2):
        assert main([*words, "--yes"]) == 0
        found = json.loads(path.read_text())
        assert found["model"] == "x"
        assert found["hooks"]["Stop"] == []
        bye, ours = found["hooks"]["SessionEnd"]
        assert bye == theirs["hooks"]["SessionEnd"][0]
        assert f"hooks run claude-code --home {home}" in ours["hooks"][0]["command"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert main([*words, "--remove", "--yes"]) == 0
    assert json.loads(path.read_text()) == theirs
    path.write_text("{broken")
    assert main([*words, "--yes"]) == 64
    assert path.read_text() == "{broken"


def test_the_hook_of_codex_is_merged_and_removed(home: Path, person: Path) -> None:
    path = person / ".codex" / "config.toml"
    path.parent.mkdir()
    theirs = '# mine\nmodel = "x"\n\n[tui]\nnotifications = true\n'
    path.write_text(theirs)
    words = ["hooks", "install", "codex", "--home", str(home), "--yes"]
    for _ in range(2):
        assert main(words) == 0
        assert path.read_text().endswith(theirs)
        assert path.read_text().count("notify") == 1
    assert main([*words, "--remove"]) == 0
    assert path.read_text() == theirs
    path.write_text('notify = ["other"]\n')
    assert main(words) == 64
    assert main([*words, "--remove"]) == 0
    assert path.read_text() == 'notify = ["other"]\n'


def test_an_ended_session_comes_in_as_candidates(
    home: Path, fake: Fake, person: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = lines("session.jsonl", *CLAUDE_CODE)
    told = {"hook_event_name": "SessionEnd", "transcript_path": str(Path(log).absolute()), "session_id": "s1"}
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(told)))
        assert main(["hooks", "run", "claude-code", "--home", str(home)]) == 0
    folder = person / ".codex" / "sessions" / "2026" / "01" / "02"
    folder.mkdir(parents=True)
    other = json.loads(json.dumps(CODEX).replace(Q, "Other."))
    lines(str(folder / "rollout-2026-01-02-r1.jsonl"), *other)
    payload = json.dumps({"type": "agent-turn-complete", "thread-id": "r1"})
    assert main(["hooks", "run", "codex", payload, "--home", str(home)]) == 0
    assert [(c.state, c.feedback, c.prompt[-1].content) for c in fake.ledger] == [
        ("candidate", WHY, Q), ("candidate", WHY, "Other."),
    ]  # fmt: skip
    for wrong in ("{}", "no", '{"thread-id": "../x"}', '{"thread-id": "unknown"}'):
        assert main(["hooks", "run", "codex", wrong, "--home", str(home)]) == 64
