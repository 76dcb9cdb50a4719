"""One run of the torture: a scenario with one fault, and what must hold afterwards.

What must hold: the runner's thread lives, or the start was refused; while no lesson is open, the bytes in the
arena are those that the log stands for, or trouble is told; when the fault is gone the *same* process becomes
well by itself and keeps a lesson; and a restart without faults has every acknowledged correction, lesson and
revert, tells every ending as it was told before, holds the log's weights to the byte, and leaves no temporary
file.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from injector import Fault, Injector
from subject import Subject, feedback, lesson

from secondnature import storage
from secondnature.errors import SecondnatureError
from secondnature.lessons.job import Job
from secondnature.lessons.log import Log
from secondnature.lessons.runner import Runner
from secondnature.records import Lesson
from secondnature.weights.content import content_id
from secondnature.wire import TrainRequest

ENDED = ("kept", "undone", "failed", "cancelled")
EXPECTED = (SecondnatureError, OSError, MemoryError, RuntimeError, zmq.ZMQError)
"""What a caller may be given while something fails. Anything else is a fault of ours."""
RECOVERY_S = 8.0
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


class Broken(AssertionError):
    """An invariant does not hold; `kind` counts it in the summary."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Run:
    """A home, a server over it, and what was acknowledged."""

    def __init__(self, home: Path, model: Path, injector: Injector, forker: Any, **settings: Any) -> None:
        self.home, self.model, self.injector, self.forker = home, model, injector, forker
        self.settings = settings
        self.subject: Subject | None = None
        self.corrections: list[str] = []
        self.kept: dict[str, str | None] = {}
        """Lessons and reverts that were acknowledged as kept, with their versions."""
        self.told: dict[str, str] = {}
        self.refused: BaseException | None = None
        self.on_phase: dict[str, Callable[[Job], None]] = {}
        self.began_dirty = self.ended_early = ""
        self.last_error: BaseException | None = None

    @property
    def runner(self) -> Runner:
        assert self.subject is not None, "started before"
        return self.subject.runner

    # ------------------------------------------------------------------------------- what scenarios are made of

    def start(self) -> bool:
        """Whether it starts; an error that it is refused with must be ours, or what was injected."""
        try:
            self.subject = Subject(self.home, self.model, **self.settings)
        except EXPECTED as e:
            if isinstance(e, OSError) and not isinstance(e, SecondnatureError):
                raise Broken("refusals", f"the start raised {e!r}, which is no error of ours") from e
            self.refused = e
            return False
        self._take_stock()
        return True

    def _take_stock(self) -> None:
        """What the home holds already was acknowledged once."""
        with self.injector.paused():
            assert self.subject is not None
            self.corrections = [str(c.id) for c in self.subject.ledger.all()]
            for entry in self.subject.log.all():
                if entry.state == "kept":
                    self.kept[entry.id] = entry.version

    def tries(self, call: Callable[[], Any]) -> Any:
        """What the call gives; None where it was refused."""
        try:
            return call()
        except EXPECTED as e:
            self.last_error = e
            return None

    def feedback(self, *numbers: int) -> None:
        """One, or an import of several."""
        assert self.subject is not None
        ledger = self.subject.ledger
        self.corrections += [
            str(a.correction.id) for a in self.tries(lambda: ledger.add([feedback(n) for n in numbers])) or []
        ]

    def train(self, request: TrainRequest) -> str | None:
        """The job that was accepted."""
        reply = self.tries(lambda: self.runner.submit(request))
        return reply.job if reply is not None else None

    def until(self, job: str | None, *phases: str, timeout_s: float = RECOVERY_S) -> bool:
        """Wait until a job is in a phase, or has ended; whether it is in the phase."""
        deadline = time.monotonic() + timeout_s
        while job is not None and time.monotonic() < deadline:
            with self.injector.paused():
                live = self.runner._jobs.get(job)
            if live is None or live.phase in phases:
                return live is not None
            if not self.runner._thread.is_alive():
                return False
            time.sleep(0.002)
        return False

    def until_ready(self) -> None:
        """So that a scenario begins at the same place each time: its trainer is there, or has died."""
        deadline = time.monotonic() + RECOVERY_S
        trainer = self.runner.trainer
        while trainer.state != "ready" and not trainer.trouble and time.monotonic() < deadline:
            time.sleep(0.002)

    def keep(self, job: str | None) -> None:
        if job is not None:
            self._acknowledged(self.tries(lambda: self.runner.keep(self._lesson(job))))

    def revert(self, lesson_id: str) -> None:
        self._acknowledged(self.tries(lambda: self.runner.revert(lesson_id)))

    def cancel(self, job: str | None) -> None:
        if job is not None:
            self.tries(lambda: self.runner.cancel(job))

    def stop(self) -> None:
        if self.subject is not None:
            self.tries(self.subject.stop)

    def _lesson(self, job: str) -> str:
        with self.injector.paused():
            return self.runner.status(job).lesson or ""

    def _acknowledged(self, entry: Lesson | None) -> None:
        if entry is not None and entry.state == "kept":
            self.kept[entry.id] = entry.version

    # ----------------------------------------------------------------------------------------- what must hold

    def check_now(self) -> None:
        """Between two steps of the runner: the weights are the log's, or open, or trouble is told."""

        def look() -> None:
            with self.injector.paused():
                runner = self.runner
                open_ = [x.id for x in runner.log.all() if x.state in ("running", "on_trial")]
                if open_ or runner.trouble or runner.weights.dirty:
                    return
                self._compare("weights", "trouble is not told")

        if not self.runner._thread.is_alive():
            raise Broken("dead runners", self.runner.trouble or "nothing is told")
        with contextlib.suppress(SecondnatureError):
            self.runner._do(look)
        self.check_order()

    def check_order(self) -> None:
        """What the hooks saw, on the runner's thread."""
        if self.began_dirty:
            raise Broken("weights", f"a lesson began although {self.began_dirty}")
        if self.ended_early:
            raise Broken("weights", self.ended_early)

    def _compare(self, kind: str, what: str) -> None:
        runner = self.runner
        wanted = runner.log.kept_version()
        found = content_id(runner.weights.arena.tensors, like=wanted)
        if found != wanted:
            raise Broken(kind, f"the arena holds {found}; the log stands for {wanted}; {what}")
        stamp = runner._clock.read()
        if stamp.version != wanted:
            raise Broken(kind, f"answers are said to be by {stamp.version}; the weights are {wanted}")

    def recovers(self) -> None:
        """The fault is gone: the same process ends what is open, becomes well, and keeps a lesson."""
        runner, deadline = self.runner, time.monotonic() + RECOVERY_S
        while runner.trouble or runner._current is not None or runner._waiting:
            if not runner._thread.is_alive():
                raise Broken("dead runners", runner.trouble or "nothing is told")
            if time.monotonic() > deadline:
                phase = runner._current.phase if runner._current else "none"
                raise Broken("recoveries", f"after {RECOVERY_S} s: {runner.trouble!r}, current: {phase}")
            current = runner._current
            if current is not None and current.phase == "on trial":
                self.tries(functools.partial(runner.revert, current.lesson.id))
            time.sleep(0.005)
        runner._do(lambda: self._compare("weights", "after the fault had gone"))
        for entry in runner.log.all():
            if entry.state in ("queued", "running", "on_trial") and entry.job not in runner._jobs:
                raise Broken("endings", f"{entry.id} is {entry.state}, and nobody leads it")
            if entry.kind == "train":
                self.told[entry.id] = runner.status(entry.job).state
                if self.told[entry.id] == "kept":
                    self.kept[entry.id] = entry.version
        job = self.train(lesson(5, keep=True))
        if job is None:
            raise Broken("recoveries", f"no lesson is accepted: {self.last_error!r}")
        self.until(job)
        status = runner.status(job)
        if status.state != "kept":
            raise Broken("recoveries", f"the next lesson is {status.state}: {status.error}")
        self.kept[str(status.lesson)] = None
        runner._do(lambda: self._compare("weights", "after the next lesson"))
        if runner.trouble:
            raise Broken("recoveries", f"still trouble after the next lesson: {runner.trouble}")

    def check_restart(self) -> None:
        """A start without faults serves, and has all that was acknowledged."""
        storage._BORN = (
            time.time() + 1
        )  # to the product this is another process: what lies there is not its own
        try:
            subject = Subject(self.home, self.model, **self.settings)
        except Exception as e:
            raise Broken("homes", f"the home does not open: {type(e).__name__}: {e}") from e
        self.subject = subject
        try:
            lost = set(self.corrections) - {c.id for c in subject.ledger.all()}
            entries = {x.id: x for x in subject.log.all()}
            gone = [x for x in self.kept if x not in entries or entries[x].state != "kept"]
            if lost or gone:
                raise Broken("losses", f"acknowledged, and lost: corrections {sorted(lost)}, lessons {gone}")
            for name, state in self.told.items():
                if name not in entries or entries[name].state != state:
                    found = entries[name].state if name in entries else "not there"
                    raise Broken("endings", f"{name} was told to be {state}, and is {found}")
            subject.runner._do(lambda: self._compare("weights", "after a restart"))
            left = [p for p in self.home.rglob("*") if _TEMPORARY.fullmatch(p.name)]
            if left:
                raise Broken("leftovers", f"temporary files stay after a restart: {left}")
        finally:
            subject.stop()


