"""Follow a job to its end, and cancel it on ctrl-C (process D).

The first ctrl-C is only counted: the loop sees it between two calls, deletes the job and waits until it is undone.
The second one leaves at once. How far each phase is, is shown by `progress`.
"""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Self

from secondnature.cli.output import Output
from secondnature.cli.progress import Display, display
from secondnature.errors import Conflict, NotFound, SecondnatureError, Unreachable
from secondnature.records import OPEN_STATES, STOPPED_BY, Side
from secondnature.wire import Client, DevelopmentLook, JobStatus, PhaseProgress

POLL_S = 0.3
ASK_HEALTH_S = 5.0
"""Where a phase cannot be counted and does not end, the server is asked so often what is wrong."""
MISSES = 3
"""Polls in a row that may fail before the server counts as gone."""


class Interrupted(Exception):
    """Ctrl-C: the job was ended; `status` says how."""

    def __init__(self, status: JobStatus) -> None:
        super().__init__(status.job)
        self.status = status


class Interrupts:
    """Counts ctrl-C (and SIGTERM) in a `with` block instead of breaking into a request; raises at the second."""

    def __init__(self) -> None:
        self.count = 0
        self._previous: list[tuple[int, object]] = []

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous.append((number, signal.signal(number, self._handle)))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous:
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _handle(self, _signum: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt


def follow(client: Client, job: str, out: Output, interrupts: Interrupts, *, judged: bool) -> JobStatus:
    """Poll a job until it has ended. Not judged: until it is on trial, where it stays until somebody decides.

    Raises:
        Interrupted: after ctrl-C, when the job has ended.
        Unreachable: the server is gone.
    """
    with display(out) as shown:
        watch = _Watch(client, out, shown)
        misses = 0
        while not interrupts.count:
            try:
                status = client.status(job, watch.step)
                misses = 0
            except Unreachable:
                misses += 1
                if misses >= MISSES:
                    raise
                time.sleep(POLL_S)
                continue
            waits = status.state == "on_trial" and status.phase == "on trial"  # nothing more is measured
            if status.state not in OPEN_STATES or (waits and not judged):
                watch.say_why(status)
                return status
            watch.show(status)
            time.sleep(POLL_S)
    raise Interrupted(_cancel(client, job, out))


def _cancel(client: Client, job: str, out: Output) -> JobStatus:
    out.note("stopping: the lesson is being undone (ctrl-C again leaves at once)")
    try:
        client.cancel(job)
    except (Conflict, NotFound):  # it ended by itself meanwhile, or waits for somebody's word
        status = client.status(job)
        if status.state == "on_trial":
            client.revert(status.lesson)
    with display(out) as shown:
        watch = _Watch(client, out, shown)
        while (status := client.status(job, watch.step)).state in OPEN_STATES:
            watch.show(status)
            time.sleep(POLL_S)
    return status


def why_stopped(code: str) -> str:
    """Why training made no further step, in words."""
    return STOPPED_BY.get(code, code)


def far(look: DevelopmentLook) -> str:
    """`development 7/12, other 11/12 (1 lost)`: what passed at a look."""
    names: dict[Side, str] = {"right": "development", "other": "other"}
    parts = [
        f"{name} {look.passed.get(side, 0):,}/{look.asked[side]:,}"
        for side, name in names.items()
        if side in look.asked
    ]
    return ", ".join(parts) + (f" ({look.lost:,} lost)" if look.lost else "")


class _Watch:
    """What the statuses of one job say, shown."""

    def __init__(self, client: Client, out: Output, shown: Display) -> None:
        self._client = client
        self._out = out
        self._shown = shown
        self._phase, self._asked_at, self._trouble = "", time.monotonic(), ""
        self._steps: PhaseProgress | None = None
        self._told_why = False
        self.step = 0
        """The last step that is known: losses of those before are not sent again."""

    def show(self, status: JobStatus) -> None:
        phase = status.phase or status.state
        self.step = max(self.step, status.step)
        if phase != self._phase:
            if (
                self._phase == "training" and self._steps is not None
            ):  # its last steps came after the last look
                self._shown.show("training", self._steps.model_copy(update={"done": status.step}))
            self._phase, self._asked_at, self._trouble = phase, time.monotonic(), ""
        extra = ""
        if status.progress is None:
            self._look_for_trouble()
            extra = f" ({self._trouble})" if self._trouble else ""
        elif phase == "training":
            extra = f", loss {status.loss:.4g}" if status.loss is not None else ""
            extra += f", {far(status.look)}" if status.look is not None else ""
            self._steps = status.progress
        self._shown.show(phase, status.progress, extra)
        self.say_why(status)

    def say_why(self, status: JobStatus) -> None:
        if status.stopped_by and not self._told_why:
            self._told_why = True
            steps = f"{status.step:,} step{'s'[: status.step != 1]}"
            self._out.note(f"training stopped after {steps}: {why_stopped(status.stopped_by)}")

    def _look_for_trouble(self) -> None:
        if time.monotonic() - self._asked_at < ASK_HEALTH_S:
            return
        self._asked_at = time.monotonic()
        try:
            self._trouble = self._client.health().detail
        except SecondnatureError:  # the next look at the status says it
            self._trouble = ""
