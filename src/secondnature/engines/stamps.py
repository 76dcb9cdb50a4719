"""Which weights are in force, and whether somebody is writing them: read before and after every forward (server).

While a lesson runs the weights change at every step without waiting for anybody, so a version between two steps
has no content id; it is named after its origin: `wPARENT+LESSON.N` is the parent with N writes of that lesson.
"""

from __future__ import annotations

from secondnature.engines.base import Stamp
from secondnature.weights.arena import Arena


class Clock:
    """The version of the arena's weights. `read` is safe from any thread."""

    def __init__(self, arena: Arena, version: str) -> None:
        self._arena = arena
        self._label: tuple[str, str | None, int] = (version, None, 0)  # replaced as a whole
        self._trial = False

    def read(self) -> Stamp:
        """The weights now."""
        begun, done = self._arena.writes
        version, lesson, start = self._label
        if lesson is not None and begun > start:
            version = f"{version}+{lesson}.{begun - start}"
        return Stamp(begun, begun != done, version, self._trial)

    @property
    def version(self) -> str:
        """The last settled version: what the present lesson, if any, started from or ended at."""
        return self._label[0]

    def begin(self, lesson_number: int) -> None:
        """A lesson starts to run: from here on, answers are on trial."""
        self._trial = True
        self._label = (self._label[0], f"{lesson_number:04d}", self._arena.writes[0])

    def settle(self, version: str, *, trial: bool) -> None:
        """Nobody writes now, and these are the weights."""
        self._label = (version, None, 0)
        self._trial = trial
