"""The life of a lesson: measure, change, on trial, measure, judge; the same for all kinds of change (server).

Everything runs on the runner's thread, which goes on serving commands whenever `check_in` is called. Writes are
visible at once, so the guard is the undo. `run` gives back how the lesson is to end, or None where it was kept;
whatever it raises ends it too. Making the weights whole again is the runner's business in either case.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from secondnature import storage
from secondnature.config import Settings
from secondnature.engines.generation import GenerationResult
from secondnature.errors import Cancelled, NotDurable
from secondnature.evidence.gate import judge_lesson
from secondnature.evidence.taught import as_wanted
from secondnature.lessons.change import CheckIn, Judged
from secondnature.lessons.job import Ending, Job
from secondnature.lessons.log import Log
from secondnature.lessons.prober import Prober
from secondnature.lessons.prompting import compared, prompted
from secondnature.lessons.weights import ServedWeights
from secondnature.records import (
    Lesson,
    Outcome,
    Probe,
    Prompted,
    SampleAnswer,
    Taught,
    to_jsonl,
    utc_now,
)

__all__ = ["Life"]

UNNAMED = "lesson"
"""What a lesson teaches that is judged by guards alone, where nobody named it."""


class Life:
    """One lesson, from its begin to its verdict."""

    def __init__(
        self,
        job: Job,
        change: Judged,
        *,
        settings: Settings,
        log: Log,
        weights: ServedWeights,
        prober: Prober,
        check_in: CheckIn,
        wait: Callable[[float], None],
    ) -> None:
        """`wait` serves commands for a while, without raising Cancelled."""
        self._job = job
        self._change = change
        self._settings = settings
        self._log = log
        self._weights = weights
        self._prober = prober
        self._check_in = check_in
        self._wait = wait

    def run(self) -> Ending | None:
        """running -> on trial -> decided. None: it is kept. Raises whatever ends it otherwise."""
        self._begin()
        before = self._ask("measuring before")
        pairs, by_prompt = self._prompt()
        self._change.prepare(self._check_in)
        lesson = self._change.apply(self._check_in)
        self._go_on_trial(lesson)
        answers = self._change.sample(self._check_in)
        self._write_answers(self._change.answers, answers)
        if self._job.request.probes:
            after = self._ask("measuring after")
            beside = compared(pairs, by_prompt, after, len(self._job.plan.corrections))
            return self._judge(before, after, self._taught(answers), beside)
        if self._job.request.keep:
            self.keep("kept unjudged, as asked")
            return None
        return self._await_decision()

    def _begin(self) -> None:
        """What enters a batch or a verdict is read now, and not when the lesson was queued."""
        job, head = self._job, self._log.head()
        self._change.plan_again()
        retries = self._log.num_tries(job.plan.digests, [c.digest() for c in job.plan.corrections])
        begun = {
            "state": "running",
            "parent": self._log.kept_version(),
            "started_at": utc_now(),
            "optimizer_before": head.optimizer_after if head else None,
            "cause": job.plan.cause(retries),
            "settings": job.plan.settings(),
        }
        self._weights.begin(job.lesson)
        job.lesson = self._log.save(job.lesson.model_copy(update=begun))

    def _go_on_trial(self, lesson: Lesson) -> None:
        """Write down what the lesson did; from here on the weights have a version again."""
        job = self._job
        job.enter("writing down the change", "tensors")

        def on_tensor(done: int, total: int) -> None:
            job.count(done, total)
            self._check_in()

        job.lesson = self._weights.record(lesson, on_tensor)
        until = utc_now() + timedelta(seconds=self._settings.trial_lease_s)
        job.lesson = self._log.save(job.lesson.model_copy(update={"state": "on_trial", "trial_until": until}))

    def _ask(self, phase: str) -> list[Outcome]:
        job = self._job
        if not job.request.probes:
            return []
        probes = [*job.request.probes, *job.plan.retention.probes]
        job.enter(phase, "probes", len(probes))

        def count(done: int, total: int) -> None:
            job.count(done, total)
            self._check_in()

        return self._prober.outcomes(probes, self._weights.version, count, style_of=job.request.probes)

    def _prompt(self) -> tuple[list[tuple[Probe, Probe]], list[Outcome]]:
        """What prompting alone would do, by the weights before the lesson."""
        job, request = self._job, self._job.request
        if not (request.prompting and request.probes):
            return [], []
        behaviour = job.lesson.behaviour or UNNAMED
        pairs = prompted(request.probes, behaviour, job.plan.corrections, self._prober)
        job.enter("measuring prompting alone", "probes", len(pairs))

        def count(done: int, total: int) -> None:
            job.count(done, total)
            self._check_in()

        return pairs, self._prober.outcomes([p for _, p in pairs], self._weights.version, count)

    def _write_answers(self, before: list[GenerationResult], after: list[GenerationResult]) -> None:
        job = self._job
        answers = [
            SampleAnswer(
                prompt=s.prompt, before=b.text, after=a.text, wanted=s.wanted, behaviour=job.lesson.behaviour
            )
            for s, b, a in zip(job.plan.samples, before, after, strict=True)
            if s.prompt is not None
        ]
        storage.write_text(self._log.directory(job.lesson) / "answers.jsonl", to_jsonl(answers))

    def _taught(self, answers: list[GenerationResult]) -> Taught | None:
        """How many of the corrections that are sampled are answered as was wanted; None: nobody wrote an answer."""
        samples = zip(self._job.plan.samples, self._change.answers, answers, strict=True)
        said = [
            (s.prompt[-1].content, s.wanted, b.text, a.text)
            for s, b, a in samples
            if s.wanted is not None and s.prompt is not None
        ]
        if not said:
            return None
        return Taught(
            n=len(said),
            before=sum(before.strip() == wanted.strip() for _, wanted, before, _ in said),
            after=sum(as_wanted(asked, wanted, after, before) for asked, wanted, before, after in said),
            exact=sum(after.strip() == wanted.strip() for _, wanted, _, after in said),
        )

    def _judge(
        self, before: list[Outcome], after: list[Outcome], taught: Taught | None, beside: Prompted | None
    ) -> Ending | None:
        job, lesson = self._job, self._job.lesson
        assert lesson.parent is not None, "a lesson on trial has one"
        assert lesson.version is not None, "a lesson on trial has one"
        job.enter("judging")
        evidence = judge_lesson(
            job.request.probes,
            before,
            after,
            gate=job.request.gate,
            behaviour=lesson.behaviour or UNNAMED,
            taught=taught,
            prompted=beside,
            retained=job.plan.retention.sets,
            num_retries=lesson.cause.num_retries,
            before_version=lesson.parent,
            after_version=lesson.version,
            seed=job.plan.seed,
        )
        storage.write_text(
            self._log.directory(lesson) / "evidence.json", evidence.model_dump_json(indent=2) + "\n"
        )
        job.evidence = evidence
        job.lesson = lesson.model_copy(update={"verdict": evidence.verdict})
        if evidence.verdict != "kept":
            return Ending("undone", evidence.sentence)
        self.keep(evidence.sentence)
        return None

    def keep(self, reason: str) -> None:
        """The commit: from this rename on, the lesson is part of the weights. Raises StorageError: it is not."""
        job = self._job
        if job.lesson.version == job.lesson.parent:
            reason += "; no weight changed"
        kept = job.lesson.model_copy(
            update={"state": "kept", "reason": reason, "ended_at": utc_now(), "trial_until": None}
        )
        try:
            job.lesson = self._log.save(kept)
        except NotDurable:  # everybody sees it: it is kept; the runner goes on until the disk says so too
            job.lesson = self._log.get(kept.id)
        self._weights.keep()

    def _await_decision(self) -> Ending | None:
        """On trial without probes: until somebody decides, or the lease ends."""
        job = self._job
        job.enter("on trial")
        deadline = time.monotonic() + self._settings.trial_lease_s
        while job.lesson.state == "on_trial" and job.ending is None:
            self._wait(0.05)
            if job.lesson.state != "on_trial" or job.ending is not None:
                break
            if job.cancel.is_set():
                raise Cancelled("cancelled while on trial")
            if time.monotonic() > deadline:
                return Ending("undone", "nobody kept it before the trial's lease ended")
        return job.ending
