"""The served weights: whole, or known to be not (server; one thread uses it).

Between the arena, in which the engine computes and the trainer writes, and the log, which says what the weights
have to be. Everything here goes tensor by tensor: at no time is there a second copy of the model. Whatever fails in
the middle leaves the weights *dirty*: that is said, `restore` is tried until it succeeds, and nothing else begins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

from secondnature.engines.stamps import Clock
from secondnature.errors import BadDelta, WeightsError
from secondnature.lessons.log import DELTA_FILE, Log
from secondnature.records import Lesson
from secondnature.weights import delta
from secondnature.weights.arena import Arena
from secondnature.weights.content import ContentHasher, Named, content_id

__all__ = ["ServedWeights", "checked", "fill_kept"]

LOG = logging.getLogger(__name__)

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
        self.dirty = self.dirty or "they are being restored"
        try:
            self.arena.close_torn_write()
            if not self._are(wanted):
                self._write(self._log.durable_weights(), wanted, on_tensor)
            self.clock.settle(wanted, self._epoch(), trial=False)
        except BaseException as e:
            self.dirty = f"they could not be restored: {e}"
            raise
        self.dirty = ""

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
        found = content_id(self._counted(self._differing(stored), on_tensor), like=lesson.parent)
        if found != lesson.parent:
            raise BadDelta(
                f"undoing {lesson.id} would give {found}; expected {lesson.parent}", "restore from a backup"
            )
        try:
            entry = commit()
            self._write(self._differing(stored), lesson.parent, on_tensor)
            self.clock.settle(lesson.parent, self._epoch(), trial=False)
        except BaseException as e:
            if self._are(self._log.kept_version()):  # there was no commit
                raise
            self.dirty = f"{lesson.id} is taken back in the log, but not yet in memory: {e}"
            raise
        return entry

    def fold(self, on_tensor: OnTensor = _nobody) -> None:
        """Bring the working copy up to date: from memory where that holds the kept weights, else from disk.

        Raises:
            StorageError: the disk refused; the working copy is as before.
            BadCheckpoint, BadDelta: the disk does not give the kept weights.
        """
        if self.are_kept:
            in_order = sorted(self.arena.tensors.items())
            epoch = self._epoch()
            self._log.save_checkpoint(self._counted(in_order, on_tensor))
            assert self._epoch() == epoch, "nobody writes but the thread that folds"
        else:
            wanted = self._log.kept_version()
            self._log.save_checkpoint(checked(self._counted(self._log.durable_weights(), on_tensor), wanted))

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

    def _differing(self, stored: delta.StoredDelta) -> Iterator[Named]:
        """The arena's weights with a stored difference applied, one tensor after the other."""
        for name, tensor in sorted(self.arena.tensors.items()):
            if name in stored.sizes:
                mine = tensor.clone()
                stored.apply_(name, mine)
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
