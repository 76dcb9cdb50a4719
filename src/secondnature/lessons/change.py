"""How the bytes of an entry come about: what all kinds of change have in common (server).

A change is prepared, which reads, samples and checks and writes nothing, and applied, which writes the weights.
`trained` lets the trainer write; `imported` adds what was taught elsewhere; `reverted` is the exact undo of the
newest kept entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from secondnature.engines.generation import GenerationResult
from secondnature.records import Lesson

__all__ = ["Change", "CheckIn", "Judged"]

CheckIn = Callable[[], None]
"""Called often by whatever takes long: serves commands meanwhile; raises Cancelled when it is to end."""


class Change(Protocol):
    """One change of the served weights."""

    def prepare(self, check_in: CheckIn) -> None:
        """Find out all that can be known before; nothing is written. Raises whatever speaks against it."""
        ...

    def apply(self, check_in: CheckIn) -> Lesson:
        """Write the weights; the entry with what is now known of it. However it raises, nobody writes any more."""
        ...


class Judged(Change, Protocol):
    """A change that is on trial before it is kept: what it taught is asked before and after."""

    answers: list[GenerationResult]
    """The greedy answers to the plan's samples, before."""

    def plan_again(self) -> None:
        """What is to be done, with what is kept now. Raises whatever speaks against it."""
        ...

    def sample(self, check_in: CheckIn) -> list[GenerationResult]:
        """The greedy answers to the plan's samples, by the weights as they are."""
        ...
