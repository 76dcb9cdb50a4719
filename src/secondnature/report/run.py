"""A run directory, read whole: what a report may know (process D: cli, client).

The directory of a lesson is the only source: lesson.json, evidence.json, corrections.jsonl, metrics.jsonl and
answers.jsonl. Only the first must be there; whatever else is missing leaves its section out. A kind of metric line,
or a field, that this version does not know is passed over; so is a metric line that is no JSON, for metrics are not
synced and a power loss may garble them. Anything else that is broken is an error that names it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from pydantic import Field, ValidationError

from secondnature.errors import BadRecord, NotFound, TooLarge
from secondnature.records import (
    MAX_FILE_BYTES,
    SCHEMA_VERSION,
    Correction,
    Evidence,
    KlMetric,
    Lesson,
    LookMetric,
    Moved,
    Record,
    SampleAnswer,
    StepMetric,
    describe,
    parse_json,
    read_jsonl,
)

FORMAT = "secondnature-report"

R = TypeVar("R", Lesson, Evidence)


class Metrics(Record):
    """What metrics.jsonl says, sorted by kind."""

    steps: list[StepMetric] = Field(default_factory=list[StepMetric])
    looks: list[LookMetric] = Field(default_factory=list[LookMetric])
    kl: list[KlMetric] = Field(default_factory=list[KlMetric])
    moved: list[Moved] = Field(default_factory=list[Moved])
    num_skipped: int = 0
    """Lines that were no JSON."""


class Run(Record):
    """Everything that lies in the directory of one lesson."""

    lesson: Lesson
    evidence: Evidence | None = None
    """None: the lesson had no probes, or ended before they were asked."""
    corrections: list[Correction] = Field(default_factory=list[Correction])
    metrics: Metrics = Metrics()
    answers: list[SampleAnswer] = Field(default_factory=list[SampleAnswer])

    @property
    def moved(self) -> list[Moved]:
        """What moved: from the lesson, or from its metrics where the lesson ended too early to sum it up."""
        return self.lesson.moved or self.metrics.moved


class ReportData(Record):
    """The JSON beside the HTML: the same data, whole and unabridged."""

    format: Literal["secondnature-report"] = FORMAT
    schema_version: int = SCHEMA_VERSION
    runs: list[Run]


def read_run(directory: Path) -> Run:
    """The run that lies in `directory`.

    Raises:
        NotFound: there is no lesson.json.
        BadRecord: a file is broken; the message names file and line.
        TooLarge: a file or a line is over its limit.
    """
    lesson = _read_json(directory / "lesson.json", Lesson)
    if lesson is None:
        raise NotFound(
            f"{directory}: no lesson.json found; expected the directory of a lesson",
            "give a directory such as HOME/lessons/0001-listening",
        )
    corrections, answers = directory / "corrections.jsonl", directory / "answers.jsonl"
    return Run(
        lesson=lesson,
        evidence=_read_json(directory / "evidence.json", Evidence),
        corrections=read_jsonl(corrections, Correction, own=True) if _has_text(corrections) else [],
        metrics=_read_metrics(directory / "metrics.jsonl"),
        answers=read_jsonl(answers, SampleAnswer, own=True) if _has_text(answers) else [],
    )


def _has_text(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _read_text(path: Path, *, garbled: bool = False) -> str | None:
    """The text of a file, None where there is no such file; `garbled`: what is no UTF-8 is read as `\ufffd`."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise TooLarge(f"{path}: {size:,} bytes; at most {MAX_FILE_BYTES:,} are read", "split the file")
        return path.read_text("utf-8", errors="replace" if garbled else "strict")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as e:
        raise BadRecord(f"{path}: not UTF-8 text (byte {e.start})", "is it the right file?") from None
    except OSError as e:
        raise BadRecord(f"{path}: {e.strerror or e}", "check the path") from None


def _read_json(path: Path, kind: type[R]) -> R | None:
    text = _read_text(path)
    if text is None:
        return None
    value = _load(text, str(path))
    newest: int = kind.model_fields["schema_version"].default
    version = value.get("schema_version", newest)
    if not isinstance(version, int) or version > newest:
        raise BadRecord(
            f"{path}: schema_version {version!r}; expected {newest} or older", "update secondnature"
        )
    try:
        return kind.model_validate_json(text, extra="allow")
    except ValidationError as e:
        raise BadRecord(f"{path}: {describe(e)}", "see docs/reference/files.md for the fields") from None


def _load(text: str, where: str) -> dict[str, Any]:
    """One JSON object; a number that is not finite (NaN, Infinity) reads as null."""
    value = parse_json(text, where=where, mend="mend it or remove it")
    if not isinstance(value, dict):
        raise BadRecord(f"{where}: {type(value).__name__}; expected a JSON object", "mend it or remove it")
    return cast("dict[str, Any]", value)


def _read_metrics(path: Path) -> Metrics:
    steps: list[StepMetric] = []
    looks: list[LookMetric] = []
    kl: list[KlMetric] = []
    moved: list[Moved] = []
    num_skipped = 0
    for number, line in enumerate((_read_text(path, garbled=True) or "").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = _load(line, where)
        except BadRecord:
            num_skipped += 1
            continue
        kind = value.get("kind")
        if not isinstance(kind, str):
            raise BadRecord(
                f"{where}: no `kind`; expected step, look, kl or moved", "mend or remove the line"
            )
        try:
            if kind == "step":
                steps.append(StepMetric.from_disk(value))
            elif kind == "look":
                looks.append(LookMetric.from_disk(value))
            elif kind == "kl":
                kl.append(KlMetric.from_disk(value))
            elif kind == "moved":
                fields = {k: v for k, v in value.items() if k not in {"kind", "tensor"}}
                moved.append(Moved.from_disk({"name": value.get("tensor"), **fields}))
        except ValidationError as e:
            raise BadRecord(f"{where}: {describe(e)}", "mend or remove the line") from None
    return Metrics(steps=steps, looks=looks, kl=kl, moved=moved, num_skipped=num_skipped)


def finite(values: list[float]) -> list[float]:
    """The values that can be drawn."""
    return [v for v in values if math.isfinite(v)]
