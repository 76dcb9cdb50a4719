"""What the torture does while a call fails: every phase of a lesson, of an undo, of a start and of a stop.

`home` names the template that a scenario begins with; `prepare` comes before the faults, `act` is under them.
Where the runner's own thread has to do something at a moment (cancel, stop), it is done when the phase is
entered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from far_side import RAISES_LEVEL
from run_one import Run
from subject import lesson

from secondnature.lessons.job import Job
from secondnature.wire import PruneRequest

PHASES = (
    "measuring before",
    "answering samples",
    "training",
    "writing down the change",
    "measuring after",
    "judging",
)
DEATHS = ("hello", "attach", "ready", "begin", "write", "step 1", "end")
Act = Callable[[Run], None]


@dataclass(frozen=True)
class Scenario:
    """One story."""

    name: str
    act: Act
    home: str = "two"
    prepare: Act | None = None
    settings: dict[str, Any] = field(default_factory=dict[str, Any])


def _started(run: Run) -> None:
    assert run.start(), run.refused
    run.until_ready()


def _started_with(*behaviours: str) -> Act:
    def prepare(run: Run) -> None:
        run.forker.behaviours = list(behaviours)
        _started(run)

    return prepare


def _start(run: Run) -> None:
    if run.start():
        run.until(run.train(lesson(6, keep=True)))


def _taught(seed: int, *, judged: bool = False, **fields: Any) -> Act:
    return lambda run: void(run.until(run.train(lesson(seed, judged=judged, **fields))))


def void(_: object) -> None:
    """An act gives nothing."""


def _kept_by_hand(run: Run) -> None:
    job = run.train(lesson(3))
    run.until(job, "on trial")
    run.keep(job)


def _undone_by_hand(run: Run) -> None:
    job = run.train(lesson(3))
    if run.until(job, "on trial"):
        run.revert(run._lesson(job or ""))


def _cancelled_waiting(run: Run) -> None:
    run.subject.engine.held = True  # type: ignore[union-attr]
    first = run.train(lesson(RAISES_LEVEL, judged=True))
    run.until(first, "measuring before")
    run.cancel(run.train(lesson(4)))
    run.cancel(first)
    run.subject.engine.held = False  # type: ignore[union-attr]


def _cancelled_at(phase: str) -> Act:
    def act(run: Run) -> None:
        run.on_phase[phase] = lambda job: job.cancel.set()
        run.until(run.train(lesson(RAISES_LEVEL, judged=True)))

    return act


def _cancelled_on_trial(run: Run) -> None:
    job = run.train(lesson(3))
    run.until(job, "on trial")
    run.cancel(job)


def _cancelled_undoing(run: Run) -> None:
    run.on_phase["undoing"] = lambda job: job.cancel.set()
    _undone_by_hand(run)


def _stopped_at(phase: str, *, judged: bool = True) -> Act:
    def act(run: Run) -> None:
        reached = threading.Event()

        def stop(job: Job) -> None:
            run.runner._stop.set()
            job.cancel.set()
            reached.set()

        run.on_phase[phase] = stop
        run.train(lesson(RAISES_LEVEL if judged else 3, judged=judged))
        run.train(lesson(4))  # it waits
        reached.wait(4.0)
        run.stop()

    return act


def _stop_idle(run: Run) -> None:
    run.feedback(1)
    run.stop()


def _reverts(*names: str) -> Act:
    def act(run: Run) -> None:
        for name in names:
            found = [x.id for x in run.runner.log.all() if x.id.startswith(name)]
            if found:
                run.revert(found[0])

    return act


def _folded(run: Run) -> None:
    run.tries(run.runner.checkpoint)


def _pruned(run: Run) -> None:
    run.tries(lambda: run.runner.prune(PruneRequest(keep_states=1, keep_deltas=1)))


def _folded_by_length(run: Run) -> None:
    run.until(run.train(lesson(6, keep=True)))
    run.until(run.train(lesson(7, keep=True)))


def _told(run: Run) -> None:
    run.feedback(1)
    run.feedback(2, 3, 4)
    run.feedback(5)


def _asked_twice(run: Run) -> None:
    request = lesson(3, keep=True, idempotency_key="once")
    for _ in range(3):
        run.until(run.train(request))
    made = [x.id for x in run.runner.log.all() if x.idempotency_key == "once"]
    assert len(made) <= 1, made


def _restarted(run: Run) -> None:
    run.until(run.train(lesson(3, keep=True)))
    run.stop()
    run.subject = None
    if run.start():
        run.until(run.train(lesson(6, keep=True)))


SCENARIOS: dict[str, Scenario] = {
    s.name: s
    for s in (
        Scenario("start of a new home", _start, home="new"),
        Scenario("start with kept lessons", _start),
        Scenario("start with a working copy", _start, home="folded"),
        Scenario("start with an open lesson", _start, home="open"),
        Scenario("start after a crash", _start, home="crashed"),
        Scenario("restart after a lesson", _restarted, prepare=_started),
        Scenario("kept by verdict", _taught(RAISES_LEVEL, judged=True), prepare=_started),
        Scenario("undone by verdict", _taught(4, judged=True), prepare=_started),
        Scenario("kept at once", _taught(3, keep=True), prepare=_started),
        Scenario("kept by hand", _kept_by_hand, prepare=_started),
        Scenario("undone by hand", _undone_by_hand, prepare=_started),
        Scenario("nobody decides", _taught(3), prepare=_started, settings={"trial_lease_s": 0.05}),
        Scenario("cancelled while waiting", _cancelled_waiting, prepare=_started),
        Scenario("cancelled on trial", _cancelled_on_trial, prepare=_started),
        Scenario("cancelled while undoing", _cancelled_undoing, prepare=_started),
        *(Scenario(f"cancelled: {p}", _cancelled_at(p), prepare=_started) for p in PHASES),
        *(
            Scenario(f"trainer dies at {d}", _taught(3, keep=True), prepare=_started_with(f"dies at {d}"))
            for d in DEATHS
        ),
        Scenario("trainer fails", _taught(3, keep=True), prepare=_started_with("fails at step 1")),
        Scenario("revert", _reverts("0002-"), prepare=_started),
        Scenario("revert of a revert", _reverts("0003-"), home="reverted", prepare=_started),
        Scenario("two reverts", _reverts("0002-", "0001-"), prepare=_started),
        Scenario(
            "revert behind the working copy", _reverts("0003-", "0002-"), home="folded", prepare=_started
        ),
        Scenario("fold", _folded, prepare=_started),
        Scenario("fold again", _folded, home="folded", prepare=_started),
        Scenario("fold by length", _folded_by_length, prepare=_started, settings={"max_chain": 2}),
        Scenario("prune", _pruned, home="folded", prepare=_started),
        Scenario("feedback and import", _told, prepare=_started),
        Scenario("asked twice", _asked_twice, prepare=_started),
        Scenario("stop", _stop_idle, prepare=_started),
        *(Scenario(f"stop: {p}", _stopped_at(p), prepare=_started) for p in PHASES),
        Scenario("stop: on trial", _stopped_at("on trial", judged=False), prepare=_started),
        Scenario("stop: undoing", _stopped_at("undoing"), home="learned", prepare=_started),
    )
}


def make_templates(make: Callable[[Path], Run], directory: Path) -> None:
    """The homes that scenarios begin with, made by the product itself without faults."""
    from run_one import fresh

    def led(name: str, source: str | None, *acts: Act) -> None:
        if source is None:
            (directory / name).mkdir()
        else:
            fresh(directory / source, directory / name)
        run = make(directory / name)
        _started(run)
        for act in acts:
            act(run)
        assert run.last_error is None, run.last_error
        run.stop()

    (directory / "new").mkdir(parents=True)
    led("two", "new", _told, _taught(8, keep=True), _taught(9, keep=True))
    led("folded", "two", _folded, _taught(10, keep=True))
    led("reverted", "two", _reverts("0002-"))
    led("learned", "two", _taught(RAISES_LEVEL, keep=True))
    run = make(fresh(directory / "two", directory / "being-open"))
    _started(run)
    first = run.train(lesson(3))
    assert run.until(first, "on trial"), run.last_error
    run.train(lesson(4))
    fresh(run.home, directory / "open")  # as a kill would leave it: one on trial, one waiting
    run.stop()
    fresh(directory / "open", directory / "crashed")
    _leave_what_crashes_leave(directory / "crashed")


def _leave_what_crashes_leave(home: Path) -> None:
    dead = 2**22 + 5  # no process has such a number
    (home / f".ledger.jsonl.{dead}.tmp").write_text("half")
    (home / "lessons" / f".0005-use.{dead}.tmp").mkdir()
    (home / "lessons" / f".0005-use.{dead}.tmp" / "lesson.json").write_text("{")
    (home / "model" / f".w.{dead}.tmp").mkdir(parents=True, exist_ok=True)
    with (home / "ledger.jsonl").open("a") as file:
        file.write('{"torn')
