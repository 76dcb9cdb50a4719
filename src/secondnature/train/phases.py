"""How far a lesson is, and whether to go on: what every long phase asks after each of its items (trainer).

A phase calls its `Each` with the number of items done. That tells the server, some times a second at most, and
raises Cancelled where somebody asked for the end: so no phase is silent, and none outlives a cancel by more than
an item.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from secondnature import wire

__all__ = ["EVERY_S", "Check", "Each", "Phases", "Report", "unwatched"]

EVERY_S = 0.2
"""Between two messages about the same phase."""

Each = Callable[[int], object]
"""Called with how many items of a phase are done; raises Cancelled to end it."""
Report = Callable[[dict[str, object]], None]
"""Sends a metric."""
Check = Callable[[], None]
"""Raises Cancelled when somebody asked for it."""


def unwatched(num_done: int) -> None:
    """For whoever only wants the result."""


class Phases:
    """The phases of one job, told through `report`, ended through `check`."""

    def __init__(self, report: Report, check: Check) -> None:
        self._report = report
        self._check = check
        self._told: dict[str, float] = {}

    def begin(self, phase: wire.TrainerPhase, total: int) -> Each:
        """Say that a phase of `total` items (0: not known) begins; what to call after each of them."""

        def each(num_done: int) -> None:
            self._check()
            self.tell(phase, num_done, total)

        each(0)
        return each

    def tell(self, phase: wire.TrainerPhase, num_done: int, total: int) -> None:
        """Say how far it is, unless that was said a moment ago."""
        now = time.monotonic()
        if now - self._told.get(phase, -EVERY_S) >= EVERY_S:
            self._told[phase] = now
            self._report({"kind": "phase", "phase": phase, "done": num_done, "total": total})
