"""The log of lessons: what changed the weights, in order, and the weights that follow from it (engine's side).

On disk the truth is: a checkpoint, plus the deltas of the kept entries after it. A delta is an XOR, so a revert is
the same delta once more, and any state of the log can be rebuilt to the byte. An entry counts from the moment its
`lesson.json` says `kept`: that rename is the commit. Whatever was still open when a server ended is undone at
the next start, before the first request.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from secondnature import storage
from secondnature.errors import BadDelta, NotFound, TooNew, WrongState
from secondnature.lessons.home import Home
from secondnature.records import (
    OPEN_STATES,
    SCHEMA_VERSION,
    Correction,
    Evidence,
    Lesson,
    read_jsonl,
    utc_now,
)
from secondnature.records.migrations import migrate
from secondnature.weights import checkpoint, delta
from secondnature.weights.arena import content_id
from secondnature.wire import LessonDetail

DELTA_FILE = "delta.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"


class Log:
    """The lessons of one home, and the durable weights. Used by one thread for writing."""

    def __init__(
        self,
        home: Home,
        model_dir: Path,
        base_version: str,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """`dtypes`: of the arena's tensors that are not bf16 (see `checkpoint.read`)."""
        self._home = home
        self._base_dir = model_dir
        self._dtypes = dtypes
        self.base_version = base_version
        """Version of the model's own weights, before any lesson."""
        self._lessons: dict[str, Lesson] = {}
        for directory in sorted(home.lessons.iterdir()):
            if (directory / "lesson.json").is_file():
                lesson = _read_lesson(directory / "lesson.json")
                self._lessons[lesson.id] = lesson
        self._mend_reverts()
        for lesson in self.all():
            if lesson.state in OPEN_STATES:
                what = {"queued": "waiting", "running": "running", "on_trial": "on trial"}[lesson.state]
                self.save(
                    lesson.model_copy(
                        update={
                            "state": "cancelled" if lesson.state == "queued" else "undone",
                            "reason": f"the server ended while it was {what}",
                            "ended_at": utc_now(),
                        }
                    )
                )

    def _mend_reverts(self) -> None:
        """`reverted_by` follows from the kept reverts; a server may have ended between the two files."""
        follows: dict[str, str | None] = {x.id: None for x in self._lessons.values()}
        for entry in self.all():
            if entry.kind == "revert" and entry.state == "kept" and entry.reverts is not None:
                follows[entry.reverts] = entry.id
                target = self._lessons[entry.reverts]
                if target.kind == "revert" and target.reverts is not None:
                    follows[target.reverts] = None
        for lesson in self.all():
            if lesson.reverted_by != follows[lesson.id]:
                self.save(lesson.model_copy(update={"reverted_by": follows[lesson.id]}))

    # ------------------------------------------------------------------------------------------ entries

    def all(self) -> list[Lesson]:
        """Every entry, oldest first."""
        return sorted(self._lessons.values(), key=lambda x: x.number)

    def get(self, lesson_id: str) -> Lesson:
        """One entry, by its id or its number (`0001`, `1`). Raises NotFound."""
        for lesson in self._lessons.values():
            if lesson_id in (lesson.id, str(lesson.number), f"{lesson.number:04d}"):
                return lesson
        raise NotFound(f"no lesson {lesson_id!r}", "`secondnature lessons log` lists them")

    def create(self, kind: str, name: str, **fields: Any) -> Lesson:
        """A new entry, durable, in its own directory."""
        number = max((x.number for x in self._lessons.values()), default=0) + 1
        lesson = Lesson(
            id=f"{number:04d}-{name}",
            number=number,
            job="job-" + secrets.token_hex(6),
            kind="revert" if kind == "revert" else "train",
            created_at=utc_now(),
            **fields,
        )
        storage.make_dir(self.directory(lesson))
        return self.save(lesson)

    def save(self, lesson: Lesson) -> Lesson:
        """Write an entry's state; durable when this returns."""
        storage.write_text(self.directory(lesson) / "lesson.json", lesson.to_disk(indent=2) + "\n")
        self._lessons[lesson.id] = lesson
        return lesson

    def remember(self, lesson: Lesson) -> None:
        """Hold a state that the disk would not take; the next start finds the lesson open, and undoes it."""
        self._lessons[lesson.id] = lesson

    def directory(self, lesson: Lesson) -> Path:
        """Where an entry's files lie."""
        return self._home.lessons / lesson.id

    def add_metric(self, lesson: Lesson, metric: BaseModel | dict[str, Any]) -> None:
        """Append one line to the entry's metrics (not fsynced one by one: they acknowledge nothing)."""
        line = metric.model_dump_json() if isinstance(metric, BaseModel) else json.dumps(metric)
        path = self.directory(lesson) / "metrics.jsonl"
        with storage.storage_errors(path):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(fd, "w") as file:
                file.write(line + "\n")

    def detail(self, lesson_id: str) -> LessonDetail:
        """One entry with everything in its directory but the weights."""
        lesson = self.get(lesson_id)
        directory = self.directory(lesson)
        corrections = directory / "corrections.jsonl"
        metrics = storage.read_lines(directory / "metrics.jsonl")
        return LessonDetail(
            lesson=lesson,
            evidence=_read_evidence(directory / "evidence.json"),
            corrections=read_jsonl(corrections, Correction, own=True) if corrections.is_file() else [],
            metrics=[value for _, value in metrics.values if isinstance(value, dict)],
            metrics_skipped=len(metrics.skipped) or None,
            answers=[value for _, value in storage.read_durable(directory / "answers.jsonl").values],
        )

    def num_tries(self, digests: list[str]) -> int:
        """How many lessons on exactly these corrections were judged before."""
        return sum(
            1
            for x in self._lessons.values()
            if digests and x.verdict is not None and x.cause.corrections == digests
        )

    # ------------------------------------------------------------------------------------------ weights

    def _source(self) -> tuple[Path, int]:
        """The checkpoint in force and the number of the last entry that it holds."""
        current = checkpoint.current(self._home.model_root)
        if current is None:
            return self._base_dir, 0
        return current, int(checkpoint.state(current).get("lesson", 0))

    def truth(self) -> dict[str, torch.Tensor]:
        """The weights that the disk stands for: checkpoint plus the deltas of the kept entries after it.

        Raises:
            BadCheckpoint: the checkpoint is missing or damaged.
            BadDelta: a delta is missing, damaged, or does not continue the state before it.
        """
        directory, held = self._source()
        weights = checkpoint.read(directory, self._dtypes)
        for lesson in self.all():
            if lesson.state == "kept" and lesson.number > held:
                difference = delta.read(*self._delta_of(lesson))
                if content_id(weights) != lesson.parent:
                    raise BadDelta(
                        f"lesson {lesson.id} starts from {lesson.parent}; the lessons before it end elsewhere",
                        "restore the home from a backup",
                    )
                delta.apply_(weights, difference)
        return weights

    def _delta_of(self, lesson: Lesson) -> tuple[Path, str | None]:
        while lesson.kind == "revert":
            assert lesson.reverts is not None, "a revert names its lesson"
            lesson = self.get(lesson.reverts)
        return self.directory(lesson) / DELTA_FILE, lesson.delta_sha256

    def head(self) -> Lesson | None:
        """The last kept entry."""
        return max(
            (x for x in self._lessons.values() if x.state == "kept"), key=lambda x: x.number, default=None
        )

    def optimizer_file(self, rank: int | None = None) -> Path | None:
        """The optimizer's state that belongs to the present weights; None: a fresh one.

        With `rank`, also where the state is of another one: moments of other projections say nothing to it.
        """
        head = self.head()
        if head is None or head.optimizer_after is None:
            return None
        held = self.get(head.optimizer_after).settings.get("optimizer", {}).get("rank")
        if rank is not None and held != rank:
            return None
        return self._home.lessons / head.optimizer_after / OPTIMIZER_FILE

    def optimizer_version(self) -> str | None:
        """Content id of that state: `o` and 16 hex digits of the file's sha256."""
        path = self.optimizer_file()
        if path is None:
            return None
        return "o" + hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def write_delta(
        self, lesson: Lesson, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
    ) -> Lesson:
        """Store what a lesson did to the weights; the entry with its version and checksum (not yet saved)."""
        difference = delta.between(before, after)
        sha256 = delta.write(difference, self.directory(lesson) / DELTA_FILE)
        return lesson.model_copy(update={"version": difference.result, "delta_sha256": sha256})

    def prepare_revert(self, lesson: Lesson, current: str) -> dict[str, torch.Tensor]:
        """The weights as they were before a kept entry, checked to the byte; nothing is written yet.

        Raises:
            WrongState: the entry is not kept, or later ones stand on it.
            BadDelta, BadCheckpoint: the undo would not give the weights that were there before.
        """
        if lesson.state != "kept":
            raise WrongState(
                f"lesson {lesson.id} is {lesson.state}, not kept", "only kept lessons can be reverted"
            )
        if lesson.reverted_by is not None:
            raise WrongState(
                f"lesson {lesson.id} was taken back by {lesson.reverted_by}", "revert that to have it again"
            )
        if lesson.version != current:
            later = [x.id for x in self.all() if x.state == "kept" and x.number > lesson.number]
            raise WrongState(
                f"later lessons stand on {lesson.id}: {', '.join(later)}",
                "revert the newest first, one after another",
            )
        weights = self.truth()
        delta.apply_(weights, delta.read(*self._delta_of(lesson)))
        found = content_id(weights)
        if found != lesson.parent:
            raise BadDelta(
                f"undoing {lesson.id} would give {found}; expected {lesson.parent}", "restore from a backup"
            )
        return weights

    def create_revert(self, lesson: Lesson) -> Lesson:
        """The entry that takes a kept one back; kept from the moment it is written."""
        entry = self.create(
            "revert",
            f"revert-{lesson.number:04d}",
            state="kept",
            behaviour=lesson.behaviour,
            parent=lesson.version,
            version=lesson.parent,
            reverts=lesson.id,
            optimizer_before=lesson.optimizer_after,
            optimizer_after=lesson.optimizer_before,
            reason=f"took back {lesson.id}",
            ended_at=utc_now(),
        )
        self._mend_reverts()
        return entry

    # ------------------------------------------------------------------------------------------ checkpoints

    def checkpoint_state(self) -> tuple[Path, str | None, int]:
        """(directory, version, last entry held) of the checkpoint in force; version None: the untouched base."""
        directory, held = self._source()
        version = None if directory == self._base_dir else str(checkpoint.state(directory).get("version"))
        return directory, version, held

    def save_checkpoint(self, weights: dict[str, torch.Tensor], version: str) -> Path:
        """Make the working copy hold the present kept weights.

        Raises:
            StorageError: the disk refused; the checkpoint before is in force.
        """
        head = self.head()
        held = head.number if head is not None else 0
        directory, old_version, old_held = self.checkpoint_state()
        if old_version == version and old_held == held:
            return directory
        note = {
            "schema_version": SCHEMA_VERSION,
            "version": version,
            "lesson": held,
            "saved_at": utc_now().isoformat(),
        }
        return checkpoint.save(self._home.model_root, directory, weights, note)


def _read_lesson(path: Path) -> Lesson:
    try:
        return Lesson.from_disk(migrate("lesson", json.loads(path.read_bytes()), str(path)))
    except TooNew:
        raise
    except (OSError, ValueError, RecursionError) as e:
        raise BadDelta(
            f"{path}: cannot be read: {str(e).splitlines()[0]}", "restore it from a backup"
        ) from None


def _read_evidence(path: Path) -> Evidence | None:
    if not path.is_file():
        return None
    return Evidence.from_disk(migrate("evidence", json.loads(path.read_bytes()), str(path)))
