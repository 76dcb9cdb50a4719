"""Which weights are in force, and whether somebody is writing them: read before and after every forward (server).

A version is true at one epoch, and the two are kept as one value: a name is told only while the counters stand
where it was given. While a lesson runs the weights change at every step without waiting for anybody, so a version
between two steps has no content id; it is named after its origin: `wPARENT+LESSON.N` is the parent with N writes of
that lesson, and `wPARENT+N` is the parent with N writes that nobody has named (a write that failed in the middle).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from secondnature.engines.generation import Stamp
from secondnature.weights.arena import Arena


@dataclass(frozen=True)
class Label:
    """A name and the epoch at which it is true."""

    version: str
    epoch: int
    before: Stamp | None = None
    """What is told until that epoch has begun; None: it has."""
    lesson: str | None = None
    """The number of the lesson that writes from this epoch on."""
    trial: bool = False


class Clock:
    """The version of the arena's weights. `read` is safe from any thread; one thread sets it."""

    def __init__(self, arena: Arena, version: str) -> None:
        self._arena = arena
        self._label = Label(version, arena.writes[0])  # replaced as a whole

    def read(self) -> Stamp:
        """The weights now."""
        while True:
            label = self._label
            begun, done = self._arena.writes
            if label is self._label:  # else it was given anew between the two: its epoch is another one
                break
        version, since = label.version, begun - label.epoch
        if since < 0:
            assert label.before is not None, "only an announced label lies ahead"
            return replace(label.before, epoch=begun, writing=begun != done)
        if since > 0:
            version = f"{version}+{label.lesson}.{since}" if label.lesson else f"{version}+{since}"
        return Stamp(begun, begun != done, version, label.trial)

    @property
    def version(self) -> str:
        """The last settled version: what the present lesson, if any, started from or ended at."""
        return self._label.version

    def begin(self, lesson_number: int) -> None:
        """A lesson starts to run: from here on, answers are on trial."""
        self._label = replace(self._label, lesson=f"{lesson_number:04d}", trial=True)

    def settle(self, version: str, epoch: int, *, trial: bool) -> None:
        """At this epoch, these are the weights: their content id was computed while nobody wrote."""
        self._label = Label(version, epoch, trial=trial)

    def become(self, version: str) -> Label:
        """The next write will make these the weights; until it begins, they are those from before.

        Gives the name from before, for `give_up`.
        """
        was = self._label
        self._label = Label(version, self._arena.writes[0] + 1, before=self.read())
        return was

    def give_up(self, was: Label) -> None:
        """The write that was announced failed: what it wrote, if anything, is a write that nobody has named."""
        self._label = was
