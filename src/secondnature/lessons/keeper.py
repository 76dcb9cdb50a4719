"""The keeper leads each lesson through its life: queued, running, on trial, kept or undone (server).

One thread, one lesson at a time: nothing else writes while a lesson runs or is on trial. Writes are visible at
once, so the guard is the undo: it rebuilds the weights from disk on the engine's side, whatever became of the
trainer. Everything that changes the log happens on this thread; requests hand it commands and wait.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from secondnature import storage, wire
from secondnature.config import Settings
from secondnature.engines.base import GenerationResult
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
from secondnature.evidence.gate import held_out, judge_lesson
from secondnature.lessons.ledger import Ledger
from secondnature.lessons.log import DELTA_FILE, OPTIMIZER_FILE, Log
from secondnature.lessons.own_answers import OwnAnswers
from secondnature.lessons.planner import Plan, Planner
from secondnature.lessons.prober import Prober
from secondnature.lessons.trainer import Trainer
from secondnature.records import (
    Correction,
    ErrorInfo,
    Evidence,
    Lesson,
    LessonState,
    Moved,
    Outcome,
    SampleAnswer,
    to_jsonl,
    utc_now,
)
from secondnature.weights.arena import Arena
from secondnature.weights.content import content_id
from secondnature.wire import CheckpointReply, JobStatus, TrainReply, TrainRequest

LOG = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Job:
    """A lesson that waits or lives, with what only matters while it does."""

    lesson: Lesson
    plan: Plan
    request: TrainRequest
    phase: str = "waiting"
    step: int = 0
    losses: list[float] = field(default_factory=list[float])
    tokens_per_s: float | None = None
    training_since: float | None = None
    evidence: Evidence | None = None
    cancel: threading.Event = field(default_factory=threading.Event)


class Keeper:
    """The one that changes the weights: submits jobs to the trainer, judges, keeps, undoes."""

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
        self._arena = arena
        self._clock = clock
        self.trainer = trainer
        self._prober = prober
        self._planner = planner
        self._own_answers = own_answers
        self._waiting: deque[Job] = deque()
        self._jobs: dict[str, Job] = {}
        self._current: Job | None = None
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._checkpoint_due: float | None = None
        self.trouble = ""
        """Why `/health` says degraded; empty: all is well."""
        self._thread = threading.Thread(target=self._live, name="keeper", daemon=True)

    # ---------------------------------------------------------------------------------- from any thread

    def start(self) -> None:
        """Begin; the trainer is started at once, so that it is ready when the first lesson comes."""
        self._thread.start()

    def stop(self) -> None:
        """End: a lesson that runs or is on trial is undone."""
        self._stop.set()
        if self._current is not None:
            self._current.cancel.set()
        self._thread.join()
        self.trainer.stop()

    def submit(self, request: TrainRequest) -> TrainReply:
        """Check and plan a job, write its entry, queue it.

        Raises:
            Busy: too many jobs wait.
            BadInput, BadExample, ContextOverflow: see `Planner.plan`.
            StorageError: the disk refused; nothing was accepted.
        """
        plan = self._planner.plan(request, self.ledger.all(), self._earlier())
        self._prober.check(request.probes)
        _refuse_taught(request, plan)
        if request.dry_run:
            return TrainReply(job="dry-run", lesson=None, state="planned", plan=plan.summary())
        return self._do(lambda: self._accept(request, plan))

    def status(self, job: str) -> JobStatus:
        """One job. Raises NotFound."""
        live = self._jobs.get(job)
        if live is not None:
            return self._status_of(live)
        for lesson in self.log.all():
            if lesson.job == job and lesson.kind == "train":
                return JobStatus(
                    job=job,
                    lesson=lesson.id,
                    state=lesson.state,
                    step=lesson.steps,
                    steps=lesson.steps,
                    loss=lesson.loss,
                    kl=lesson.kl,
                    weights_version=self._clock.read().version,
                    evidence=self.log.detail(lesson.id).evidence,
                    error=lesson.error,
                )
        raise NotFound(f"no job {job!r}", "`GET /v1/train/status` lists them")

    def statuses(self) -> list[JobStatus]:
        """Every job of this home, oldest first."""
        return [self.status(x.job) for x in self.log.all() if x.kind == "train"]

    def cancel(self, job: str) -> JobStatus:
        """End a job; returns when it is undone. Raises NotFound, WrongState."""
        live = self._jobs.get(job)
        if live is None or live.lesson.state not in ("queued", "running", "on_trial"):
            state = self.status(job).state
            raise WrongState(f"job {job} is {state} already", "use revert to take back a kept lesson")
        live.cancel.set()
        self._do(self._drop_cancelled)
        deadline = time.monotonic() + 60
        while live.lesson.state in ("queued", "running", "on_trial") and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.status(job)

    def keep(self, lesson_id: str) -> Lesson:
        """Keep the lesson on trial. Raises NotFound, WrongState."""
        return self._do(lambda: self._keep_command(lesson_id))

    def revert(self, lesson_id: str) -> Lesson:
        """Undo the lesson on trial, or take back the newest kept one. Raises NotFound, WrongState, Conflict."""
        return self._do(lambda: self._revert_command(lesson_id))

    def checkpoint(self) -> CheckpointReply:
        """Bring the working copy up to date with the kept lessons now. Raises StorageError."""
        return self._do(self._checkpoint_command)

    def checkpoint_state(self) -> CheckpointReply:
        """What the working copy holds."""
        path, version, _ = self.log.checkpoint_state()
        held = version or self.log.base_version
        return CheckpointReply(path=str(path), weights_version=held, current=held == self._kept_version())

    # -------------------------------------------------------------------------------- the keeper's thread

    def _do(self, command: Callable[[], T]) -> T:
        """Run a command on the keeper's thread, between its own steps."""
        if self._stop.is_set() or not self._thread.is_alive():
            raise Unreachable("the server is shutting down", "start it again")
        future: Future[T] = Future()
        self._commands.put((command, future))
        return future.result(timeout=600)

    def _serve_commands(self, wait_s: float = 0.0) -> None:
        """Run what was handed over; waits up to `wait_s` for the first command."""
        try:
            command, future = self._commands.get(timeout=wait_s) if wait_s else self._commands.get_nowait()
        except queue.Empty:
            return
        while True:
            try:
                future.set_result(command())
            except BaseException as e:  # noqa: BLE001  (it belongs to the caller, on whose thread it is raised)
                future.set_exception(e)
            try:
                command, future = self._commands.get_nowait()
            except queue.Empty:
                return

    def _live(self) -> None:
        self.trainer.launch()
        while not self._stop.is_set():
            self._serve_commands(wait_s=0.05)
            try:
                self.trainer.notice()
            except SecondnatureError as e:  # the next job says so to whoever asked for it
                LOG.warning("the trainer cannot start: %s", e)
            if self._checkpoint_due is not None and time.monotonic() > self._checkpoint_due:
                self._checkpoint_quietly()
            while self._waiting and not self._stop.is_set():
                self._lead(self._waiting.popleft())
        for job in self._waiting:
            self._end(job, "cancelled", "the server ended while it was waiting")
        while not self._commands.empty():
            _, future = self._commands.get_nowait()
            future.set_exception(Unreachable("the server is shutting down", "start it again"))

    def _drop_cancelled(self) -> None:
        """What waits and was cancelled need not wait for the lesson that holds the weights."""
        for job in [j for j in self._waiting if j.cancel.is_set()]:
            self._waiting.remove(job)
            self._end(job, "cancelled", "cancelled while it was waiting")

    def _lead(self, job: Job) -> None:
        """One lesson, from running to its end. Nothing it does can end this thread."""
        self._current = job
        try:
            if job.cancel.is_set():
                self._end(job, "cancelled", "cancelled while it was waiting")
                return
            self._run(job)
        except Cancelled as e:
            self._undo(job, "cancelled", e.message, None)
        except SecondnatureError as e:
            self._undo(job, "failed", f"{e.type}: {e.message}", ErrorInfo(**e.to_wire()))
        except Exception as e:
            LOG.exception("lesson %s", job.lesson.id)
            error = TrainingError(f"internal error: {e!r}", "please report it, with the server's log")
            self._undo(job, "failed", error.message, ErrorInfo(**error.to_wire()))
        finally:
            self._current = None
            self.trainer.launch()  # if it died: be ready for the next one

    def _run(self, job: Job) -> None:
        """running -> on trial -> decided. Raises whatever ends it otherwise; the caller undoes."""
        parent, head = self._clock.version, self.log.head()
        begun = {
            "state": "running",
            "parent": parent,
            "started_at": utc_now(),
            "optimizer_before": head.optimizer_after if head else None,  # now, not when it was queued
        }
        job.lesson = self.log.save(job.lesson.model_copy(update=begun))
        self._clock.begin(job.lesson.number)
        job.phase = "measuring before"
        before = self._ask(job, parent)
        answers_before = self._answers(job)
        if job.plan.own or job.plan.distilled:
            job.phase = "sampling answers"
        examples, replay = self._rehearse(job)
        job.phase = "training"
        done = self._train(job, examples, replay, answers_before)
        # ------------------------------------------------------------------------------------ on trial
        before_it = self.log.durable_weights(check=False)  # `write_delta` sees whether they are the parent
        lesson = self.log.write_delta(job.lesson, before_it, self._arena.tensors)
        assert lesson.version is not None, "write_delta names the version"
        self._clock.settle(lesson.version, trial=True)
        until = utc_now() + timedelta(seconds=self._settings.trial_lease_s)
        job.lesson = self.log.save(
            lesson.model_copy(
                update={
                    "state": "on_trial",
                    "steps": done.steps,
                    "loss": done.loss,
                    "kl": done.kl,
                    "moved": [Moved.model_validate(m) for m in done.moved],
                    "trial_until": until,
                    "optimizer_after": lesson.id,
                    "reason": done.stopped_by,
                }
            )
        )
        job.phase = "measuring after"
        self._write_answers(job, answers_before, self._answers(job))
        if job.request.probes:
            after = self._ask(job, lesson.version)
            self._decide(job, before, after)
        elif job.request.keep:
            self._keep(job, "kept unjudged, as asked")
        else:
            self._await_decision(job)

    def _answers(self, job: Job) -> list[GenerationResult]:
        """The greedy answers to the sample prompts, by the weights as they are."""
        return self._prober.answers([s.context for s in job.plan.samples], lambda: self._attend(job))

    def _rehearse(self, job: Job) -> tuple[list[wire.Work], list[wire.Work]]:
        """The examples and the replay of a lesson, with what the model itself has to say for them."""
        plan = job.plan
        examples, replay = list(plan.examples), list(plan.replay)
        if plan.distilled:
            examples += self._own_answers.distil(
                plan.distilled, plan.sdft, lambda: self._attend(job), seed=plan.seed
            )
        if plan.own:
            replay += self._own_answers.own(
                plan.own,
                lambda: self._attend(job),
                temperature=plan.own_temperature,
                seed=plan.seed,
                hold=plan.hold_own,
            )
        return examples, replay

    def _train(
        self,
        job: Job,
        examples: list[wire.Work],
        replay: list[wire.Work],
        answers: list[GenerationResult],
    ) -> wire.Done:
        plan = job.plan
        state = self.log.optimizer_file(plan.optimizer.rank)
        kl: dict[str, list[wire.Work]] = {"new": [], "replay": []}
        for sample, answer in zip(plan.samples, answers, strict=True):
            kl[sample.on].append(wire.Work(sample.context, answer.token_ids))
        message = wire.Train(
            job=job.lesson.job,
            lesson=job.lesson.id,
            objective=plan.objective,
            steps=plan.steps,
            batch_size=plan.batch_size,
            seed=plan.seed,
            examples=examples,
            replay=replay,
            replay_share=plan.replay_share,
            replay_weight=plan.replay_weight,
            learned_loss=plan.learned_loss,
            optimizer=plan.optimizer.model_dump(mode="json"),
            optimizer_in=str(state) if state is not None else None,
            optimizer_out=str(self.log.directory(job.lesson) / OPTIMIZER_FILE),
            development=plan.development,
            until_margin=plan.until_margin,
            until_passed=plan.until_passed,
            look_every=plan.look_every,
            kl=kl,
        )

        def on_progress(metric: dict[str, object]) -> None:
            self.log.add_metric(job.lesson, metric)
            if metric.get("kind") == "step":
                job.step = int(str(metric["step"]))
                job.losses.append(float(str(metric["loss"])))
                rate = metric.get("tokens_per_s")
                job.tokens_per_s = float(str(rate)) if rate is not None else None

        def cancelled() -> bool:
            self._serve_commands()
            return job.cancel.is_set()

        self.trainer.ensure()
        job.training_since = time.monotonic()
        done = self.trainer.run(message, on_progress, cancelled)
        if job.cancel.is_set():
            raise Cancelled("cancelled")
        return done

    def _decide(self, job: Job, before: list[Outcome], after: list[Outcome]) -> None:
        lesson = job.lesson
        assert lesson.parent is not None
        assert lesson.version is not None
        assert job.request.lesson.behaviour is not None, "checked by the request"
        evidence = judge_lesson(
            job.request.probes,
            before,
            after,
            gate=job.request.gate,
            behaviour=job.request.lesson.behaviour,
            num_retries=lesson.cause.num_retries,
            before_version=lesson.parent,
            after_version=lesson.version,
            seed=job.plan.seed,
        )
        storage.write_text(
            self.log.directory(lesson) / "evidence.json", evidence.model_dump_json(indent=2) + "\n"
        )
        job.evidence = evidence
        job.lesson = lesson.model_copy(update={"verdict": evidence.verdict})
        if evidence.verdict == "kept":
            self._keep(job, evidence.sentence)
        else:
            self._undo(job, "undone", evidence.sentence, None)

    def _await_decision(self, job: Job) -> None:
        """On trial without probes: until somebody decides, or the lease ends."""
        job.phase = "on trial"
        assert job.lesson.trial_until is not None
        deadline = time.monotonic() + self._settings.trial_lease_s
        while job.lesson.state == "on_trial":
            self._serve_commands(wait_s=0.05)
            if job.lesson.state != "on_trial":
                return
            if self._stop.is_set():
                self._undo(job, "undone", "the server ended while it was on trial", None)
            elif job.cancel.is_set():
                self._undo(job, "cancelled", "cancelled while on trial", None)
            elif time.monotonic() > deadline:
                self._undo(job, "undone", "nobody kept it before the trial's lease ended", None)

    # --------------------------------------------------------------------------------- keep, undo, end

    def _keep(self, job: Job, reason: str) -> None:
        """The commit: from this rename on, the lesson is part of the weights."""
        job.lesson = self.log.save(
            job.lesson.model_copy(
                update={"state": "kept", "reason": reason, "ended_at": utc_now(), "trial_until": None}
            )
        )
        assert job.lesson.version is not None
        self._clock.settle(job.lesson.version, trial=False)
        job.phase = "done"
        self._checkpoint_due = time.monotonic() + self._settings.checkpoint_after_s

    def _undo(self, job: Job, state: LessonState, reason: str, error: ErrorInfo | None) -> None:
        """Make the weights whole again, to the byte, and say so in the log."""
        job.phase = "undoing"
        self._restore()
        self._end(job, state, reason, error)

    def _restore(self) -> None:
        """Write the durable weights into the arena; nobody else may be writing."""
        self._arena.close_torn_write()
        try:
            self._arena.write(self.log.durable_weights(check=False))
        except SecondnatureError as e:
            self.trouble = f"the weights could not be restored: {e}"
            LOG.exception("restore")
            return
        version = content_id(self._arena.tensors, like=self._kept_version())
        if version != self._kept_version():
            self.trouble = f"the weights are {version} after an undo; expected {self._kept_version()}"
            LOG.error(self.trouble)
        self._clock.settle(version, trial=False)

    def _end(self, job: Job, state: LessonState, reason: str, error: ErrorInfo | None = None) -> None:
        ended = job.lesson.model_copy(
            update={
                "state": state,
                "reason": reason,
                "error": error,
                "ended_at": utc_now(),
                "trial_until": None,
            }
        )
        try:
            self.log.save(ended)
        except StorageError as e:  # the next start would undo it anyway: an open lesson is never kept
            LOG.warning("lesson %s is %s, but could not be written down: %s", ended.id, state, e)
            self.log.remember(ended)
        for name in (DELTA_FILE, OPTIMIZER_FILE):  # nothing will ever need them
            (self.log.directory(ended) / name).unlink(missing_ok=True)
        job.phase = "done"
        job.lesson = ended

    def _kept_version(self) -> str:
        return self.log.kept_version()

    # --------------------------------------------------------------------------------------- commands

    def _accept(self, request: TrainRequest, plan: Plan) -> TrainReply:
        if len(self._waiting) >= self._settings.max_jobs:
            raise Busy(
                f"{len(self._waiting)} jobs are waiting; at most {self._settings.max_jobs} may", "try later"
            )
        behaviour = request.lesson.behaviour or next(
            (c.behaviour for c in plan.corrections if c.behaviour), None
        )
        retries = self.log.num_tries([c.digest() for c in plan.corrections])
        lesson = self.log.create(
            "train",
            behaviour or "lesson",
            behaviour=behaviour,
            note=request.lesson.note,
            cause=plan.cause(retries),
            settings=plan.settings(),
        )
        if plan.corrections:
            storage.write_text(self.log.directory(lesson) / "corrections.jsonl", to_jsonl(plan.corrections))
        job = Job(lesson, plan, request)
        self._jobs[lesson.job] = job
        self._waiting.append(job)
        return TrainReply(job=lesson.job, lesson=lesson.id, state="queued", plan=plan.summary())

    def _keep_command(self, lesson_id: str) -> Lesson:
        lesson = self.log.get(lesson_id)
        job = self._current
        if job is None or job.lesson.id != lesson.id or job.lesson.state != "on_trial":
            raise WrongState(
                f"lesson {lesson.id} is {lesson.state}, not on trial", "only a lesson on trial can be kept"
            )
        if job.phase != "on trial":
            raise WrongState(f"lesson {lesson.id} is {job.phase}", "wait for it")
        self._keep(job, "kept by hand")
        return job.lesson

    def _revert_command(self, lesson_id: str) -> Lesson:
        lesson = self.log.get(lesson_id)
        job = self._current
        if job is not None and job.lesson.id == lesson.id:
            if job.phase != "on trial":
                raise WrongState(f"lesson {lesson.id} is {job.phase}", "cancel its job instead")
            self._undo(job, "undone", "undone by hand", None)
            return job.lesson
        if job is not None:
            raise Conflict(
                f"lesson {job.lesson.id} holds the weights ({job.phase})", "wait for it, or cancel it"
            )
        target = self.log.prepare_revert(lesson, self._clock.version)
        entry = self.log.create_revert(lesson)
        self._arena.write(target)
        version = content_id(self._arena.tensors, like=entry.version)
        if version != entry.version:
            self.trouble = f"the weights are {version} after the revert; expected {entry.version}"
            raise WeightsError(self.trouble, "restart the server: it rebuilds them from disk")
        self._clock.settle(version, trial=False)
        self._checkpoint_due = time.monotonic() + self._settings.checkpoint_after_s
        return entry

    def _checkpoint_command(self) -> CheckpointReply:
        version = self._kept_version()
        self.log.save_checkpoint(self.log.durable_weights(), version)
        self._checkpoint_due = None
        return self.checkpoint_state()

    def _checkpoint_quietly(self) -> None:
        self._checkpoint_due = None
        try:
            self._checkpoint_command()
        except SecondnatureError as e:
            LOG.warning("no checkpoint now: %s", e)
            self._checkpoint_due = time.monotonic() + self._settings.checkpoint_after_s

    # ---------------------------------------------------------------------------------------- helpers

    def _earlier(self) -> list[Correction]:
        kept = [
            x for x in self.log.all() if x.state == "kept" and x.kind == "train" and x.reverted_by is None
        ]
        return [c for x in kept for c in self.log.detail(x.id).corrections]

    def _attend(self, job: Job) -> None:
        """Called while the judge waits for answers: commands are served, a cancel ends the wait."""
        self._serve_commands()
        if job.cancel.is_set():
            raise Cancelled("cancelled")

    def _ask(self, job: Job, version: str) -> list[Outcome]:
        if not job.request.probes:
            return []
        return self._prober.outcomes(job.request.probes, version, lambda: self._attend(job))

    def _write_answers(self, job: Job, before: list[GenerationResult], after: list[GenerationResult]) -> None:
        answers = [
            SampleAnswer(
                prompt=s.prompt, before=b.text, after=a.text, wanted=s.wanted, behaviour=job.lesson.behaviour
            )
            for s, b, a in zip(job.plan.samples, before, after, strict=True)
            if s.prompt is not None
        ]
        storage.write_text(self.log.directory(job.lesson) / "answers.jsonl", to_jsonl(answers))

    def _status_of(self, job: Job) -> JobStatus:
        eta = None
        if job.phase == "training" and job.step and job.training_since is not None:
            eta = (time.monotonic() - job.training_since) / job.step * (job.plan.steps - job.step)
        return JobStatus(
            job=job.lesson.job,
            lesson=job.lesson.id,
            state=job.lesson.state,
            phase=job.phase,
            step=job.step,
            steps=job.plan.steps,
            loss=job.losses[-1] if job.losses else None,
            losses=list(job.losses),
            tokens_per_s=job.tokens_per_s,
            eta_s=eta,
            kl=job.lesson.kl,
            weights_version=self._clock.read().version,
            evidence=job.evidence,
            error=job.lesson.error,
        )


def _refuse_taught(request: TrainRequest, plan: Plan) -> None:
    """What was taught, or looked at while training, is no evidence. Raises BadInput."""
    untaught = held_out(request.probes, plan.corrections)
    looked_at = [p.prompt for p in request.development]
    fit = [p for p in untaught if p.prompt not in looked_at]
    if len(fit) < len(request.probes):
        raise BadInput(
            f"{len(request.probes) - len(fit)} of {len(request.probes)} probes are not held out: "
            f"{len(request.probes) - len(untaught)} ask a prompt that is also taught, "
            f"{len(untaught) - len(fit)} one of the development probes",
            "probes must ask prompts that the lesson never saw",
        )
