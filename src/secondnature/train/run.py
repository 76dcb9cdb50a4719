"""One training job, from its message to the optimizer's state on disk (trainer).

Whatever must be known of the weights as they were (KL, replay held by distribution, the teacher, references) is
recorded first; then the steps, with looks between them; then the KL, and the state. Every phase tells how far it is
and can be cancelled (`phases`). Nothing here undoes anything: that is the server's side's business.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pydantic import ValidationError
from torch import Tensor, nn

from secondnature import wire
from secondnature.errors import BadInput, Exploded, NonFinite, TrainingError
from secondnature.model import names
from secondnature.model.load import build
from secondnature.records import STOPPED_BY, Example, KlMetric, KlSet, OptimizerSettings, StepMetric
from secondnature.train.anchors import (
    KEPT_TOKENS,
    MAX_BYTES,
    Anchor,
    affordable,
    distributions,
    divergences,
    drift_of,
    record,
)
from secondnature.train.apollo import Apollo
from secondnature.train.batches import batches
from secondnature.train.guard import Bounds, vocab_size
from secondnature.train.looks import look_at
from secondnature.train.losses import Reference
from secondnature.train.memory import give_back
from secondnature.train.phases import Check, Phases, Report
from secondnature.train.state import load_optimizer, save_optimizer
from secondnature.train.step import StepResult, references, train_step
from secondnature.train.stopping import Stopping, mean
from secondnature.weights.arena import Arena
from secondnature.weights.updates import UPDATE_FILE, write_update

__all__ = ["MAX_KL_TOKENS", "PAUSE_S", "TrainingRun", "model_in"]

LOG = logging.getLogger("secondnature.trainer")
PAUSE_S = 0.05
"""How often a pausing trainer looks whether the requests are answered."""
GIVE_BACK_S = 1.0
"""Between two times that freed memory is returned while steps are made."""
NUM_WATCHED = 4
"""Prompts of each set on which the KL is measured between steps."""
MAX_KL_TOKENS = 64
"""Positions of an answer at which the lesson's KL is measured, from its first token on."""
Ask = Callable[[int], list[bool]]
"""Given a step: which of the spoken development probes pass after it, in order."""


def model_in(arena: Arena, directory: Path, layout: wire.Layout) -> nn.Module:
    """The model of `directory` around the arena's memory, whosever names it has there.

    Raises:
        UnsupportedModel, BadCheckpoint: the arena does not hold that model.
    """
    tensors = arena.tensors
    if layout == "vllm":
        headers = {name: names.Header.of(tensor) for name, tensor in tensors.items()}
        tensors = names.views(names.plan(directory, headers, device=names.device_of(tensors)), tensors)
    return build(directory, tensors)


@dataclass(frozen=True)
class _Material:
    """What the steps are dealt from, with all that had to be taken from the weights as they were."""

    num_new: int
    works: list[wire.TokenExample]
    """The new examples, and after them the replay that is trained on."""
    examples: list[Example]
    """Of the works, in their order."""
    anchors: list[Anchor]
    """Replay that is held by distribution."""
    references: list[Reference | None] | None
    teachers: list[Tensor] | None
    """Of the new examples."""


