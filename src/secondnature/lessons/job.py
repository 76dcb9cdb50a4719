"""A lesson that waits or lives, with what matters only while it does: its phase, its progress, how it is to end.

Written by the runner's thread, read by any. What is left when it has ended lies in the log.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from secondnature.lessons.plan import MAX_NAMED, Plan
from secondnature.records import ErrorInfo, Evidence, Lesson, LessonState, LookMetric
from secondnature.wire import DevelopmentLook, JobStatus, PhaseProgress, TrainRequest

__all__ = ["LAST_LOSSES", "Ending", "Job", "Phase"]

LAST_LOSSES = 100
"""Losses in a status that does not say after which step."""


@dataclass(frozen=True)
class Ending:
    """How a lesson that is not kept ends, once the weights are whole again."""

    state: LessonState
    reason: str
    error: ErrorInfo | None = None


@dataclass(frozen=True)
class Phase:
    """What is being done, and how far it is. Replaced as a whole."""

    name: str
    unit: str = ""
    done: int = 0
    total: int = 0
    since: float = field(default_factory=time.monotonic)
    first: int | None = None
    """The count when counting began: what was there before (answers that are known, say) took no time."""

    def counted(self, done: int, total: int) -> Phase:
        """The same phase, further on."""
        first = done if self.first is None else self.first
        return Phase(self.name, self.unit, done, total, self.since, first)

    def progress(self) -> PhaseProgress | None:
        """Rate and the time that is left, from the time it took so far; None where nothing is counted."""
        if not self.total:
            return None
        took = time.monotonic() - self.since
        num_new = self.done - (self.first or 0)
        rate = num_new / took if num_new > 0 and took > 0 else None
        left = (self.total - self.done) / rate if rate else None
        return PhaseProgress(done=self.done, total=self.total, unit=self.unit, per_s=rate, eta_s=left)


@dataclass
class Job:
    """One lesson of kind `train`, from its acceptance to its end."""

    lesson: Lesson
    plan: Plan
    request: TrainRequest
    now: Phase = field(default_factory=lambda: Phase("waiting"))
    step: int = 0
    losses: list[float] = field(default_factory=list[float])
    tokens_per_s: float | None = None
    look: LookMetric | None = None
    """The last one at the development probes."""
    evidence: Evidence | None = None
    ending: Ending | None = None
    """Set when it is decided that it is not kept; it ends when the weights are whole."""
    cancel: threading.Event = field(default_factory=threading.Event)
    decidable: bool = False
    """Whether it has come so far that a word decides."""

    @property
    def _announced(self) -> LessonState:
        """The state that is told: on trial only once somebody's word about it is taken (or nobody's is wanted)."""
        return "running" if self.lesson.state == "on_trial" and not self.decidable else self.lesson.state

    @property
    def phase(self) -> str:
        """What is being done."""
        return self.now.name

    def enter(self, name: str, unit: str = "", total: int = 0) -> None:
        """A new phase begins."""
        self.now = Phase(name, unit, 0, total)
        self.decidable |= name == "on trial"

    def count(self, done: int, total: int) -> None:
        """The phase is so far."""
        self.now = self.now.counted(done, total)

    def status(self, weights_version: str, after: int | None) -> JobStatus:
        """What is told of it. `after`: the losses of the steps after this one; None: the last ones."""
        progress = self.now.progress()
        losses = self.losses[-LAST_LOSSES:] if after is None else self.losses[max(0, after) :]
        return JobStatus(
            job=self.lesson.job,
            lesson=self.lesson.id,
            state=self._announced,
            phase=self.phase,
            progress=progress,
            step=self.step,
            steps=self.plan.steps,
            loss=self.losses[-1] if self.losses else None,
            losses=losses,
            tokens_per_s=self.tokens_per_s,
            look=None if self.look is None else DevelopmentLook.of(self.look),
            eta_s=progress.eta_s if progress is not None else None,
            stopped_by=self.lesson.stopped_by,
            kl=self.lesson.kl,
            weights_version=weights_version,
            evidence=self.evidence,
            error=self.lesson.error,
            num_passed_over=len(self.plan.passed_over),
            passed_over=self.plan.passed_over[:MAX_NAMED],
        )
