"""A change by the trainer: corrections, replay and the model's own answers become small steps (server).

What enters a batch is read here, when the lesson begins, and not when it was queued: the plan is made again with
the lessons that were kept meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from secondnature import wire
from secondnature.engines.generation import GenerationResult
from secondnature.errors import Cancelled
from secondnature.lessons.change import CheckIn
from secondnature.lessons.job import Job, Phase
from secondnature.lessons.log import OPTIMIZER_FILE, Log
from secondnature.lessons.own_answers import OwnAnswers
from secondnature.lessons.planner import Planner
from secondnature.lessons.prober import Prober
from secondnature.lessons.trainer import Trainer
from secondnature.records import STOPPED_BY, Lesson, LookAnswer, LookMetric, Moved, Outcome

__all__ = ["Trained"]

LOG = logging.getLogger(__name__)
LOOKING: wire.TrainerPhase = "looking at development probes"
MAX_ANSWERS = 16
"""To development probes, that a look writes down."""
MAX_ANSWER_CHARS = 200
"""Of each of them."""
UNITS: dict[str, str] = {
    "loading the optimizer's state": "tensors",
    "recording answers for the KL": "prompts",
    "recording replay": "examples",
    "reading the teacher": "answers",
    "reading references": "examples",
    LOOKING: "probes",
    "training": "steps",
    "measuring the KL": "prompts",
    "saving the optimizer's state": "tensors",
}
"""Of what the trainer counts (`wire.TrainerPhase`)."""


class Trained:
    """The change that a `POST /v1/train` asks for."""

    def __init__(
        self,
        job: Job,
        *,
        log: Log,
        planner: Planner,
        prober: Prober,
        own_answers: OwnAnswers,
        trainer: Trainer,
    ) -> None:
        self._job = job
        self._log = log
        self._planner = planner
        self._prober = prober
        self._own_answers = own_answers
        self._trainer = trainer
        self._examples: list[wire.TokenExample] = []
        self._replay: list[wire.TokenExample] = []
        self._training: Phase | None = None
        """Where looks came between the steps: rate and time left are those of both."""
        self._spoken: dict[int, Outcome] = {}
        """What the last look heard, by the probe's place."""
        self.answers: list[GenerationResult] = []
        """The greedy answers to the plan's samples, before."""

    def plan_again(self) -> None:
        """The plan with what is kept now; the corrections stay those that were accepted. Raises as `plan`."""
        job = self._job
        earlier, unreadable = self._log.earlier()
        plan = self._planner.plan(job.request, job.plan.corrections, earlier)
        left_out = {**plan.left_out, **({"unreadable lessons": len(unreadable)} if unreadable else {})}
        known = {"skipped": job.plan.skipped, "passed_over": job.plan.passed_over}
        job.plan = replace(plan, left_out=left_out, **known)

    def prepare(self, check_in: CheckIn) -> None:
        """Ask the model for what only it can say: answers to compare, to distil, to replay."""
        job, plan = self._job, self._job.plan

        def count(done: int, total: int) -> None:
            job.count(done, total)
            check_in()

        self.answers = self.sample(check_in)
        self._examples, self._replay = list(plan.examples), list(plan.replay)
        if plan.distilled:
            job.enter("sampling answers", "answers")
            self._examples += self._own_answers.distil(plan.distilled, plan.sdft, count, seed=plan.seed)
        if plan.own:
            job.enter("answering replay prompts", "answers", len(plan.own))
            self._replay += self._own_answers.own(
                plan.own,
                count,
                temperature=plan.own_temperature,
                seed=plan.seed,
                by_distribution=plan.hold_own,
            )

    def sample(self, check_in: CheckIn) -> list[GenerationResult]:
        """The greedy answers to the sample prompts, by the weights as they are."""

        def count(done: int, total: int) -> None:
            self._job.count(done, total)
            check_in()

        samples = self._job.plan.samples
        self._job.enter("answering samples", "answers", len(samples))
        return self._prober.answers([s.context for s in samples], count)

    def apply(self, check_in: CheckIn) -> Lesson:
        """Train. Raises Cancelled, TrainerDied, or what the trainer found."""
        job = self._job
        message = self._message()
        job.enter("waiting for the trainer")
        self._trainer.ensure(check_in)
        job.enter("training", "steps", job.plan.steps)
        done = self._trainer.run(
            message,
            self._on_progress,
            lambda: _asks_to_end(check_in),
            lambda _, alive: self._ask_development(check_in, alive),
        )
        if job.cancel.is_set():
            raise Cancelled("cancelled")
        moved = [Moved.model_validate(m) for m in done.moved]
        self._log.write_moved(job.lesson, moved)
        return job.lesson.model_copy(
            update={
                "steps": done.steps,
                "loss": done.loss,
                "kl": done.kl,
                "optimizer_after": job.lesson.id,
                "optimizer_sha256": done.optimizer_sha256 or None,
                "stopped_by": done.stopped_by,
                "reason": STOPPED_BY.get(done.stopped_by, done.stopped_by),
            }
        )

    def _message(self) -> wire.Train:
        job, plan = self._job, self._job.plan
        state = self._log.optimizer_file(plan.optimizer.rank)
        kl: dict[str, list[wire.TokenExample]] = {"new": [], "replay": []}
        for sample, answer in zip(plan.samples, self.answers, strict=True):
            kl[sample.on].append(wire.TokenExample(sample.context, answer.token_ids))
        return wire.Train(
            job=job.lesson.job,
            lesson=job.lesson.id,
            objective=plan.objective,
            steps=plan.steps,
            batch_size=plan.batch_size,
            seed=plan.seed,
            examples=self._examples,
            replay=self._replay,
            replay_share=plan.replay_share,
            replay_weight=plan.replay_weight,
            learned_loss=plan.learned_loss,
            optimizer=plan.optimizer.model_dump(mode="json"),
            optimizer_in=str(state) if state is not None else None,
            optimizer_out=str(self._log.directory(job.lesson) / OPTIMIZER_FILE),
            development=plan.development,
            until_margin=plan.until_margin,
            until_passed=plan.until_passed,
            look_every=plan.look_every,
            kl=kl,
        )

    def _ask_development(self, check_in: CheckIn, alive: CheckIn) -> list[bool]:
        """Which development probes pass, of those whose answers are checked, by the weights as they are."""
        spoken = {i: p for i, p in enumerate(self._job.request.development) if p.check.prefers is None}

        def count(done: int, total: int) -> None:
            self._enter(LOOKING, done, total)
            alive()
            check_in()

        found = self._prober.ask_now(list(spoken.values()), count)
        self._spoken = dict(zip(spoken, found, strict=True))
        return [outcome.passed for outcome in found]

    def _answers(self, lost: Sequence[int]) -> list[LookAnswer]:
        """Some of what was said at the last look, what is lost first."""
        order = sorted(self._spoken, key=lambda i: i not in lost)[:MAX_ANSWERS]
        spoken = [(i, self._spoken[i]) for i in order]
        return [LookAnswer(probe=i, passed=o.passed, answer=o.answer[:MAX_ANSWER_CHARS]) for i, o in spoken]

    def _on_progress(self, metric: dict[str, object]) -> None:
        job = self._job
        if metric.get("kind") == "phase":
            done, total = int(str(metric.get("done", 0))), int(str(metric.get("total", 0)))
            self._enter(str(metric["phase"]), done, total)
            return
        if metric.get("kind") == "look":
            look = LookMetric.model_validate(metric)
            job.look = look.model_copy(update={"answers": self._answers(look.lost)})
            metric = job.look.model_dump()
        self._log.add_metric(job.lesson, metric)
        if metric.get("kind") == "step":
            job.step = int(str(metric["step"]))
            job.losses.append(float(str(metric["loss"])))
            rate = metric.get("tokens_per_s")
            job.tokens_per_s = float(str(rate)) if rate is not None else None
            self._enter("training", job.step, job.plan.steps)

    def _enter(self, phase: str, done: int, total: int) -> None:
        """The trainer is so far in a phase of its own: the one that is known, or another."""
        job = self._job
        if job.phase == "training":
            self._training = job.now
        if phase == "training":
            done = max(done, job.step)
            if job.phase != phase:
                job.now = self._training or Phase(phase, UNITS[phase], 0, total)
        elif phase != job.phase or done < job.now.done:
            job.enter(phase, UNITS.get(phase, ""), total)
        job.count(done, total)


def _asks_to_end(check_in: CheckIn) -> bool:
    """Whether somebody wants the trainer to end."""
    try:
        check_in()
    except Cancelled:
        return True
    return False
