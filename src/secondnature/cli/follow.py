"""Follow a job to its end, and cancel it on ctrl-C (process D).

The first ctrl-C is only counted: the loop sees it between two calls, deletes the job and waits until it is undone.
The second one leaves at once. A progress bar on a terminal, plain lines elsewhere, always on stderr.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Self

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from secondnature.cli.output import Output
from secondnature.errors import Conflict, NotFound, Unreachable
from secondnature.records import OPEN_STATES
from secondnature.wire import Client, JobStatus

POLL_S = 0.3
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
    with _display(out) as display:
        misses = 0
        while not interrupts.count:
            try:
                status = client.status(job)
                misses = 0
            except Unreachable:
                misses += 1
                if misses >= MISSES:
                    raise
                time.sleep(POLL_S)
                continue
            waits = status.state == "on_trial" and status.phase == "on trial"  # nothing more is measured
            if status.state not in OPEN_STATES or (waits and not judged):
                return status
            display.show(status)
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
    while (status := client.status(job)).state in OPEN_STATES:
        time.sleep(POLL_S)
    return status


class _Lines:
    """Plain lines: one per phase, and about ten over the training."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._last = ("", -1)

    def show(self, status: JobStatus) -> None:
        phase = status.phase or status.state
        before, step = self._last
        far = status.step - step >= max(1, status.steps // 10) or status.step == status.steps
        if phase != before or (status.steps and status.step != step and far):
            self._last = (phase, status.step)
            self._out.note(_line(phase, status))


class _Bar:
    """One bar that is filled by the training; the other phases pulse."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)

    def show(self, status: JobStatus) -> None:
        phase = status.phase or status.state
        training = bool(status.steps) and status.state == "running" and 0 < status.step < status.steps
        self._progress.update(
            self._task,
            description=_line(phase, status),
            total=status.steps if training else None,
            completed=status.step if training else 0,
        )


def _line(phase: str, status: JobStatus) -> str:
    parts = [phase]
    if status.steps and status.step:
        parts.append(f"step {status.step}/{status.steps}")
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4g}")
    if status.eta_s is not None and status.state in OPEN_STATES:
        parts.append(f"about {status.eta_s:.0f} s left")
    return ", ".join(parts)


@contextmanager
def _display(out: Output) -> Generator[_Lines | _Bar]:
    if not out.err.is_terminal:
        yield _Lines(out)
        return
    columns = (SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=out.err, transient=True) as progress:
        yield _Bar(progress)
