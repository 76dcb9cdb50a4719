"""The runner: one thread that does everything that changes the log or the weights, one lesson at a time (server).

Nothing else writes while a lesson runs or is on trial. Requests hand it commands and wait; whatever takes long
checks in, and commands are served meanwhile. Whatever a turn raises, of whatever kind, the thread goes on: the
weights are restored until they are whole, an entry stays open until then, and before that nothing else begins.
`health` tells of it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from secondnature.config import Settings
from secondnature.engines.stamps import Clock
from secondnature.errors import (
    BadInput,
    Busy,
    Cancelled,
    Conflict,
    NotFound,
    SecondnatureError,
    StorageError,
    TrainingError,
    Unreachable,
    WeightsError,
    WrongState,
)
from secondnature.evidence.reach import reaches
from secondnature.lessons import lesson_file
from secondnature.lessons.change import Judged
from secondnature.lessons.exports import Exports
from secondnature.lessons.guards import Guarded, guarded
from secondnature.lessons.identity import check_same, identity_of
from secondnature.lessons.imported import ImportedChange, check_sizes
from secondnature.lessons.job import Ending, Job
from secondnature.lessons.ledger import Ledger
from secondnature.lessons.lesson_file import LessonFile
from secondnature.lessons.life import Life
from secondnature.lessons.log import PROBES_FILE, Log
from secondnature.lessons.own_answers import OwnAnswers
from secondnature.lessons.plan import Plan
from secondnature.lessons.planner import Planner
from secondnature.lessons.prober import Prober
from secondnature.lessons.pruning import Pruning
from secondnature.lessons.reverted import Reverted
from secondnature.lessons.trained import Trained
from secondnature.lessons.trainer import Trainer
from secondnature.lessons.weights import RESTORING, ServedWeights
from secondnature.lessons.working_copy import WorkingCopy
from secondnature.records import (
    OPEN_STATES,
    ErrorInfo,
    Export,
    Lesson,
    Probe,
    describe,
    digest,
    to_jsonl,
    utc_now,
)
from secondnature.weights.arena import Arena
from secondnature.wire import (
    CheckpointReply,
    ExportList,
    ExportRequest,
    ImportLessonRequest,
    JobStatus,
    PassedOver,
    PruneReply,
    PruneRequest,
    TrainReply,
    TrainRequest,
)

__all__ = ["Runner"]

LOG = logging.getLogger(__name__)
T = TypeVar("T")
COMMAND_TIMEOUT_S = 50.0
"""Less than a client waits: what could not be begun by then is not done, and the client is told so."""
CANCEL_TIMEOUT_S = 50.0
"""Less than a client waits; what is not undone by then says so in its status."""
STOP_TIMEOUT_S = 60.0
"""So long may a stop take to undo what is open; the next start would do it too."""
MAX_PAUSE_S = 30.0
"""Between two tries of what failed; doubled from one to the next."""


class Runner:
    """The one that changes the weights."""

    def __init__(
        self,
        *,
        settings: Settings,
        log: Log,
        ledger: Ledger,
        arena: Arena,
        clock: Clock,
        trainer: Trainer,
        prober: Prober,
        planner: Planner,
        own_answers: OwnAnswers,
    ) -> None:
        self._settings = settings
        self.log = log
        self.ledger = ledger
        self.weights = ServedWeights(arena, clock, log)
        self._working_copy = WorkingCopy(settings, log, self.weights)
        self._pruning = Pruning(log)
        self._exports = Exports(log, self.weights, Path(settings.model).name)
        self._clock = clock
        self.trainer = trainer
        self._prober = prober
        self._planner = planner
        self._own_answers = own_answers
        self._waiting: deque[Job] = deque()
        self._jobs: dict[str, Job] = {}
        """Those that wait, and the one that lives."""
        self._current: Job | None = None
        self._life: Life | None = None
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._retry_at = 0.0
        self._failures = 0
        self._fault = ""
        """What the last turn raised; empty: it went well."""
        self._thread = threading.Thread(target=self._live, name="runner", daemon=True)

    # ---------------------------------------------------------------------------------- from any thread

    @property
    def trouble(self) -> str:
        """Why `/health` says degraded; empty: all is well."""
        if self._thread.ident is not None and not self._thread.is_alive() and not self._stop.is_set():
            return "the thread that leads lessons has ended: restart the server"
        found = {
            "the weights": "" if (dirty := self.weights.dirty) == RESTORING else dirty,
            "the disk": self.log.behind,
            "the last turn": self._fault,
            "the trainer": self.trainer.trouble,
            "the working copy": self._working_copy.trouble,
        }
        told = [f"{what}: {why}" for what, why in found.items() if why]
        return "; ".join(told) + "; it is tried again" if told else ""

    def start(self) -> None:
        """Begin; the trainer is started at once, so that it is ready when the first lesson comes."""
        if self.log.chain():  # the home may have waited for its working copy since long
            self._working_copy.wait()
        self._thread.start()

    def stop(self) -> None:
        """End: a lesson that runs or is on trial is undone; within a limit, whatever hangs."""
        self._stop.set()
        job = self._current
        if job is not None:
            job.cancel.set()
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            LOG.error("the runner does not end: what is open is undone at the next start")
        self.trainer.stop()

    def submit(self, request: TrainRequest) -> TrainReply:
        """Check and plan a job, write its entry, queue it; the same idempotency key twice gives one job.

        Raises:
            Busy: too many jobs wait, or the runner had no time for it; nothing was accepted.
            Conflict: another request had this idempotency key.
            BadInput, BadExample, ContextOverflow: see `Planner.plan`.
            StorageError: the disk refused; nothing was accepted.
        """
        asked = self._asked(request)
        known = None if request.dry_run else self._known(request, asked)
        if known is not None:  # before it is planned: since then the ledger may have changed
            return known
        self._prober.check(request.probes)
        ledger = self.ledger.confirmed()
        found = guarded(request, ledger, self._prober)
        plan = self._planner.plan(found.request, ledger, self.log.earlier()[0], self.log.retained()[0])
        if request.dry_run:
            return TrainReply(job="dry-run", lesson=None, state="planned", plan=self._shown(found, plan))
        return self._do(lambda: self._accept(found.request, plan, asked))

    def _shown(self, found: Guarded, plan: Plan) -> dict[str, Any]:
        """What a dry run answers: the plan, the packs that guard it, what all its probes could show, and what of
        the answers' form is not the model's.
        """
        request = found.request
        tries = self.log.num_tries(plan.digests, [c.digest() for c in plan.corrections])
        sets = plan.retention.sets
        reached = reaches(request.probes, request.lesson.behaviour or "", request.gate, tries, sets)
        could_show = None if reached is None else reached.model_dump(mode="json")
        lint = [vars(f) for f in self._planner.own_form(plan, self._prober)]
        return {**self._planner.show(plan), "lint": lint, "guards": found.told, "could_show": could_show}

    def import_lesson(self, body: ImportLessonRequest) -> TrainReply:
        """Check a lesson file, write its entry, queue it: it is applied and judged like any lesson.

        Raises:
            BadInput, BadRecord, TooLarge, TooNew: the file is none, damaged, or of a newer version; or a probe is
                no evidence.
            Conflict: it is of another model, or was taught already.
            Busy, StorageError: as `submit`.
        """
        source = lesson_file.open_(Path(body.path))
        mine = identity_of(self.log, self.weights.arena.tensors, like=source.manifest.model.base_version)
        check_same(source.manifest.model, mine, source.manifest.model_name)
        check_sizes(source)
        source.check()
        if not body.again:
            self._refuse_known(source)
        source.evidence()  # it can be read, and so can these, asked or not
        corrections, theirs = source.corrections(), source.probes()
        probes = [] if body.keep else [*theirs, *body.probes]
        request = self._judged_by(
            body, source.manifest.lesson.behaviour, list({p.digest(): p for p in probes}.values())
        )
        self._prober.check(request.probes)
        request = guarded(request, corrections, self._prober).request
        plan = self._planner.untrained(
            corrections, request.probes, source.manifest.lesson.cause.examples, body.seed
        )
        return self._do(lambda: self._accept(request, plan, None, source))

    def _judged_by(
        self, body: ImportLessonRequest, behaviour: str | None, probes: list[Probe]
    ) -> TrainRequest:
        """How a lesson is judged that nothing is trained in; its corrections do not come from here."""
        given = {
            "ledger": True,
            "probes": probes,
            "guards": body.guards,
            "gate": body.gate,
            "keep": body.keep,
            "prompting": False,
            "seed": body.seed,
            "lesson": {"behaviour": behaviour, "note": body.note},
        }
        try:
            return TrainRequest.model_validate(given)
        except ValidationError as e:
            raise BadInput(describe(e), "see POST /v1/lessons/import") from None

    def _refuse_known(self, source: LessonFile) -> None:
        """Raises Conflict: a lesson that is in force taught the same."""
        theirs = source.manifest.lesson
        delta_sha256 = source.manifest.parts["delta.safetensors"].sha256
        in_force = [self.log.get(lesson_id) for lesson_id in self.log.in_weights()]
        for lesson in in_force:
            same = lesson.delta_sha256 == delta_sha256 or (
                lesson.imported is not None and lesson.imported.delta_sha256 == delta_sha256
            )
            for mine, other in (
                (lesson.cause.corrections, theirs.cause.corrections),
                (lesson.cause.examples, theirs.cause.examples),
            ):
                same = same or (bool(mine) and set(mine) == set(other))
            if same:
                raise Conflict(
                    f"lesson {lesson.id} taught the same already; nothing was written",
                    "give --again (`again` in the body) to add it once more",
                )

    def status(self, job: str, after: int | None = None) -> JobStatus:
        """One job; `after`: with the losses of the steps after this one. Raises NotFound."""
        live = self._jobs.get(job)
        if live is not None:
            return live.status(self._clock.read().version, after)
        for lesson in self.log.all():
            if lesson.job == job and lesson.kind != "revert":
                return self._ended(lesson, whole=True)
        raise NotFound(f"no job {job!r}", "`GET /v1/train/status` lists them")

    def statuses(self) -> list[JobStatus]:
        """Every job of this home, oldest first; of those that have ended, without evidence."""
        version = self._clock.read().version
        found: list[JobStatus] = []
        for lesson in self.log.all():
            if lesson.kind != "revert":
                live = self._jobs.get(lesson.job)
                found.append(live.status(version, None) if live else self._ended(lesson, whole=False))
        return found

    def _ended(self, lesson: Lesson, *, whole: bool) -> JobStatus:
        return JobStatus(
            job=lesson.job,
            lesson=lesson.id,
            state=lesson.state,
            phase="done",
            step=lesson.steps,
            steps=lesson.steps,
            loss=lesson.loss,
            kl=lesson.kl,
            stopped_by=lesson.stopped_by,
            weights_version=self._clock.read().version,
            evidence=self.log.evidence(lesson) if whole else None,
            error=lesson.error,
            num_passed_over=lesson.cause.num_passed_over,
            passed_over=[PassedOver(id=k, reason=v) for k, v in lesson.cause.passed_over.items()],
        )

    def cancel(self, job: str) -> JobStatus:
        """End a job; returns when it is undone. Raises NotFound, WrongState."""
        live = self._jobs.get(job)
        if live is None:
            state = self.status(job).state
            raise WrongState(f"job {job} is {state} already", "use revert to take back a kept lesson")
        deadline = time.monotonic() + CANCEL_TIMEOUT_S
        live.cancel.set()
        with contextlib.suppress(Busy):  # it will come to it: the cancel is said
            self._do(self._drop_cancelled)
        while job in self._jobs and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.status(job)

    def keep(self, lesson_id: str) -> Lesson:
        """Keep the lesson on trial. Raises NotFound, WrongState."""
        return self._do(lambda: self._keep_command(lesson_id))

    def revert(self, lesson_id: str) -> Lesson:
        """Undo the lesson on trial, or take back the newest kept one. Raises NotFound, WrongState, Conflict."""
        return self._do(lambda: self._revert_command(lesson_id))

    def checkpoint(self) -> CheckpointReply:
        """Bring the working copy up to date with the kept lessons now. Raises Busy, StorageError."""

        def command() -> CheckpointReply:
            self._working_copy.fold()
            return self.checkpoint_state()

        return self._do(command)

    def checkpoint_state(self) -> CheckpointReply:
        """What the working copy holds."""
        return self._working_copy.state()

    def export(self, request: ExportRequest) -> Export:
        """See `Exports.write`; commands are served meanwhile. Raises Unreachable: the server ended in between."""

        def check_in() -> None:
            if self._stop.is_set():
                raise Unreachable(
                    "the server ended while it was exporting; nothing is left of it", "repeat it"
                )
            self._serve_commands()

        return self._do(lambda: self._exports.write(request, check_in))

    def exported(self, lesson_id: str | None = None) -> ExportList:
        """What left the home; of one lesson, what holds it. Raises NotFound, DamagedFile."""
        found = self._exports.all() if lesson_id is None else self._exports.holding(self.log.get(lesson_id))
        return ExportList(exports=found, progress=self._exports.progress)

    def prune(self, request: PruneRequest) -> PruneReply:
        """See `Pruning.prune`; and what can be taken back afterwards. Raises Busy, StorageError."""

        def command() -> PruneReply:
            self.weights.check_unread()
            states = self._settings.keep_states if request.keep_states is None else request.keep_states
            pruned = self._pruning.prune(states, request.keep_deltas, dry_run=request.dry_run)
            lessons, with_state = self._pruning.undoable(set(pruned.removed))
            return PruneReply(
                removed=pruned.removed,
                nbytes=pruned.nbytes,
                dry_run=request.dry_run,
                undoable=lessons,
                undoable_with_state=with_state,
            )

        return self._do(command)

    def _do(self, command: Callable[[], T]) -> T:
        """Run a command on the runner's thread, between its own steps: done, or never begun.

        Raises:
            Busy: it could not be begun in time, and will not be.
            Unreachable: the server is shutting down.
        """
        if self._stop.is_set() or not self._thread.is_alive():
            raise Unreachable("the server is shutting down", "start it again")
        future: Future[T] = Future()
        self._commands.put((command, future))
        try:
            return future.result(timeout=COMMAND_TIMEOUT_S)
        except TimeoutError:
            if future.cancel():
                raise Busy(
                    "the server was too busy to begin with it; nothing was done", "try again"
                ) from None
        return future.result()  # it was begun: it will end

    # ---------------------------------------------------------------------------------- the runner's thread

    def _serve_commands(self, wait_s: float = 0.0) -> None:
        """Run what was handed over; waits up to `wait_s` for the first command."""
        try:
            command, future = self._commands.get(timeout=wait_s) if wait_s else self._commands.get_nowait()
        except queue.Empty:
            return
        while True:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(command())
                except BaseException as e:  # noqa: BLE001  (it belongs to the caller, on whose thread it is raised)
                    future.set_exception(e)
            try:
                command, future = self._commands.get_nowait()
            except queue.Empty:
                return

    def _live(self) -> None:
        """The supervisor: whatever a turn raises is told, and the next turn begins."""
        while not self._stop.is_set():
            try:
                self._turn()
            except BaseException as e:  # noqa: BLE001  (the thread outlives whatever a turn raises)
                self._failed(e)
        self._wind_down()

    def _failed(self, error: BaseException) -> None:
        """Nothing that this does may raise: it runs where memory or the disk may be full."""
        self._failures += 1
        self._retry_at = time.monotonic() + min(MAX_PAUSE_S, 0.25 * 2 ** min(self._failures, 10))
        self._fault = f"{type(error).__name__}: {error}"
        LOG.error("a turn failed and is tried again: %s", self._fault, exc_info=error)

    def _turn(self) -> None:
        """A little of everything, the weights first. Raises whatever was wrong."""
        self._serve_commands(wait_s=0.05)
        due = time.monotonic() >= self._retry_at
        if due and self._current is not None:
            self._finish(self._current)  # it could not be ended before
        elif due and not self.weights.are_kept:
            self._restore()
        self.trainer.tend()  # it comes up also where the disk refuses
        if not due:
            return
        if self.log.behind:
            self.log.sync()
        if self._working_copy.is_due and not self._working_copy.fold_quietly():
            self._retry_at = time.monotonic() + 1.0
        self._failures, self._fault = 0, ""
        if self._waiting and not self._stop.is_set():
            self._lead(self._waiting.popleft())

    def _wind_down(self) -> None:
        """Undo and cancel what is open; each on its own, for the next start does what fails here."""
        for job in [self._current, *self._waiting]:
            try:
                if job is not None and job is self._current:
                    self._finish(job)
                elif job is not None:
                    self._end(job, Ending("cancelled", "the server ended while it was waiting"))
            except BaseException:
                LOG.exception("at the end; the next start does it")
        while not self._commands.empty():
            _, future = self._commands.get_nowait()
            try:
                future.set_exception(Unreachable("the server is shutting down", "start it again"))
            except InvalidStateError:  # whoever asked has given up
                continue

    def _drop_cancelled(self) -> None:
        """What waits and was cancelled need not wait for the lesson that holds the weights."""
        for job in [j for j in self._waiting if j.cancel.is_set()]:
            self._end(job, Ending("cancelled", "cancelled while it was waiting"))
            self._waiting.remove(job)

    def _lead(self, job: Job) -> None:
        """One lesson, from running to its end. What cannot be ended now stays `_current`. Raises: as `_finish`."""
        self._current = job
        if self._stop.is_set():  # `stop` sets it before it looks at `_current`
            job.cancel.set()
        if job.cancel.is_set():
            job.ending = Ending("cancelled", "cancelled while it was waiting")
        else:
            job.ending = self._ending_of(job)
        self._finish(job)
        if job.lesson.state == "kept":
            self._working_copy.wait()
            self._prune_quietly()

    def _ending_of(self, job: Job) -> Ending | None:
        """Its life; how it is to end, or None where it was kept."""

        def check_in() -> None:
            self._serve_commands()
            if job.cancel.is_set():
                raise Cancelled("cancelled")

        parts: dict[str, Any] = {"log": self.log, "prober": self._prober}
        if job.source is not None:
            change: Judged = ImportedChange(job, weights=self.weights, **parts)
        else:
            change = Trained(
                job, planner=self._planner, own_answers=self._own_answers, trainer=self.trainer, **parts
            )
        self._life = Life(
            job,
            change,
            settings=self._settings,
            weights=self.weights,
            check_in=check_in,
            wait=self._serve_commands,
            **parts,
        )
        try:
            return self._life.run()
        except Cancelled as e:
            ending = Ending("cancelled", e.message)
        except SecondnatureError as e:
            ending = Ending("failed", f"{e.type}: {e.message}", ErrorInfo(**e.to_wire()))
        except BaseException as e:
            LOG.exception("lesson %s", job.lesson.id)
            error = TrainingError(f"internal error: {e!r}", "please report it, with the server's log")
            ending = Ending("failed", error.message, ErrorInfo(**error.to_wire()))
        finally:
            self._life = None
        if job.lesson.state == "kept":  # it was committed: whatever came after that does not undo it
            LOG.error("lesson %s is kept, but: %s", job.lesson.id, ending.reason)
            self.weights.dirty = ending.reason  # they are most likely right: `restore` finds out
            return None
        if self._stop.is_set():
            words = "on trial" if job.lesson.state == "on_trial" else "running"
            return Ending("undone", f"the server ended while it was {words}")
        return ending

    def _finish(self, job: Job) -> None:
        """Make the weights whole again, to the byte, and only then say so in the log. What has ended, stays ended.

        Raises whatever keeps it from that; the entry is open until then.
        """
        if job.lesson.state in OPEN_STATES:
            if job.ending is None:  # memory ran out where it was to be decided
                job.ending = Ending("failed", "it ended, and nobody could say how")
            self._restore(job)
            self._end(job, job.ending)
        self._forget(job)

    def _restore(self, job: Job | None = None) -> None:
        """The weights that the log stands for, written into memory; nobody else may be writing."""
        if self.trainer.may_write:
            self.weights.dirty = "a trainer that was killed has not ended yet"
            raise WeightsError(self.weights.dirty, "it is tried again")
        if job is not None:
            job.enter("undoing", "tensors")

        def on_tensor(done: int, total: int) -> None:
            if job is not None:
                job.count(done, total)
            self._serve_commands()

        self.weights.restore(on_tensor)

    def _end(self, job: Job, ending: Ending) -> None:
        """Write down how a lesson ended, whose weights are gone. Never raises for the disk."""
        ended = job.lesson.model_copy(
            update={
                "state": ending.state,
                "reason": ending.reason,
                "error": ending.error,
                "ended_at": utc_now(),
                "trial_until": None,
            }
        )
        try:
            job.lesson = self.log.save(ended)
            self.log.drop_files(ended)
        except StorageError as e:  # it is written later; a start before that undoes what is open
            LOG.warning("lesson %s is %s, but could not be written down: %s", ended.id, ending.state, e)
            self.log.remember(ended)
            job.lesson = ended
        self._forget(job)

    def _forget(self, job: Job) -> None:
        """It has ended: the log knows all that is asked of it from now on."""
        job.enter("done")
        self._jobs.pop(job.lesson.job, None)
        if self._current is job:
            self._current = None

    # --------------------------------------------------------------------------------------- commands

    def _asked(self, request: TrainRequest) -> str | None:
        """What is compared where an idempotency key comes again; None: it has no key."""
        if request.idempotency_key is None:
            return None
        return digest(request.model_dump(mode="json", exclude={"idempotency_key", "dry_run"}))

    def _known(self, request: TrainRequest, asked: str | None) -> TrainReply | None:
        """The job that this request made before. Raises Conflict: another request had its idempotency key."""
        key = request.idempotency_key
        known = self.log.by_idempotency_key(key) if key else None
        if known is None:
            return None
        if known.request_digest != asked:
            raise Conflict(
                f"another request had the idempotency key {key!r}; it made lesson {known.id}",
                "give each lesson a key of its own",
            )
        return TrainReply(job=known.job, lesson=known.id, state=known.state)

    def _accept(
        self, request: TrainRequest, plan: Plan, asked: str | None, source: LessonFile | None = None
    ) -> TrainReply:
        known = self._known(request, asked)  # again: two may come at once
        if known is not None:
            return known
        if len(self._waiting) >= self._settings.max_jobs:
            raise Busy(
                f"{len(self._waiting)} jobs are waiting; at most {self._settings.max_jobs} may", "try later"
            )
        behaviour = request.lesson.behaviour or next(
            (c.behaviour for c in plan.corrections if c.behaviour), None
        )
        lesson = self.log.create(
            "train" if source is None else "import",
            behaviour or "lesson",
            files={
                name: to_jsonl(found)
                for name, found in (("corrections.jsonl", plan.corrections), (PROBES_FILE, request.probes))
                if found
            },
            behaviour=behaviour,
            note=request.lesson.note,
            idempotency_key=request.idempotency_key,
            request_digest=asked,
            cause=plan.cause(0),
            settings=plan.settings(),
            imported=None if source is None else source.origin(),
        )
        job = Job(lesson, plan, request, source=source)
        self._jobs[lesson.job] = job
        self._waiting.append(job)
        return TrainReply(job=lesson.job, lesson=lesson.id, state="queued", plan=plan.summary())

    def _keep_command(self, lesson_id: str) -> Lesson:
        lesson = self.log.get(lesson_id)
        job = self._on_trial(lesson)
        if job is None or self._life is None:
            raise WrongState(
                f"lesson {lesson.id} is {lesson.state}, not on trial", "only a lesson on trial can be kept"
            )
        self._life.keep("kept by hand")
        return job.lesson

    def _on_trial(self, lesson: Lesson) -> Job | None:
        """The job that waits for somebody's word about this lesson. Raises WrongState: it does not wait yet."""
        job = self._current
        if job is None or job.lesson.id != lesson.id or lesson.state not in OPEN_STATES:
            return None
        if job.phase != "on trial" or job.ending is not None:
            raise WrongState(f"lesson {lesson.id} is {job.phase}", "wait for it, or cancel its job")
        return job

    def _revert_command(self, lesson_id: str) -> Lesson:
        lesson = self.log.get(lesson_id)
        job = self._on_trial(lesson)
        if job is not None:
            job.ending = Ending("undone", "undone by hand")
            self._finish(job)
            return job.lesson
        if self._current is not None and self._current.lesson.state in OPEN_STATES:
            raise Conflict(
                f"lesson {self._current.lesson.id} holds the weights ({self._current.phase})",
                "wait for it, or cancel it",
            )
        change = Reverted(lesson, log=self.log, weights=self.weights)
        change.prepare(_nothing)
        entry = change.apply(_nothing)
        self._working_copy.wait()
        return entry

    def _prune_quietly(self) -> None:
        try:
            self._pruning.prune(self._settings.keep_states)
        except SecondnatureError as e:
            LOG.warning("nothing was pruned now: %s", e)


def _nothing() -> None:
    """A revert is quick, and nobody may come between."""
