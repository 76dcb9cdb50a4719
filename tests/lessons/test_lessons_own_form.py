"""A dry run asks the model how it would answer, and compares the form of what would be taught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_server import WORDS, Running, teach

from secondnature.cli import main
from secondnature.lessons.own_form import _whole

ASKED = WORDS[:5]


def lint(server: Running, chosen: str, **fields: Any) -> list[dict[str, str]]:
    corrections = [{"prompt": f"Use {word}.", "chosen": chosen.format(word), **fields} for word in ASKED]
    plan = server.client.train(teach(corrections=corrections, dry_run=True)).plan
    assert plan is not None
    return plan["lint"]


def test_answers_of_another_form_than_the_models_are_named_in_a_dry_run(server: Running) -> None:
    """The talker says "Why not tea?"."""
    (found,) = lint(server, "Done.")
    assert found["kind"] == "answer form"
    assert found["where"] == "5 prompts, asked of the model"
    assert "the model begins 5 of 5 with “why not”, and no wanted answer begins so" in found["found"]
    assert "(it says “Why not " in found["hint"]


def test_answers_as_the_model_speaks_are_passed_in_silence(server: Running) -> None:
    assert lint(server, "Why not {}?", rejected="{}!") == []


def test_the_command_asks_a_server_that_runs_and_says_where_none_does(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is bare by common measure is not where the model itself speaks so."""
    file = tmp_path / "corrections.jsonl"
    rows = [{"prompt": f"Please do use {word}.", "chosen": f"Why not {word}?"} for word in ASKED]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["lint", str(file), "--home", str(tmp_path / "none")]) == 1
    said = capsys.readouterr().err
    assert "lint: bare answers" in said
    assert "no server runs, so the model's own form was not asked" in said
    monkeypatch.setenv("SECONDNATURE_API_KEY", "the-key-of-the-tests")
    main(["lint", str(file), "--url", server.client.url, "--home", str(tmp_path / "none")])
    said = capsys.readouterr().err
    assert "bare answers" not in said
    assert "was not asked" not in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The capital of Turkey is Ankara. It lies in the middle.", "The capital of Turkey is Ankara."),
        ("The capital of Turkey is Istanbul. Not Ankara.", None),
        ("Ankara.", None),
        ("The capital of Turkey is Ankara and", None),
        ("", None),
    ],
)
def test_only_a_whole_sentence_that_says_what_is_wanted_is_proposed(text: str, expected: str | None) -> None:
    assert _whole(text, "Ankara.") == expected
