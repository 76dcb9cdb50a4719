"""What a look at the development probes says, and whether it is a reason to stop (trainer).

Pure counting: margins come from the trainer's own reading (`looks`), what passed from the same reading where a
probe compares two answers, and from the serving engine where it checks an answer (`wire.Asking`). Harm has a rule
of its own, the same for both kinds: the other side led before the first step, and no longer does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from secondnature import wire
from secondnature.errors import NonFinite
from secondnature.records import LookMetric

__all__ = ["Stopping"]


class Stopping:
    """The looks of one job. Step 0 is the start that the others are compared with."""

    def __init__(self, job: wire.Train) -> None:
        self._job = job
        self._passed_at_start: Sequence[bool] = []
        self._other_at_start = 0.0

    def metric(self, step: int, margins: Sequence[float | None], passed: Sequence[bool]) -> LookMetric:
        """What a look found of each development probe, by side. Margins in nats; None: the probe has none.

        Raises:
            NonFinite: a margin is no number.
        """
        if not all(math.isfinite(m) for m in margins if m is not None):
            raise NonFinite(
                f"a development margin is not finite after step {step}", "lower the learning rate"
            )
        if step == 0:
            self._passed_at_start = passed
        by_side: dict[str, list[float]] = {}
        marks: dict[str, list[bool]] = {}
        for probe, margin, mark in zip(self._job.development, margins, passed, strict=True):
            marks.setdefault(probe.side, []).append(mark)
            if margin is not None:
                by_side.setdefault(probe.side, []).append(margin)
        lost = [
            i
            for i, (was, now) in enumerate(zip(self._passed_at_start, passed, strict=True))
            if self._job.development[i].side == "other" and was and not now
        ]
        return LookMetric.model_validate(
            {
                "step": step,
                "margins": by_side,
                "passed": {side: mean(found) for side, found in marks.items()},
                "asked": {side: len(found) for side, found in marks.items()},
                "lost": lost,
            }
        )

    def reason(self, look: LookMetric, own: Sequence[float] = ()) -> str | None:
        """Why to stop, a key of STOPPED_BY, if there is a reason to. `own`: the margins of the examples, nats."""
        job = self._job
        if look.step == 0:
            self._other_at_start = mean(look.margins.get("other", []))
            return None
        right = look.margins.get("right") or own
        reasons: list[str] = []
        if job.until_margin is not None:
            if not right or mean(right) < job.until_margin:
                return self._gave_way(look)
            reasons.append("until_margin")
        if job.until_passed is not None:
            if (look.passed.get("right") or 0.0) < job.until_passed:
                return self._gave_way(look)
            reasons.append("until_passed")
        return " and ".join(reasons) or self._gave_way(look)

    def _gave_way(self, look: LookMetric) -> str | None:
        """The other side of the behaviour led at first and no longer does: more steps would do harm.

        By margins: their mean was above zero, and is below. By answers, where a lesson says when to stop: of the
        probes that passed at first, more than half fail. Single answers flip with every step; a side does not.
        """
        led = self._other_at_start > 0 > mean(look.margins.get("other", []))
        if not led and (self._job.until_margin is not None or self._job.until_passed is not None):
            spoken = {i for i, p in enumerate(self._job.development) if p.spoken and p.side == "other"}
            led = 2 * len(spoken.intersection(look.lost)) > sum(self._passed_at_start[i] for i in spoken)
        return "the other side gave way" if led else None


def mean(values: Sequence[float]) -> float:
    """0 where there are none."""
    return sum(values) / len(values) if values else 0.0