def watch_phases(run: Run) -> contextlib.ExitStack:
    """`run.on_phase` is called, on the runner's thread, when a job enters a phase."""
    from unittest import mock

    stack = contextlib.ExitStack()
    enter, lead, save = Job.enter, Runner._lead, Log.save

    def entered(job: Job, name: str, *args: Any, **kwargs: Any) -> None:
        enter(job, name, *args, **kwargs)
        act = run.on_phase.pop(name, None)
        if act is not None:
            act(job)

    def led(runner: Runner, job: Job) -> None:
        run.began_dirty = run.began_dirty or runner.weights.dirty
        lead(runner, job)

    def saved(log: Log, entry: Lesson) -> Lesson:
        """An end is written when the weights are whole, and not before."""
        if entry.state in ("undone", "failed", "cancelled") and log.get(entry.id).state in (
            "running",
            "on_trial",
        ):
            with run.injector.paused():
                wanted = log.kept_version()
                found = content_id(run.runner.weights.arena.tensors, like=wanted) if run.subject else wanted
            if found != wanted:
                run.ended_early = f"{entry.id} is written down as {entry.state}; the arena holds {found}"
        return save(log, entry)

    stack.enter_context(mock.patch.object(Log, "save", saved))
    stack.enter_context(mock.patch.object(Job, "enter", entered))
    stack.enter_context(mock.patch.object(Runner, "_lead", led))
    return stack


def perform(
    run: Run, act: Callable[[Run], None], prepare: Callable[[Run], None] | None, fault: Fault | None
) -> int:
    """The run; how often the fault struck. Raises Broken."""
    with watch_phases(run):
        try:
            if prepare is not None:
                prepare(run)
            run.injector.arm(fault)
            act(run)
            if run.subject is not None and run.subject.thread_lives:
                run.check_now()
            fired = run.injector.fired
            run.injector.heal()
            if run.subject is None:
                if run.refused is None:
                    raise Broken("refusals", "nothing was started and nothing was refused")
                if not run.start():
                    raise Broken("homes", f"the second start was refused too: {run.refused!r}")
            if not run.runner._stop.is_set():
                run.check_now()
                run.recovers()
            run.stop()
            if run.runner._thread.is_alive():
                raise Broken("hangs", "the runner does not end")
            run.check_order()
            run.check_restart()
        finally:
            run.injector.heal()
            run.stop()
    return fired


def fresh(template: Path, home: Path) -> Path:
    """A copy of a home."""
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(template, home, symlinks=True)
    return home
