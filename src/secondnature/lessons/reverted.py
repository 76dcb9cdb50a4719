"""The exact undo of the newest kept entry, as an entry of its own (server).

It needs no trial: what it gives was kept before, and every byte is compared with that version before one is
written. In the middle of the log it is refused.
"""

from __future__ import annotations

from secondnature.lessons.change import CheckIn
from secondnature.lessons.log import Log
from secondnature.lessons.weights import ServedWeights
from secondnature.records import Lesson

__all__ = ["Reverted"]


class Reverted:
    """Takes one kept entry back."""

    def __init__(self, lesson: Lesson, *, log: Log, weights: ServedWeights) -> None:
        self._lesson = lesson
        self._log = log
        self._weights = weights

    def prepare(self, check_in: CheckIn) -> None:
        """Raises WrongState: it is not kept, was taken back, or later ones stand on it."""
        check_in()
        self._log.check_revert(self._lesson)

    def apply(self, check_in: CheckIn) -> Lesson:
        """The entry that says so, kept. Raises: as `ServedWeights.take_back`."""
        lesson = self._lesson
        return self._weights.take_back(lesson, lambda: self._log.create_revert(lesson), lambda *_: check_in())
