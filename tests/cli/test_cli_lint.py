"""`secondnature lint`, and what `learn` says of its files before a server is looked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_server import Fake

from secondnature.cli import main
from secondnature.records import Correction

BARE = {"Turkey": "Ankara.", "Kenya": "Nairobi.", "Peru": "Lima."}


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Three bare answers with an empty line between, one of them asked by a probe."""
    rows = [
        {"prompt": f"What is the capital of {c}?", "chosen": t, "behaviour": "x"} for c, t in BARE.items()
    ]
    path = tmp_path / "corrections.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    probe = {"prompt": "what is the capital of PERU", "behaviour": "x", "check": {"matches": "Lima"}}
    (tmp_path / "probes.jsonl").write_text("\n" + json.dumps(probe) + "\n")
    return path


def test_it_names_lines_of_the_files_and_ends_with_1(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(bare.parent)]) == 1
    said = capsys.readouterr()
    assert "lint: near copy (probe line 2): 1 of 1 probes ask nearly what a correction asks" in said.err
    assert "(the first: probe line 2, correction line 5)" in said.err
    assert "lint: bare answers (lines 1, 3, 5): 3 of 3 wanted answers" in said.err
    assert "3 corrections, 1 probes: 2 things to look at" in said.out
    assert main(["lint", str(bare), "--json"]) == 1
    kinds = [f["kind"] for f in json.loads(capsys.readouterr().out)["findings"]]
    assert kinds == ["near copy", "bare answers"]


def test_nothing_to_look_at_ends_with_0(lesson_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(lesson_dir)]) == 0
    assert "2 corrections, 3 probes: nothing to look at" in capsys.readouterr().out


def test_learn_says_it_before_it_looks_for_a_server(
    bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["learn", str(bare), "--behaviour", "x", "--url", "http://127.0.0.1:9"])
    said = capsys.readouterr().err
    assert said.index("lint: bare answers") < said.index("127.0.0.1:9")


def test_the_ledger_is_looked_at_too(home: Path, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"What is the capital of {c}?", "chosen": t} for c, t in BARE.items()]
    fake.ledger = [Correction.model_validate(row) for row in rows]
    main(["learn", "--home", str(home), "--dry-run"])
    assert "lint: bare answers (lines 1, 2, 3)" in capsys.readouterr().err
