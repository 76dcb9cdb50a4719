"""What leaves the home: each export is written beside its place, noted in the home, and then has its name (server).

An export is read from the disk, as a start reads it: a checkpoint and the deltas of what is kept, tensor by tensor.
Lessons go on meanwhile, and so do commands, for whoever writes checks in between two tensors; but nothing that is
being read is removed. It is noted (`exports.jsonl`) before it gets its name: a crash may leave a note of an export
that is not there, and never one that nobody knows of. A lesson that is taken back later can be traced so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from secondnature import __version__, storage
from secondnature.errors import BadInput, Busy, NotDurable, StorageError, WrongState
from secondnature.lessons import lesson_file
from secondnature.lessons.identity import identity_of, model_directory
from secondnature.lessons.job import Phase
from secondnature.lessons.log import DELTA_FILE, PROBES_FILE, Log
from secondnature.lessons.weights import ServedWeights, checked
from secondnature.records import Export, Lesson, LessonManifest, PartName, to_jsonl, utc_now
from secondnature.weights import checkpoint, difference, gguf, lora
from secondnature.weights.content import Named
from secondnature.weights.updates import UPDATE_FILE, read_update
from secondnature.wire import ExportRequest, PhaseProgress

__all__ = ["EXPORTS_FILE", "Exports"]

EXPORTS_FILE = "exports.jsonl"
INTENDED = "what the lesson meant to change, before rounding"
WRITTEN = "the difference of the bytes"
"""What an adapter is the approximation of."""
CheckIn = Callable[[], None]


@dataclass
class Written:
    """What a form wrote, for the note."""

    lessons: list[str]
    version: str
    details: dict[str, Any]


class Exports:
    """Of one home. `write` is used by the runner's thread; the rest from any."""

    def __init__(self, log: Log, weights: ServedWeights, model_name: str = "") -> None:
        """`model_name`: what people call the model, for whoever gets a file."""
        self._model_name = model_name or log.base_dir.name
        self._log = log
        self._weights = weights
        self._writing: Phase | None = None

    @property
    def progress(self) -> PhaseProgress | None:
        """How far the export is that is being written; None: none is."""
        writing = self._writing
        return writing.progress() if writing is not None else None

    def all(self) -> list[Export]:
        """Every export, oldest first. Raises DamagedFile."""
        path = self._log.home / EXPORTS_FILE
        return [Export.from_disk(raw) for _, raw in storage.read_durable(path).values]

    def holding(self, lesson: Lesson) -> list[Export]:
        """The exports that hold a lesson."""
        return [x for x in self.all() if lesson.id in x.lessons]

    def write(self, request: ExportRequest, check_in: CheckIn) -> Export:
        """Write one export.

        Args:
            check_in: called between two tensors; may raise to give up.

        Raises:
            BadInput: the path cannot be one, or something is there already.
            Busy: another one is being written.
            NotFound, WrongState: there is no such lesson, or it is not kept.
            StorageError: the disk refused, or has no room; nothing is left.
            NotDurable: it is there, but a power loss may take it back.
            BadCheckpoint, BadDelta: the disk does not give the weights.
        """
        if self._writing is not None:
            raise Busy("another export is being written; this one was not begun", "try again when it is done")
        path = _place(request.path, self._log.home)
        self._writing = Phase("writing", "tensors")
        temporary = storage.temporary_name(path)
        try:
            with storage.storage_errors(path), self._weights.being_read():
                storage.clean(path.parent, path.name)
                written = self._write_form(request, temporary, check_in)
                export = Export(
                    form=request.form,
                    path=str(path),
                    lessons=written.lessons,
                    base_version=self._log.base_version,
                    weights_version=written.version,
                    nbytes=_size(temporary),
                    details=written.details,
                    exported_at=utc_now(),
                )
                _check_free(path)
                storage.append_line(self._log.home / EXPORTS_FILE, export.to_disk(exclude_none=True))
                temporary.rename(path)
        except NotDurable as e:  # of a file within: nothing of it has its name
            _remove(temporary)
            raise StorageError(f"{path}: not written: {e.message}", "mend the disk, then repeat") from None
        except BaseException:
            _remove(temporary)
            raise
        finally:
            self._writing = None
        storage.sync_name(path)
        return export

    # ------------------------------------------------------------------------------------------------

    def _write_form(self, request: ExportRequest, target: Path, check_in: CheckIn) -> Written:
        if request.form == "lesson":
            return self._lesson(self._kept(request.lesson), target, check_in)
        if request.form == "lora":
            return self._adapter(request, target, check_in)
        if request.form == "gguf":
            return self._gguf(request, target, check_in)
        return self._checkpoint(target, check_in)

    def _kept(self, lesson_id: str | None) -> Lesson:
        """The lesson that is exported. Raises BadInput, NotFound, WrongState: none is named, or it has no
        change."""
        if lesson_id is None:
            raise BadInput("a lesson file holds one lesson, and none is named", "name one").about("lesson")
        lesson = self._log.get(lesson_id)
        if lesson.state != "kept" or lesson.kind == "revert":
            what = "a revert" if lesson.kind == "revert" else lesson.state.replace("_", " ")
            raise WrongState(
                f"lesson {lesson.id} is {what}; expected a kept lesson", "export one that is kept"
            )
        if not (self._log.directory(lesson) / DELTA_FILE).is_file():
            raise WrongState(
                f"the difference that lesson {lesson.id} made was pruned", "bring it back from a backup"
            )
        return lesson

    def _lesson(self, lesson: Lesson, target: Path, check_in: CheckIn) -> Written:
        """One lesson as one file; with its arithmetic difference, where it did not start from the model's
        weights."""
        log, directory = self._log, self._log.directory(lesson)
        log.open_delta(lesson)  # its checksum
        model = identity_of(log, self._weights.arena.tensors)
        parts: dict[PartName, Path | bytes] = {
            name: directory / name
            for name in get_args(PartName)
            if name != "manifest.json" and (directory / name).is_file()
        }
        beside = storage.temporary_name(directory / "difference.safetensors")
        try:
            if lesson.parent != log.base_version:
                sizes = {name: t.numel() for name, t in self._weights.arena.tensors.items()}
                difference.write(beside, self._pairs(lesson, check_in), sizes)
                parts["difference.safetensors"] = beside
            storage.check_room(
                target.parent, sum(p.stat().st_size for p in parts.values() if isinstance(p, Path))
            )
            manifest = LessonManifest(
                lesson=lesson,
                model=model,
                model_name=self._model_name,
                parts={},
                written_by=__version__,
                exported_at=utc_now(),
            )
            lesson_file.write(target, manifest, parts)
        finally:
            beside.unlink(missing_ok=True)
        return Written([lesson.id], str(lesson.version), {"parts": sorted(parts)})

    def _gguf(self, request: ExportRequest, target: Path, check_in: CheckIn) -> Written:
        """The kept weights as a GGUF file."""
        log = self._log
        lessons, version = log.in_weights(), log.kept_version()
        note = {"version": version, "base_version": log.base_version, "lessons": lessons}
        weights = checked(self._counted(log.durable_weights(), check_in), version)
        counts = gguf.write(target, weights, model_directory(log), request.dtype, note)
        return Written(lessons, version, {"dtype": request.dtype, "tensors": counts})

    def _adapter(self, request: ExportRequest, target: Path, check_in: CheckIn) -> Written:
        """One lesson, or all that are kept, as an adapter; with the probes that one was judged by."""
        log = self._log
        lesson = self._kept(request.lesson) if request.lesson is not None else None
        lessons = [lesson.id] if lesson is not None else log.in_weights()
        version = str(lesson.version) if lesson is not None else log.kept_version()
        self._writing = Phase("writing", "tensors")

        intended = lesson is not None and (log.directory(lesson) / UPDATE_FILE).is_file()

        def changes() -> Iterator[Named]:
            if lesson is not None and intended:
                return self._counted(read_update(log.directory(lesson)), check_in)
            pairs = self._pairs(lesson, check_in) if lesson else self._all_pairs(version, check_in)
            return ((name, difference.between(before, after)) for name, before, after in pairs)

        made = lora.write(target, changes, model_directory(log), request.rank, str(log.base_dir))
        note = {
            "schema_version": 1,
            "version": version,
            "base_version": log.base_version,
            "base": str(log.base_dir),
            "lessons": lessons,
            "of": INTENDED if intended else WRITTEN,
            **made.told(),
            "exported_at": utc_now().isoformat(),
        }
        storage.write_text(target / checkpoint.STATE_FILE, json.dumps(note, indent=2) + "\n")
        if lesson is not None and (probes := log.probes(lesson)):
            storage.write_text(target / PROBES_FILE, to_jsonl(probes))
        details = {
            "rank": made.rank,
            "of": INTENDED if intended else WRITTEN,
            "relative_error": made.error,
            "tensors": len(made.carried),
            "left_out": len(made.left_out),
        }
        return Written(lessons, version, details)

    def _all_pairs(self, version: str, check_in: CheckIn) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, the model's own, as it is kept) of every tensor."""
        own = checkpoint.stream(self._log.base_dir, self._log.dtypes)
        kept = checked(self._counted(self._log.durable_weights(), check_in), version)
        for (name, was), (_, now) in zip(own, kept, strict=True):
            yield name, was, now
            del was, now

    def _pairs(self, lesson: Lesson, check_in: CheckIn) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, before, after) of each tensor that a lesson changed."""
        stored = self._log.open_delta(lesson)
        before = checked(self._log.weights_before(lesson), str(lesson.parent))
        for name, was in self._counted(before, check_in):
            if name in stored.sizes:
                now = was.clone()
                stored.apply_(name, now)
                yield name, was, now
                del now
            del was

    def _checkpoint(self, target: Path, check_in: CheckIn) -> Written:
        """The kept weights as a Hugging Face directory, with all that lies beside the model's own."""
        log = self._log
        lessons, version = log.in_weights(), log.kept_version()
        note = {
            "schema_version": 1,
            "version": version,
            "base_version": log.base_version,
            "lessons": lessons,
            "exported_at": utc_now().isoformat(),
        }
        weights = checked(self._counted(log.durable_weights(), check_in), version)
        checkpoint.export(target, model_directory(log), weights, note, log.dtypes)
        return Written(lessons, version, {})

    def _counted(self, weights: Iterable[Named], check_in: CheckIn) -> Iterator[Named]:
        total = len(self._weights.arena.tensors)
        for done, (name, tensor) in enumerate(weights):
            self._count(done, total)
            check_in()
            yield name, tensor
            del tensor  # before the next one is made
        self._count(total, total)

    def _count(self, done: int, total: int) -> None:
        assert self._writing is not None, "until it is written"
        self._writing = self._writing.counted(done, total)


def _place(given: str, home: Path) -> Path:
    """Where an export goes. Raises BadInput: not there."""
    path = Path(given)
    if "\0" in given or not path.is_absolute() or path.name in ("", "..") or ".." in path.parts:
        raise BadInput(f"{given[:200]!r} is no absolute path", "give one, without `..`").about("path")
    try:
        parent = path.parent.resolve(strict=True)
    except OSError as e:
        raise BadInput(f"{path.parent}: {e.strerror or e}", "make the folder first").about("path") from None
    path = parent / path.name
    if path.is_relative_to(home.resolve()):
        raise BadInput(f"{path} lies in the home", "an export goes elsewhere: name another folder").about(
            "path"
        )
    _check_free(path)
    return path


def _check_free(path: Path) -> None:
    try:
        path.lstat()
    except FileNotFoundError:
        return
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror or e}", "name another place").about("path") from None
    raise BadInput(f"{path} is there already; nothing was written", "remove it, or name another").about(
        "path"
    )


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(p.stat().st_size for p in files if p.is_file())


def _remove(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except OSError as e:
        raise StorageError(f"{path}: {e.strerror or e}", "remove it by hand") from None
