"""What leaves the home: each export is written beside its place, noted in the home, and then has its name (server).

An export is read from the disk, as a start reads it: a checkpoint and the deltas of what is kept, tensor by tensor.
Lessons go on meanwhile, and so do commands, for whoever writes checks in between two tensors; but nothing that is
being read is removed. It is noted (`exports.jsonl`) before it gets its name: a crash may leave a note of an export
that is not there, and never one that nobody knows of. A lesson that is taken back later can be traced so.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secondnature import storage
from secondnature.errors import BadInput, Busy, NotDurable, StorageError
from secondnature.lessons.job import Phase
from secondnature.lessons.log import Log
from secondnature.lessons.weights import ServedWeights, checked
from secondnature.records import Export, Lesson, utc_now
from secondnature.weights import checkpoint
from secondnature.weights.content import Named
from secondnature.wire import ExportRequest, PhaseProgress

__all__ = ["EXPORTS_FILE", "Exports"]

EXPORTS_FILE = "exports.jsonl"
CheckIn = Callable[[], None]


@dataclass
class Written:
    """What a form wrote, for the note."""

    lessons: list[str]
    version: str
    details: dict[str, Any]


class Exports:
    """Of one home. `write` is used by the runner's thread; the rest from any."""

    def __init__(self, log: Log, weights: ServedWeights) -> None:
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
                written = self._checkpoint(temporary, check_in)
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
        checkpoint.export(target, self._model_dir(), weights, note, log.dtypes)
        return Written(lessons, version, {})

    def _model_dir(self) -> Path:
        """The model's own directory; where that is gone, the working copy."""
        base = self._log.base_dir
        return base if (base / "config.json").is_file() else self._log.checkpoint_state()[0]

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
