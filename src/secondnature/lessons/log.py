"""The log of lessons: what changed the weights, in order, and what the disk holds of each (server).

On disk the truth is: a checkpoint, plus the deltas of the kept entries after it. A delta is an XOR, so a revert is
the same delta once more, and any state of the log can be rebuilt to the byte. An entry is born with the rename of
its whole directory, and counts from the moment its `lesson.json` says `kept`: that rename is the commit. Whatever
was still open when a server ended is undone at the next start, before the first request.

One thread writes. Any thread may read: entries are immutable, and the table of them is replaced as a whole. Files
of different durability have different readers: what is written whole is read strictly, metrics are not promised to
survive a crash, and a torn line of theirs is passed over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from secondnature import storage
from secondnature.errors import (
    BadDelta,
    DamagedFile,
    NotDurable,
    NotFound,
    SecondnatureError,
    TooNew,
    WrongState,
)
from secondnature.lessons.home import Home
from secondnature.lessons.retention import Kept, left_behind
from secondnature.records import (
    EVIDENCE_VERSION,
    OPEN_STATES,
    SCHEMA_VERSION,
    Correction,
    Evidence,
    Lesson,
    LessonKind,
    Moved,
    Probe,
    describe,
    read_jsonl,
    utc_now,
)
from secondnature.records.migrations import migrate
from secondnature.weights import checkpoint, delta
from secondnature.weights.content import Named
from secondnature.weights.updates import UPDATE_FILE
from secondnature.wire import LessonDetail

__all__ = ["DELTA_FILE", "MOVED_FILE", "OPTIMIZER_FILE", "PROBES_FILE", "Log"]

LOG = logging.getLogger(__name__)
DELTA_FILE = "delta.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
MOVED_FILE = "moved.json"
PROBES_FILE = "probes.jsonl"
_WRITERS = 16
_STATE_WORDS = {"queued": "waiting", "running": "running", "on_trial": "on trial"}


class Log:
    """The lessons of one home, and the durable weights. Used by one thread for writing."""

    def __init__(
        self,
        home: Home,
        model_dir: Path,
        base_version: str,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """`dtypes`: of the arena's tensors that are not bf16 (see `checkpoint.stream`)."""
        self._home = home
        self.base_dir = model_dir
        """The model's own directory."""
        self.dtypes = dtypes
        self.base_version = base_version
        """Version of the model's own weights, before any lesson."""
        self.unsynced: set[Path] = set()
        """Directories in which a commit is seen, but not known to outlast a loss of power."""
        self.unwritten: dict[str, Lesson] = {}
        """By id: what is true of an entry here, and not yet on the disk, which refused it."""
        self._corrections: dict[str, list[Correction]] = {}
        """By lesson: they never change."""
        self._probes: dict[str, list[Probe]] = {}
        """By lesson: what it left behind to be asked again."""
        self._state_hashes: dict[str, str] = {}
        """sha256 of optimizer states of homes of before, whose entries do not say it."""
        self._lessons: dict[str, Lesson] = {x.id: x for x in sorted(self._read(), key=lambda x: x.number)}
        self._last_number = max((x.number for x in self._lessons.values()), default=0)
        self._mend_reverts()
        for lesson in self.all():
            if lesson.state in OPEN_STATES:
                self._save_or_remember(
                    lesson.model_copy(
                        update={
                            "state": "cancelled" if lesson.state == "queued" else "undone",
                            "reason": f"the server ended while it was {_STATE_WORDS[lesson.state]}",
                            "ended_at": utc_now(),
                        }
                    )
                )

    def _read(self) -> list[Lesson]:
        """Every entry on disk; what an unfinished birth left behind is no entry (`leftovers` removes it)."""
        found: list[Lesson] = []
        with storage.storage_errors(self._home.lessons):
            for directory in self._home.lessons.iterdir():
                if not directory.name.startswith(".") and (directory / "lesson.json").is_file():
                    found.append(_read_lesson(directory / "lesson.json"))
        of_before = [lesson for lesson in found if lesson.moved]
        if of_before:  # the table was inside: every list of lessons carried it
            with ThreadPoolExecutor(_WRITERS) as pool:  # the disk confirms many at once as fast as one
                list(pool.map(self._move_out, of_before))
        return [x.model_copy(update={"moved": []}) if x.moved else x for x in found]

    def _move_out(self, lesson: Lesson) -> None:
        """Give the table of an entry of before a file of its own; an end in between leaves both."""
        directory = self.directory(lesson)
        _write_moved(directory, lesson.moved)
        storage.write_text(directory / "lesson.json", _text(lesson))

    def _mend_reverts(self) -> None:
        """`reverted_by` follows from the kept reverts, whatever the disk says: a server may have ended between the
        two files.
        """
        follows: dict[str, str | None] = dict.fromkeys(self._lessons)
        for entry in self.all():
            if entry.kind == "revert" and entry.state == "kept" and entry.reverts is not None:
                follows[entry.reverts] = entry.id
                target = self._lessons[entry.reverts]
                if target.kind == "revert" and target.reverts is not None:
                    follows[target.reverts] = None
        for lesson in self.all():
            if lesson.reverted_by != follows[lesson.id]:
                self._save_or_remember(lesson.model_copy(update={"reverted_by": follows[lesson.id]}))

    def _save_or_remember(self, lesson: Lesson) -> None:
        """Write down what the next start would find out again: where the disk refuses, it is known here."""
        try:
            self.save(lesson)
        except Exception as e:  # noqa: BLE001  (it follows from what is there)
            LOG.warning("lesson %s: %s", lesson.id, e)
            self.remember(lesson)

    # ------------------------------------------------------------------------------------------ entries

    def all(self) -> list[Lesson]:
        """Every entry, oldest first, without `moved`; from any thread."""
        return list(self._lessons.values())

    def get(self, lesson_id: str) -> Lesson:
        """One entry, by its id or its number (`0001`, `1`). Raises NotFound."""
        lessons = self._lessons
        if lesson_id in lessons:
            return lessons[lesson_id]
        for lesson in lessons.values():
            if lesson_id in (str(lesson.number), f"{lesson.number:04d}"):
                return lesson
        raise NotFound(f"no lesson {lesson_id!r}", "`secondnature lessons log` lists them")

    def create(
        self, kind: LessonKind, name: str, *, files: Mapping[str, str] | None = None, **fields: Any
    ) -> Lesson:
        """A new entry with its files, in a directory of its own: there as a whole, and durable, or not at all.

        Raises:
            StorageError: the disk refused; there is no such entry.
        """
        number = self._last_number + 1
        lesson = Lesson(
            id=f"{number:04d}-{name}",
            number=number,
            job="job-" + secrets.token_hex(6),
            kind=kind,
            created_at=utc_now(),
            **fields,
        )
        after = {**self._lessons, lesson.id: lesson}  # made now: once it is born, nothing may come between
        final = self.directory(lesson)
        unborn = final.with_name(f".{lesson.id}.{os.getpid()}.tmp")
        with storage.storage_errors(final):
            try:
                shutil.rmtree(unborn, ignore_errors=True)
                storage.make_dir(unborn)
                for file, text in {**(files or {}), "lesson.json": _text(lesson)}.items():
                    storage.write_text(unborn / file, text)
                self._last_number = number
                unborn.rename(final)
            except BaseException:
                shutil.rmtree(unborn, ignore_errors=True)
                raise
            self._lessons = after
            try:
                storage.sync_dir(final.parent)
            except BaseException as e:
                if lesson.state == "kept":  # a commit that everybody sees: it stands, and is synced again
                    LOG.warning("%s is there, but not known to be durable: %r", lesson.id, e)
                    self.unsynced.add(final.parent)
                else:
                    self._lessons = {k: v for k, v in self._lessons.items() if k != lesson.id}
                    shutil.rmtree(final, ignore_errors=True)
                    raise
        return lesson

    def save(self, lesson: Lesson) -> Lesson:
        """Write an entry's state; durable when this returns.

        Raises:
            StorageError: the disk refused; the entry is as before, there and here.
            NotDurable: the entry is written, there and here; `sync` makes it outlast a loss of power.
        """
        lesson = lesson.model_copy(update={"moved": []}) if lesson.moved else lesson
        after = {**self._lessons, lesson.id: lesson}
        try:
            storage.write_text(self.directory(lesson) / "lesson.json", _text(lesson))
        except NotDurable:
            self._lessons = after
            self.unsynced.add(self.directory(lesson))
            self.unwritten.pop(lesson.id, None)
            raise
        self._lessons = after
        self.unwritten.pop(lesson.id, None)
        return lesson

    @property
    def behind(self) -> str:
        """What the disk does not hold, or does not confirm; empty: it holds all. `sync` tries again."""
        if self.unwritten:
            return f"it does not take what became of {', '.join(sorted(self.unwritten))}"
        return "it does not confirm what was kept" if self.unsynced else ""

    def sync(self) -> None:
        """Write what the disk did not take, make durable what is only seen. Raises StorageError: not yet."""
        for lesson in list(self.unwritten.values()):
            self.save(lesson)
            self.drop_files(lesson)
        for directory in sorted(self.unsynced):
            with storage.storage_errors(directory):
                storage.sync_dir(directory)
            self.unsynced.discard(directory)

    def remember(self, lesson: Lesson) -> None:
        """Hold what the disk would not take, until `sync` writes it; a start before that undoes what is open."""
        self._put(lesson)
        self.unwritten[lesson.id] = lesson

    def drop_files(self, lesson: Lesson) -> None:
        """Remove what only a kept entry needs. Raises StorageError."""
        if lesson.state in ("undone", "failed", "cancelled"):
            for name in (DELTA_FILE, OPTIMIZER_FILE, UPDATE_FILE):
                path = self.directory(lesson) / name
                with storage.storage_errors(path):
                    path.unlink(missing_ok=True)

    def _put(self, lesson: Lesson) -> None:
        self._lessons = {**self._lessons, lesson.id: lesson}

    @property
    def home(self) -> Path:
        """The home's directory."""
        return self._home.path

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

    def write_moved(self, lesson: Lesson, moved: list[Moved]) -> None:
        """Store how far a lesson moved each tensor. Raises StorageError."""
        _write_moved(self.directory(lesson), moved)

    # -------------------------------------------------------------------------------------- what lies in it

    def detail(self, lesson_id: str) -> LessonDetail:
        """One entry with everything in its directory but the weights. Raises NotFound, DamagedFile."""
        lesson = self.get(lesson_id)
        directory = self.directory(lesson)
        moved = _read_whole(directory / MOVED_FILE)
        metrics = storage.read_lines(directory / "metrics.jsonl")
        return LessonDetail(
            lesson=lesson.model_copy(update={"moved": [Moved.from_disk(m) for m in moved or []]}),
            evidence=self.evidence(lesson),
            corrections=self.corrections(lesson),
            metrics=[value for _, value in metrics.values if isinstance(value, dict)],
            metrics_skipped=len(metrics.skipped) or None,
            answers=[value for _, value in storage.read_durable(directory / "answers.jsonl").values],
        )

    def evidence(self, lesson: Lesson) -> Evidence | None:
        """The certificate, where there is one. Raises DamagedFile."""
        path = self.directory(lesson) / "evidence.json"
        raw = _read_whole(path)
        try:
            found = None if raw is None else Evidence.from_disk(raw)
        except ValidationError as e:
            raise DamagedFile(f"{path}: {describe(e)}", "restore it from a backup") from None
        if found is not None and found.schema_version > EVIDENCE_VERSION:
            raise TooNew(
                f"{path}: schema_version {found.schema_version}; known up to {EVIDENCE_VERSION}", "upgrade"
            )
        return found

    def corrections(self, lesson: Lesson) -> list[Correction]:
        """What was taught, where it was not token ids. Raises BadRecord: the file is damaged."""
        known = self._corrections.get(lesson.id)
        if known is None:
            path = self.directory(lesson) / "corrections.jsonl"
            known = read_jsonl(path, Correction, own=True) if path.is_file() else []
            if lesson.state == "kept":  # asked for by every lesson after it
                self._corrections[lesson.id] = known
        return known

    def earlier(self) -> tuple[list[Correction], list[str]]:
        """(what the kept lessons taught that are in force, ids of those whose corrections cannot be read)."""
        found: list[Correction] = []
        unreadable: list[str] = []
        for lesson in self._taught():
            try:
                found += self.corrections(lesson)
            except SecondnatureError as e:
                LOG.warning("lesson %s is not replayed: %s", lesson.id, e)
                unreadable.append(lesson.id)
        return found, unreadable

    def _taught(self) -> list[Lesson]:
        """The kept lessons in force, oldest first."""
        kept = [x for x in self.all() if x.state == "kept" and x.kind != "revert"]
        return [x for x in kept if x.reverted_by is None]

    def retained(self) -> tuple[list[Kept], int]:
        """(what the lessons in force left behind to be asked again, of how many it cannot be read)."""
        found: list[Kept] = []
        unreadable = 0
        for lesson in self._taught():
            try:
                if lesson.id not in self._probes:
                    self._probes[lesson.id] = left_behind(self.probes(lesson), lesson.behaviour)
                found.append(Kept(lesson.number, self._probes[lesson.id]))
            except SecondnatureError as e:
                LOG.warning("lesson %s is not asked again: %s", lesson.id, e)
                unreadable += 1
        return found, unreadable

    def num_tries(self, examples: Iterable[str], corrections: Iterable[str]) -> int:
        """How many lessons on just this set of examples were judged before.

        Args:
            examples: digests of the examples' tokens.
            corrections: digests of the corrections: what entries of older versions know of theirs.
        """
        tokens, texts = set(examples), set(corrections)
        tried = 0
        for cause in (x.cause for x in self.all() if x.verdict is not None):
            found, wanted = (cause.examples, tokens) if cause.examples else (cause.corrections, texts)
            tried += bool(found) and set(found) == wanted
        return tried

    def by_idempotency_key(self, key: str) -> Lesson | None:
        """The entry that a request with this key made."""
        return next((x for x in self.all() if x.idempotency_key == key), None)

    def probes(self, lesson: Lesson) -> list[Probe]:
        """What an entry was judged by, as it was asked; empty of entries of older versions, and of unjudged ones.

        Raises:
            BadRecord: the file is damaged.
        """
        path = self.directory(lesson) / PROBES_FILE
        return read_jsonl(path, Probe, own=True) if path.is_file() else []

    def in_weights(self) -> list[str]:
        """Ids of the lessons that the kept weights hold, oldest first: those kept and not taken back."""
        return [
            x.id for x in self.all() if x.state == "kept" and x.kind != "revert" and x.reverted_by is None
        ]

    # ------------------------------------------------------------------------------------------ weights

    def _source(self) -> tuple[Path, int, str]:
        """The checkpoint in force, the number of the last entry that it holds, and its version."""
        current = checkpoint.current(self._home.model_root)
        if current is None:
            return self.base_dir, 0, self.base_version
        state = checkpoint.state(current)
        return current, int(state.get("lesson", 0)), str(state.get("version"))

    def chain(self) -> list[Lesson]:
        """The kept entries after the checkpoint, oldest first, without pairs of an entry and its revert."""
        _, held, _ = self._source()
        return self.in_force(held)

    def in_force(self, held: int = 0) -> list[Lesson]:
        """The kept entries with a higher number than `held`, without pairs of an entry and its revert."""
        chain: list[Lesson] = []
        for lesson in self.all():
            if lesson.state == "kept" and lesson.number > held:
                if chain and lesson.reverts == chain[-1].id:
                    chain.pop()
                else:
                    chain.append(lesson)
        return chain

    def durable_weights(self) -> Iterator[Named]:
        """The weights that the disk stands for, tensor by tensor in the order of names.

        They are the checkpoint and the deltas of the chain, each checked against its checksum. Whether they are
        `kept_version` follows from their content id, which whoever takes them has to compute.

        Raises:
            BadCheckpoint: the checkpoint is missing or damaged.
            BadDelta: a delta is missing, damaged, or does not continue the state before it.
        """
        directory, _, version = self._source()
        links = [
            delta.Link(self.open_delta(x), before=str(x.parent), after=str(x.version), name=f"lesson {x.id}")
            for x in self.chain()
        ]
        source = checkpoint.stream(directory, self.dtypes)
        return delta.replayed(source, links, source_id=version, check=False)

    def weights_before(self, lesson: Lesson) -> Iterator[Named]:
        """The weights that a kept entry started from, tensor by tensor in the order of names.

        From the checkpoint in force along the entries between the two, forwards or backwards, for a delta is its
        own undo; else from the model's own weights. Whether they are `lesson.parent` follows from their content id.

        Raises:
            WrongState: it is not kept, or a delta on both ways was pruned.
            BadCheckpoint, BadDelta: as `durable_weights`.
        """
        kept = [x for x in self.all() if x.state == "kept"]
        wanted = next((i for i, x in enumerate(kept) if x.id == lesson.id), None)
        if wanted is None:
            raise WrongState(
                f"lesson {lesson.id} is {lesson.state}, not kept", "only kept lessons have weights"
            )
        directory, held, version = self._source()
        at = sum(x.number <= held for x in kept)
        for source, start, its_version in ((directory, at, version), (self.base_dir, 0, self.base_version)):
            between = kept[start:wanted] if start <= wanted else kept[wanted:start][::-1]
            if all((self.directory(self.owner(x)) / DELTA_FILE).is_file() for x in between):
                links: list[delta.Link] = []
                for x in between:
                    ends = (str(x.parent), str(x.version))
                    before, after = ends if start <= wanted else ends[::-1]
                    links.append(delta.Link(self.open_delta(x), before, after, f"lesson {x.id}"))
                weights = checkpoint.stream(source, self.dtypes)
                return delta.replayed(weights, links, source_id=its_version, check=False)
        raise WrongState(
            f"the weights before lesson {lesson.id} cannot be had: a difference on the way to them was pruned",
            "bring it back from a backup",
        )

    def open_delta(self, lesson: Lesson) -> delta.StoredDelta:
        """What an entry did to the weights; of a revert, what its lesson had done. Raises BadDelta."""
        while lesson.kind == "revert":
            assert lesson.reverts is not None, "a revert names its lesson"
            lesson = self.get(lesson.reverts)
        return delta.open_(self.directory(lesson) / DELTA_FILE, lesson.delta_sha256)

    def owner(self, lesson: Lesson) -> Lesson:
        """The entry in whose directory the delta of an entry lies."""
        while lesson.kind == "revert" and lesson.reverts is not None:
            lesson = self.get(lesson.reverts)
        return lesson

    def head(self) -> Lesson | None:
        """The last kept entry."""
        return next((x for x in reversed(self._lessons.values()) if x.state == "kept"), None)

    def kept_version(self) -> str:
        """The version of the durable weights, as the entries name it."""
        head = self.head()
        return head.version if head is not None and head.version is not None else self.base_version

    def check_revert(self, lesson: Lesson) -> None:
        """Can a kept entry be taken back?

        Raises:
            WrongState: it is not kept, was taken back, or later ones stand on it.
        """
        if lesson.state != "kept":
            raise WrongState(
                f"lesson {lesson.id} is {lesson.state}, not kept", "only kept lessons can be reverted"
            )
        if lesson.reverted_by is not None:
            raise WrongState(
                f"lesson {lesson.id} was taken back by {lesson.reverted_by}", "revert that to have it again"
            )
        if lesson.delta_pruned and not (self.directory(self.owner(lesson)) / DELTA_FILE).is_file():
            raise WrongState(
                f"the difference that lesson {lesson.id} made was pruned: it cannot be taken back any more",
                f"bring {DELTA_FILE} of that lesson back from a backup, or teach the opposite",
            )
        if lesson.version != self.kept_version():
            later = [x.id for x in self.all() if x.state == "kept" and x.number > lesson.number]
            raise WrongState(
                f"later lessons stand on {lesson.id}: {', '.join(later)}",
                "revert the newest first, one after another",
            )

    def create_revert(self, lesson: Lesson) -> Lesson:
        """The entry that takes a kept one back; kept from the moment it is written. Raises StorageError."""
        state = self._state_file(lesson.optimizer_before)
        gone = lesson.optimizer_before is not None and (state is None or not state.is_file())
        entry = self.create(
            "revert",
            f"revert-{lesson.number:04d}",
            state="kept",
            behaviour=lesson.behaviour,
            parent=lesson.version,
            version=lesson.parent,
            reverts=lesson.id,
            optimizer_before=lesson.optimizer_after,
            optimizer_after=None if gone else lesson.optimizer_before,
            reason=f"took back {lesson.id}"
            + (
                "; the optimizer's state of then was pruned: the next lesson starts with a fresh one"
                if gone
                else ""
            ),
            ended_at=utc_now(),
        )
        self._mend_reverts()
        return entry

    # ------------------------------------------------------------------------------------------ optimizer

    def _state_file(self, lesson_id: str | None) -> Path | None:
        return None if lesson_id is None else self._home.lessons / lesson_id / OPTIMIZER_FILE

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
        return self._state_file(head.optimizer_after)

    def optimizer_version(self) -> str | None:
        """Content id of that state: `o` and 16 hex digits of the file's sha256."""
        path, head = self.optimizer_file(), self.head()
        if path is None or head is None or head.optimizer_after is None:
            return None
        owner = self.get(head.optimizer_after)
        sha256 = owner.optimizer_sha256 or self._state_hashes.get(owner.id)
        if (
            sha256 is None
        ):  # of a home of before: read once, then known; any thread may ask, so not in the table
            try:
                with path.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError:
                return None
            self._state_hashes[owner.id] = sha256
        return f"o{sha256[:16]}"

    # ------------------------------------------------------------------------------------------ disk

    def checkpoint_state(self) -> tuple[Path, str | None, int]:
        """(directory, version, last entry held) of the checkpoint in force; version None: the untouched base."""
        directory, held, version = self._source()
        return directory, None if directory == self.base_dir else version, held

    def save_checkpoint(self, weights: Iterable[Named]) -> Path:
        """Make the working copy hold the present kept weights, which are given, in any order.

        Raises:
            StorageError: the disk refused; the checkpoint before is in force.
        """
        head, version = self.head(), self.kept_version()
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
        return checkpoint.save(self._home.model_root, directory, weights, note, self.dtypes)


def _text(lesson: Lesson) -> str:
    """An entry as it lies on disk: without the long table, which has a file of its own."""
    raw = json.loads(lesson.to_disk())
    raw.pop("moved", None)
    return json.dumps(raw, ensure_ascii=False, indent=2) + "\n"


def _write_moved(directory: Path, moved: list[Moved]) -> None:
    text = json.dumps([m.model_dump(mode="json") for m in moved], indent=1)
    storage.write_text(directory / MOVED_FILE, text + "\n")


def _read_lesson(path: Path) -> Lesson:
    try:
        return Lesson.from_disk(migrate("lesson", json.loads(path.read_bytes()), str(path)))
    except TooNew:
        raise
    except (OSError, ValueError, RecursionError) as e:
        raise BadDelta(
            f"{path}: cannot be read: {str(e).splitlines()[0]}", "restore it from a backup"
        ) from None


def _read_whole(path: Path) -> Any:
    """What a file that is written whole holds, or None where there is none. Raises DamagedFile."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise DamagedFile(f"{path}: {str(e).splitlines()[0]}", "restore it from a backup") from None
