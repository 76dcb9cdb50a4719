"""Two ways to read a record: people's strictly, our own disk's with what newer versions added."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from secondnature.errors import BadRecord, DamagedFile, TooNew
from secondnature.records import Correction, Lesson, parse_jsonl, read_jsonl, to_jsonl
from secondnature.records.migrations import STEPS, Step, migrate, newest
from secondnature.wire import LessonDetail, TrainRequest

NOW = datetime(2026, 1, 2, tzinfo=UTC)
MOVED = {"name": "w", "layer": None, "intended": 1.0, "relative": 1.0, "written": 1.0}


def newer_lesson() -> dict[str, Any]:
    """A lesson with a field of a newer version at every depth."""
    lesson = Lesson(id="0001-a", number=1, job="j", created_at=NOW)
    raw = json.loads(lesson.model_dump_json())
    return raw | {
        "severity": {"a": [1, None]},
        "cause": raw["cause"] | {"deep": "ü"},
        "moved": [MOVED | {"z": 3}],
    }


def test_what_a_newer_version_added_is_kept_and_written_back() -> None:
    raw = newer_lesson()
    for indent in (None, 2):
        lesson = Lesson.from_disk(raw)
        assert json.loads(lesson.to_disk(indent=indent)) == raw
        later = lesson.model_copy(update={"state": "kept"})
        assert json.loads(later.to_disk(indent=indent)) == raw | {"state": "kept"}
    assert "ü" in lesson.to_disk()
    assert json.loads(lesson.to_disk(exclude_none=True))["severity"] == {"a": [1, None]}


def test_a_record_without_unknown_fields_is_written_as_ever() -> None:
    lesson = Lesson(id="0001-a", number=1, job="j", created_at=NOW)
    assert lesson.to_disk(indent=2) == lesson.model_dump_json(indent=2)
    assert lesson.to_disk(exclude_none=True) == lesson.model_dump_json(exclude_none=True)


def test_an_answer_over_http_leaves_unknown_fields_out() -> None:
    """A client of this version would refuse them."""
    detail = LessonDetail(lesson=Lesson.from_disk(newer_lesson()))
    sent = json.loads(detail.model_dump_json())
    assert LessonDetail.model_validate(sent).lesson.id == "0001-a"


def test_from_disk_is_lenient_in_nothing_else() -> None:
    for wrong in ({"state": "dreaming"}, {"number": "one"}, {"moved": [{"name": "w"}]}):
        with pytest.raises(ValidationError):
            Lesson.from_disk(newer_lesson() | wrong)


def test_people_and_bodies_are_read_strictly(tmp_path: Path) -> None:
    line = '{"prompt": "a", "chosen": "b", "severity": 3}\n'
    (tmp_path / "c.jsonl").write_text(line)
    with pytest.raises(BadRecord, match="unknown field `severity`"):
        read_jsonl(tmp_path / "c.jsonl", Correction)
    with pytest.raises(ValidationError):
        Correction.model_validate(json.loads(line))
    with pytest.raises(ValidationError):
        TrainRequest.model_validate({"corrections": [json.loads(line)]})
    (own,) = read_jsonl(tmp_path / "c.jsonl", Correction, own=True)
    assert json.loads(to_jsonl([own]))["severity"] == 3
    assert own.digest() == Correction.model_validate({"prompt": "a", "chosen": "b"}).digest()


def test_a_number_of_many_digits_is_a_bad_line() -> None:
    with pytest.raises(BadRecord, match=r"f, line 1: a whole number of more than"):
        parse_jsonl(b'{"prompt": "a", "rating": ' + b"1" * 5000 + b"}", Correction, source="f")


# ------------------------------------------------------------------------------------------ migrations


def test_steps_are_numbered_without_a_gap() -> None:
    for kind in ("home", "lesson", "correction"):
        assert {n for k, n in STEPS if k == kind} == set(range(1, newest(kind)))


def test_a_file_goes_through_all_steps_from_its_own_form() -> None:
    def first(raw: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in raw.items() if k != "old"} | {"new": raw["old"]}

    def second(raw: dict[str, Any]) -> dict[str, Any]:
        return raw | {"new": raw["new"] + 1}

    steps: dict[Any, Step] = {("lesson", 1): first, ("lesson", 2): second}
    raw = {"old": 1, "kept": "x"}
    assert migrate("lesson", raw, "f", steps) == {"new": 2, "kept": "x", "schema_version": 3}
    assert raw == {"old": 1, "kept": "x"}
    assert migrate("lesson", {"new": 5, "schema_version": 2}, "f", steps)["new"] == 6
    assert migrate("lesson", {"new": 5, "schema_version": 3}, "f", steps)["new"] == 5
    with pytest.raises(TooNew, match=r"f: schema_version 4; .* reads up to 3") as caught:
        migrate("lesson", {"schema_version": 4}, "f", steps)
    assert "4" in caught.value.hint


def test_a_home_without_a_number_is_the_first_form() -> None:
    old = {"model": "m", "fingerprint": "f", "base_version": "w", "unknown": [1]}
    assert migrate("home", old, "home.json") == old | {"engine": "local", "format": 2}
    assert migrate("home", old | {"engine": "vllm"}, "home.json")["engine"] == "vllm"


@pytest.mark.parametrize("number", ["2", 0, -1, True, 1.5, None])
def test_a_number_that_is_none_is_damage(number: object) -> None:
    with pytest.raises(DamagedFile, match="expected a number from 1 on"):
        migrate("home", {"format": number}, "home.json")
    with pytest.raises(DamagedFile, match="not a JSON object"):
        migrate("home", [number], "home.json")