class TrainingRun:
    """One job on one model. Use once."""

    def __init__(self, model: nn.Module, arena: Arena, job: wire.Train, share: float = 1.0) -> None:
        """`share`: of the time, while requests are being answered, that it may work. Raises BadInput."""
        self.model = model
        self.arena = arena
        self.job = job
        self._share = share
        self._bounds: Bounds | None = None
        self._stopping = Stopping(job)
        self._ask: Ask = _unasked
        self._waited_s = 0.0
        """For answers to development probes, since the last step began: that is no work."""
        self._watched: dict[KlSet, list[Anchor]] = {}
        self._gave_back = time.monotonic()
        try:
            settings = OptimizerSettings.model_validate(job.optimizer)
        except ValidationError as e:
            raise BadInput(f"optimizer settings: {e}", "server and trainer differ in version?") from None
        folder = Path(job.optimizer_out).parent  # of the lesson: its disk is the one that must hold it anyway
        # a GPU has no room for fp32 sums of the updates, twice the weights: there, nobody tells how far they moved,
        # and the lesson has no update
        self._on_gpu = next(model.parameters()).is_cuda
        self.optimizer = Apollo(model, settings, seed=job.seed, track=not self._on_gpu, folder=folder)
        self._lr = self.optimizer.lr

    def run(self, report: Report, check: Check, ask: Ask | None = None) -> wire.Done:
        """All of it. `report` sends a metric; `check` raises Cancelled when somebody asked for it.

        `ask` is given a step and says which of the spoken development probes pass then, in order; nothing is
        written until it has answered.
        """
        job, phases = self.job, Phases(report, check)
        self._ask = ask or self._ask
        if job.optimizer_in is not None:
            each = phases.begin("loading the optimizer's state", 0)
            load_optimizer(self.optimizer, Path(job.optimizer_in), each)
        sets = cast("dict[KlSet, list[wire.TokenExample]]", job.kl)  # the wire knows no records
        kl: dict[KlSet, list[Anchor]] = {on: self._before(found, phases) for on, found in sets.items()}
        self._watched = {on: found[:NUM_WATCHED] for on, found in kl.items() if found}
        material = self._material(phases)
        self._look(0, report, phases)
        steps, loss, stopped_by = self._steps(material, report, check, phases)
        assert stopped_by in STOPPED_BY, "whoever asks why gets a sentence"
        check()
        means = {on: self._after(on, before, report, phases) for on, before in kl.items() if before}
        update = self._save_update(phases)
        each = phases.begin("saving the optimizer's state", len(self.optimizer.state_dict()[0]))
        sha256 = save_optimizer(self.optimizer, Path(job.optimizer_out), each)
        moved = [] if self._on_gpu else self.optimizer.moved()
        if stopped_by != "learned" and not (self._on_gpu or any(m.written for m in moved)):
            stopped_by = "nothing moved"  # whatever else ended it: this is what there is to know
        told = [m.model_dump() for m in moved]
        return wire.Done(job.job, steps, loss, means, told, stopped_by, sha256, update)

    def _save_update(self, phases: Phases) -> str:
        """Store what was meant, beside the optimizer's state; the sha256 of the file. Empty: nobody kept track."""
        sums = self.optimizer.task_vector
        if sums is None:
            return ""
        path = Path(self.job.optimizer_out).with_name(UPDATE_FILE)
        return write_update(path, sums, each=phases.begin("saving the update", len(sums))).sha256

    # ------------------------------------------------------------------------- before the first write

    def _material(self, phases: Phases) -> _Material:
        job = self.job
        anchors = self._recorded([w for w in job.replay if w.by_distribution], phases)
        new, teachers = job.examples, self._teachers(phases)
        if teachers is not None:
            new = new[: len(teachers)]
        works = new + [w for w in job.replay if not w.by_distribution]
        examples = [_example(w) for w in works]
        refs: list[Reference | None] | None = None
        if job.objective in ("dpo", "dpop"):
            pairs = sum(e.rejected_ids is not None for e in examples)
            refs = references(self.model, examples, phases.begin("reading references", pairs))
        return _Material(len(new), works, examples, anchors, refs, teachers)

    def _recorded(self, works: Sequence[wire.TokenExample], phases: Phases) -> list[Anchor]:
        """The distributions along replayed answers before the first write: as many as fit in memory."""
        examples = [_example(w) for w in works]
        count = self._affordable(examples, "replay examples", 2 * KEPT_TOKENS)
        return record(self.model, examples[:count], phases.begin("recording replay", count)) if count else []

    def _affordable(self, examples: Sequence[Example], what: str, num_kept: int) -> int:
        count = affordable(examples, num_kept)
        if count < len(examples):
            LOG.warning(
                "lesson %s: the first %d of %d %s fit in memory", self.job.lesson, count, len(examples), what
            )
        return count

    def _teachers(self, phases: Phases) -> list[Tensor] | None:
        """SDFT: what the model says along each example's answer with the correction in its context."""
        if self.job.objective != "sdft":
            return None
        read = [wire.TokenExample(w.teacher or w.context, w.continuation) for w in self.job.examples]
        texts = [_example(w) for w in read]
        count = self._affordable(texts, "sampled answers", vocab_size(self.model))
        found = distributions(self.model, texts[:count], phases.begin("reading the teacher", count))
        if not found:
            longest = max(len(w.continuation) for w in read)
            raise TrainingError(
                f"the distributions along one answer of {longest} tokens do not fit in {MAX_BYTES:,} bytes",
                "`sdft` keeps one number per token and entry of the vocabulary: write the answers, and use `sft`",
            )
        return found

    def _before(self, works: Sequence[wire.TokenExample], phases: Phases) -> list[Anchor]:
        """The distributions that the KL of the lesson is measured against: the first positions of each answer."""
        examples = [
            _example(wire.TokenExample(w.context, w.continuation[:MAX_KL_TOKENS]))
            for w in works
            if w.continuation
        ]
        count = affordable(examples, 2 * KEPT_TOKENS, MAX_BYTES // 2)
        if not count:
            return []
        return record(self.model, examples[:count], phases.begin("recording answers for the KL", count))

    # -------------------------------------------------------------------------------------- the steps

    def _steps(
        self, material: _Material, report: Report, check: Check, phases: Phases
    ) -> tuple[int, float, str]:
        """(steps that were made, the last loss, why no further one: a key of STOPPED_BY)."""
        job, num_new = self.job, material.num_new
        num_pool = len(material.works) - num_new
        step, loss, pace = 0, math.nan, time.monotonic()
        known: dict[int, float] = {}  # of each new example, the loss when it was last read
        dealt = batches(
            num_new,
            num_pool + len(material.anchors),
            batch_size=job.batch_size,
            steps=job.steps,
            share=job.replay_share,
            seed=job.seed,
        )
        for step, (fresh, old) in enumerate(dealt, start=1):
            check()
            phases.tell("training", step - 1, job.steps)
            self._give_way(time.monotonic() - pace - self._waited_s, check)
            self._waited_s = 0.0
            self._cool(step)
            begun = time.monotonic()
            chosen = fresh + [num_new + i for i in old if i < num_pool]
            held = [material.anchors[i - num_pool] for i in old if i >= num_pool]
            result = self._step(material, chosen, held, check)
            self._give_back()
            if self._bounds is None and result.wrote:
                self._bounds = Bounds.after(job.objective, result.losses, result.grad_norm)
            rate = result.num_tokens / max(time.monotonic() - begun, 1e-9)
            loss, pace = result.loss, begun
            metric = StepMetric(
                step=step,
                loss=loss,
                tokens_per_s=rate,
                grad_norm=result.grad_norm,
                drift=result.drift,
                kl=self._moved_by(step),
            )
            report(
                metric.model_dump(exclude={k for k in ("drift", "kl") if getattr(metric, k) in (None, {})})
            )
            if step % job.look_every == 0 or step == job.steps:
                own = [m for m in result.margins[: len(fresh)] if m is not None]
                reason = self._look(step, report, phases, own)
                if reason:
                    return step, loss, reason
            known.update(zip(fresh, result.losses, strict=False))
            learned = len(known) == num_new and max(known.values()) < job.learned_loss
            if learned and not material.anchors:  # with anchors, what remains heals what the first steps did
                return step, loss, "learned"  # none has a gradient left: more steps would only disturb
        return step, loss, "max_steps"

    def _moved_by(self, step: int) -> dict[KlSet, float]:
        """KL(before || now) on a few prompts of each set: at 1, 2, 3, 4, 6, 8, 12, ... steps, else empty."""
        power = 1 << (step.bit_length() - 1)
        if step not in (power, power * 3 // 2):
            return {}
        return {on: drift_of(self.model, anchors) for on, anchors in self._watched.items()}

    def _give_way(self, worked_s: float, check: Check) -> None:
        """Pause after a step of `worked_s` seconds, while requests are being answered, for the rest of the time."""
        until = time.monotonic() + worked_s * (1 / self._share - 1)
        while self.arena.load and time.monotonic() < until:
            time.sleep(min(PAUSE_S, max(0.0, until - time.monotonic())))
            check()

    def _give_back(self) -> None:
        """What the step has freed, unless that was done a moment ago: pages come back at a price."""
        if time.monotonic() - self._gave_back >= GIVE_BACK_S:
            give_back()
            self._gave_back = time.monotonic()

    def _cool(self, step: int) -> None:
        """The learning rate of this step: it falls in a straight line over the last `cooldown` of the steps."""
        last = self.optimizer.settings.cooldown * self.job.steps
        if last > 0:
            self.optimizer.lr = self._lr * min(1.0, (self.job.steps - step + 1) / last)

    def _step(
        self, material: _Material, chosen: list[int], anchors: Sequence[Anchor], check: Check
    ) -> StepResult:
        refs, teachers = material.references, material.teachers
        try:
            return train_step(
                self.model,
                self.optimizer,
                [material.examples[i] for i in chosen],
                self.job.objective,  # pyright: ignore[reportArgumentType]  (checked by the server)
                writing=self.arena.writing,
                references=None if refs is None else [refs[i] for i in chosen],
                teachers=None
                if teachers is None
                else [teachers[i] if i < len(teachers) else None for i in chosen],
                learned_loss=self.job.learned_loss,
                anchors=anchors,
                anchor_weight=self.job.replay_weight,
                recompute=self._on_gpu,  # its memory is what is short
                bounds=self._bounds,
                each=lambda _: check(),
            )
        except (NonFinite, Exploded) as e:
            # named by its place in the batch; the user knows it by its own name
            works = material.works
            message = re.sub(r"example (\d+)", lambda m: works[chosen[int(m[1])]].label or m[0], e.message)
            raise type(e)(message, e.hint) from None

    def _look(self, step: int, report: Report, phases: Phases, own: Sequence[float] = ()) -> str | None:
        """A look at the development probes; why to stop, if there is a reason. `own`: margins of the examples."""
        looks = self.job.development
        compared = [i for i, look in enumerate(looks) if look.wanted]
        spoken = [i for i, look in enumerate(looks) if look.spoken]
        margins: list[float | None] = [None] * len(looks)
        passed = [False] * len(looks)
        if compared:
            each = phases.begin("looking at development probes", len(compared))
            found = look_at(self.model, [looks[i] for i in compared], each)
            for i, seen in zip(compared, found, strict=True):
                margins[i], passed[i] = seen.margin, seen.greedy
        if spoken:
            asked_at = time.monotonic()
            for i, mark in zip(spoken, self._ask(step), strict=True):
                passed[i] = mark
            self._waited_s = time.monotonic() - asked_at if step else 0.0
        metric = self._stopping.metric(step, margins, passed)
        if looks:
            report(metric.model_dump())
        return self._stopping.reason(metric, own)

    # ---------------------------------------------------------------------------- after the last write

    def _after(self, on: str, before: Sequence[Anchor], report: Report, phases: Phases) -> float:
        """KL(before || now) on one set of prompts; reported as a metric, and its mean given back."""
        per_prompt = divergences(self.model, before, phases.begin("measuring the KL", len(before)))
        average = mean(per_prompt)
        num_tokens = sum(anchor.num_tokens for anchor in before)
        metric = {"on": on, "mean": average, "per_prompt": per_prompt, "num_tokens": num_tokens}
        report(KlMetric.model_validate(metric).model_dump())
        return average


def _unasked(step: int) -> list[bool]:
    raise TrainingError(
        f"step {step}: nobody is there who could ask the development probes", "please report it"
    )


def _example(work: wire.TokenExample) -> Example:
    return Example(
        context_ids=work.context,
        continuation_ids=work.continuation,
        rejected_ids=work.rejected,
        weight=work.weight,
    )
