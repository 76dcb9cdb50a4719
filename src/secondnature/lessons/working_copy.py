"""The working copy: the checkpoint that is brought up to the kept lessons from time to time (server).

Nothing depends on it but the time that a start and an undo take: the deltas since then stand for the rest. It is
folded when the chain of deltas is long, some time after a lesson was kept, and when somebody asks.
"""

from __future__ import annotations

import logging
import time

from secondnature.config import Settings
from secondnature.errors import Busy, SecondnatureError
from secondnature.lessons.job import Phase
from secondnature.lessons.log import Log
from secondnature.lessons.weights import ServedWeights
from secondnature.records import Lesson
from secondnature.wire import CheckpointReply

__all__ = ["WorkingCopy"]

LOG = logging.getLogger(__name__)


class WorkingCopy:
    """Of one home. Used by the runner's thread; its state may be asked for from any."""

    def __init__(self, settings: Settings, log: Log, weights: ServedWeights) -> None:
        self._settings = settings
        self._log = log
        self._weights = weights
        self._due: float | None = None
        """When it is to be folded, if nothing comes before."""
        self._chain: tuple[Lesson | None, int] | None = None
        """(the last kept entry, how many are in the chain then): it costs a look at all entries."""
        self._writing: Phase | None = None
        """How far it is, while it is written."""
        self.trouble = ""
        """Why it could not be brought up to date; empty: nothing stood against it."""

    def wait(self) -> None:
        """It is behind: it is due some time from now, if it was not yet."""
        self._due = self._due or time.monotonic() + self._settings.checkpoint_after_s

    @property
    def is_due(self) -> bool:
        """The chain of deltas is long, or the working copy is old."""
        head = self._log.head()
        if self._chain is None or self._chain[0] is not head:
            self._chain = (head, len(self._log.chain()))
        due = self._due is not None and time.monotonic() > self._due
        return due or self._chain[1] > self._settings.max_chain

    def fold(self) -> None:
        """Bring it up to date. Raises Busy: a command came between; StorageError: the disk refused."""
        self._writing = Phase("writing", "tensors")

        def on_tensor(done: int, total: int) -> None:
            assert self._writing is not None, "until it is written"
            self._writing = self._writing.counted(done, total)

        try:
            self._weights.fold(on_tensor)
        finally:
            self._writing = None
        self._due = self._chain = None
        self.trouble = ""

    def fold_quietly(self) -> bool:
        """Whether it could be folded; what failed is in `trouble`, and is tried again."""
        try:
            self.fold()
        except SecondnatureError as e:
            LOG.warning("no checkpoint now: %s", e)
            if not isinstance(e, Busy):  # a command came between
                self.trouble = str(e)
            self._due = time.monotonic() + self._settings.checkpoint_after_s
            return False
        return True

    def state(self) -> CheckpointReply:
        """What it holds."""
        path, version, _ = self._log.checkpoint_state()
        held, writing = version or self._log.base_version, self._writing
        return CheckpointReply(
            path=str(path),
            weights_version=held,
            current=held == self._log.kept_version(),
            progress=writing.progress() if writing is not None else None,
        )
