"""The served weights: whole, or known to be not (server; one thread uses it).

Between the arena, in which the engine computes and the trainer writes, and the log, which says what the weights
have to be. Everything here goes tensor by tensor: at no time is there a second copy of the model. Whatever fails in
the middle leaves the weights *dirty*: that is said, `restore` is tried until it succeeds, and nothing else begins.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterable, Iterator

from secondnature.engines.stamps import Clock
from secondnature.errors import BadDelta, Busy, WeightsError
from secondnature.lessons.log import DELTA_FILE, Log
from secondnature.records import Lesson
from secondnature.weights import delta
from secondnature.weights.arena import Arena
from secondnature.weights.content import ContentHasher, Named, content_id

__all__ = ["RESTORING", "ServedWeights", "checked", "fill_kept"]

LOG = logging.getLogger(__name__)

RESTORING = "they are being restored"
"""Why they are dirty while an undo is under way that has not failed: no trouble."""
OnTensor = Callable[[int, int], None]
"""Told (tensors done, tensors in all) between two of them; may raise to give up."""


def _nobody(_done: int, _total: int) -> None:
    """Nobody is told."""


class ServedWeights:
    """The weights that answers are computed with, and their way back to what the log says."""

    def __init__(self, arena: Arena, clock: Clock, log: Log) -> None:
        self.arena = arena
        self.clock = clock
        self._log = log
        self.dirty = ""
        """Why the weights may be no version's; empty: they are whole, or a lesson is writing."""
        self._reading = False
        """Whether the durable weights are being read, tensor by tensor: what they lie in has to stay."""

    @property
    def version(self) -> str:
        """The last version that was whole."""
        return self.clock.version

    @property
    def are_kept(self) -> bool:
        """Whether the weights are those that the log stands for, now."""
        return not self.dirty and self._are(self._log.kept_version())

    def begin(self, lesson: Lesson) -> None:
        """A lesson is about to write. Raises WeightsError: the weights are not what it is to start from."""
        if not self.are_kept:
            raise WeightsError(
                f"the weights are {self.clock.read().version}; expected {self._log.kept_version()}, what the log "
                "stands for",
                "they are being restored: try again",
            )
        self.clock.begin(lesson.number)

    def record(self, lesson: Lesson, on_tensor: OnTensor = _nobody) -> Lesson:
        """Write down what a lesson did to the weights; they have their version from here on, on trial.

        Gives the entry with its version and checksum, not yet saved.

        Raises:
            BadDelta: the disk does not hold the weights that the lesson started from.
            StorageError: the disk refused.
        """
        assert lesson.parent is not None, "a running lesson knows what it started from"
        epoch = self._epoch()
        before = self._counted(self._log.durable_weights(), on_tensor)
        path = self._log.directory(lesson) / DELTA_FILE
        with self.being_read():
            written = delta.write(path, before, self.arena.tensors, like=lesson.parent)
        if written.base != lesson.parent:
            raise BadDelta(
                f"lesson {lesson.id} started from {lesson.parent}; the disk holds {written.base}",
                "restore the home from a backup",
            )
        if self._epoch() != epoch:
            raise WeightsError("somebody wrote the weights while they were compared", "restart the server")
        self.clock.settle(written.result, epoch, trial=True)
        return lesson.model_copy(update={"version": written.result, "delta_sha256": written.sha256})

    def keep(self) -> None:
        """The lesson on trial was kept: the same weights, no trial any more."""
        self.clock.settle(self.version, self._epoch(), trial=False)

    def restore(self, on_tensor: OnTensor = _nobody) -> None:
        """Make the weights those that the log stands for, to the byte, whatever lies there now.

        Raises:
            BadCheckpoint, BadDelta, StorageError: the disk does not give them; the weights are dirty.
        """
        wanted = self._log.kept_version()
        self.dirty = self.dirty or RESTORING
        try:
            self.arena.close_torn_write()
            if not self._are(wanted):
                with self.being_read():
                    self._write(self._log.durable_weights(), wanted, on_tensor)
            self.clock.settle(wanted, self._epoch(), trial=False)
        except BaseException as e:
            self.dirty = f"they could not be restored: {str(e) or type(e).__name__}"
            raise
        self.dirty = ""

    def check_unread(self) -> None:
        """Nobody is in the middle of the durable weights, so that files of theirs may go. Raises Busy."""
        if self._reading:
            raise Busy("the weights on disk are being read; nothing was done", "try again in a moment")

    @contextlib.contextmanager
    def being_read(self) -> Generator[None]:
        """While the block runs, no file goes that the weights on disk, or those of earlier entries, lie in."""
        was, self._reading = self._reading, True
        try:
            yield
        finally:
            self._reading = was

    def _are(self, version: str) -> bool:
        """Nobody has written since the weights were named so, and nobody does now."""
        stamp = self.clock.read()
        return stamp.version == version and not stamp.writing

    def take_back(
        self, lesson: Lesson, commit: Callable[[], Lesson], on_tensor: OnTensor = _nobody
    ) -> Lesson:
        """The exact undo of the newest kept entry: its difference once more. Gives what `commit` gives.

        Everything is read and compared with the version before it first; then `commit` writes the entry that says
        so, and only then are the weights written. What fails after the commit leaves them dirty.

        Raises:
            WeightsError: the weights are not those that the entry made; nothing was written.
            BadDelta: the undo would not give the weights that were there before; nothing was written.
            StorageError: the disk refused; nothing was written.
        """
        assert lesson.parent is not None, "a kept entry has a parent"
        if not self.are_kept:
            raise WeightsError(
                f"the weights are {self.clock.read().version}; expected {lesson.version}, which {lesson.id} made",
                "they are being restored: try again",
            )
        stored = self._log.open_delta(lesson)
        stored.check(self.arena.tensors)
        back = lesson.parent == stored.base
        found = content_id(self._counted(self.differing(stored, back), on_tensor), like=lesson.parent)
        if found != lesson.parent:
            raise BadDelta(
                f"undoing {lesson.id} would give {found}; expected {lesson.parent}", "restore from a backup"
            )
        try:
            entry = commit()
            self._write(self.differing(stored, back), lesson.parent, on_tensor)
            self.clock.settle(lesson.parent, self._epoch(), trial=False)
        except BaseException as e:
            if not self._are(self._log.kept_version()):  # also where `commit` raised after its rename
                why = str(e) or type(e).__name__
                self.dirty = f"{lesson.id} is taken back in the log, but not yet in memory: {why}"
            raise
        return entry

    def fold(self, on_tensor: OnTensor = _nobody) -> None:
        """Bring the working copy up to date: from memory where that holds the kept weights, else from disk.

        A lesson that runs may write at any moment, also its first time: then memory is not read.

        Raises:
            Busy: commands are served while a difference is written down, or undone; the working copy is as before.
            StorageError: the disk refused; as before, too.
            BadCheckpoint, BadDelta: the disk does not give the kept weights.
            WeightsError: somebody wrote meanwhile; the working copy is as before.
        """
        self.check_unread()
        if self.are_kept and not self.clock.read().trial:
            in_order = sorted(self.arena.tensors.items())
            self._log.save_checkpoint(self._unwritten(self._counted(in_order, on_tensor)))
        else:
            wanted = self._log.kept_version()
            self._log.save_checkpoint(checked(self._counted(self._log.durable_weights(), on_tensor), wanted))

    def _unwritten(self, weights: Iterable[Named]) -> Iterator[Named]:
        """The weights as they pass; before the end, that nobody wrote meanwhile. Raises WeightsError."""
        epoch = self._epoch()
        yield from weights
        if self._epoch() != epoch:
            raise WeightsError("somebody wrote the weights while they were saved", "restart the server")

    # ------------------------------------------------------------------------------------------------

    def _epoch(self) -> int:
        """The writes so far. Raises WeightsError: somebody is writing."""
        begun, done = self.arena.writes
        if begun != done:
            raise WeightsError("somebody is writing the weights; expected nobody", "restart the server")
        return begun

    def _write(self, weights: Iterable[Named], version: str, on_tensor: OnTensor) -> None:
        """Write all of them; they are compared with `version` on their way, before the bracket closes."""
        was = self.clock.become(version)
        try:
            self.arena.write(checked(self._counted(weights, on_tensor), version))
        except BaseException:
            self.clock.give_up(was)
            raise

    def differing(self, stored: delta.StoredDelta, back: bool) -> Iterator[Named]:
        """The arena's weights with a difference applied, or taken back; what differs is a copy on the host."""
        for name, tensor in sorted(self.arena.tensors.items()):
            if name in stored.sizes:
                mine = tensor.to("cpu", copy=True)
                stored.apply_(name, mine, back=back, check=False)
                yield name, mine
                del mine  # before the next one is made
            else:
                yield name, tensor

    def _counted(self, weights: Iterable[Named], on_tensor: OnTensor) -> Iterator[Named]:
        total = len(self.arena.tensors)
        for done, (name, tensor) in enumerate(weights):
            on_tensor(done, total)
            yield name, tensor
            del tensor
        on_tensor(total, total)


def checked(weights: Iterable[Named], version: str) -> Iterator[Named]:
    """The weights as they pass, compared with their version when the last has passed. Raises BadDelta."""
    hasher = ContentHasher(version)
    for name, tensor in weights:
        hasher.add(name, tensor)
        yield name, tensor
        del tensor
    found = hasher.id()
    if found != version:
        raise BadDelta(
            f"the disk gives the weights {found}; expected {version}", "restore the home from a backup"
        )


def fill_kept(arena: Arena, log: Log) -> None:
    """At a start: the arena, which holds the model's own weights, gets those that the log stands for.

    Raises:
        BadCheckpoint, BadDelta: the disk does not give them; nothing may be served.
    """
    if log.kept_version() != log.base_version:
        arena.write(checked(log.durable_weights(), log.kept_version()))
