"""The trainer's process: maps the engine's weights, takes one job at a time over ZMQ, writes in place (trainer).

    python -m secondnature.train.worker ipc://PRIVATE/trainer.sock PARENT_PID

It has no truth of its own: weights live in the arena, optimizer states in files of the home. A job that fails or is
cancelled just ends; making the weights whole again is the engine's side's business, since this process may be dead
by then. It ends when its parent does.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import zmq
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import nn

from secondnature import storage, wire
from secondnature.errors import (
    BadCheckpoint,
    BadInput,
    Cancelled,
    Exploded,
    NonFinite,
    SecondnatureError,
    TrainingError,
)
from secondnature.model import names
from secondnature.model.load import build
from secondnature.records import Example, KlMetric, LookMetric, OptimizerSettings, StepMetric
from secondnature.train.anchors import MAX_BYTES, Anchor, affordable, divergences, record
from secondnature.train.apollo import Apollo
from secondnature.train.batches import batches
from secondnature.train.guard import Bounds, vocab_size
from secondnature.train.losses import Reference
from secondnature.train.prefix import self_test
from secondnature.train.step import StepResult, references, train_step
from secondnature.weights.arena import Arena

LOG = logging.getLogger("secondnature.trainer")
NICE = 5
"""The trainer gives way to the engine where they share a core."""
POLL_MS = 500
PAUSE_S = 0.05
"""How often a pausing trainer looks whether the requests are answered."""
LOOK_BATCH = 16
"""Sequences scored at once when looking: bounds the memory of their logits."""
MAX_KL_TOKENS = 64
"""Positions of an answer at which the lesson's KL is measured, from its first token on."""


def _example(work: wire.Work) -> Example:
    return Example(
        context_ids=work.context,
        continuation_ids=work.continuation,
        rejected_ids=work.rejected,
        weight=work.weight,
    )


def _model(directory: Path, arena: Arena, layout: wire.Layout) -> nn.Module:
    """The model of `directory` around the arena's memory, whosever names it has there.

    Raises:
        UnsupportedModel, BadCheckpoint: the arena does not hold that model.
    """
    tensors = arena.tensors
    if layout == "vllm":
        headers = {name: names.Header.of(tensor) for name, tensor in tensors.items()}
        tensors = names.views(names.plan(directory, headers), tensors)
    return build(directory, tensors)


def load_optimizer(optimizer: Apollo, path: Path) -> None:
    """Continue from a state on disk. Raises BadCheckpoint: damaged, or of another model or rank."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            optimizer.load_state(tensors, file.metadata() or {})
    except (OSError, SafetensorError) as e:
        raise BadCheckpoint(f"{path}: {e}", "restore the lesson's directory from a backup") from None


def save_optimizer(optimizer: Apollo, path: Path) -> None:
    """Write the state, durably. Raises StorageError."""
    tensors, metadata = optimizer.state_dict()
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    storage.write_bytes(path, to_safetensors(whole, metadata=metadata))


@torch.no_grad()
def next_token_logps(model: nn.Module, works: Sequence[wire.Work]) -> list[torch.Tensor]:
    """Log-probabilities of every next token along each continuation: per example (T, V), fp32.

    Right-padded batches of similar length: nothing reads what comes after its own end, in attention or recurrence.
    """
    found: dict[int, torch.Tensor] = {}
    order = sorted(range(len(works)), key=lambda i: len(works[i].context) + len(works[i].continuation))
    for start in range(0, len(order), LOOK_BATCH):
        chosen = order[start : start + LOOK_BATCH]
        rows = [works[i].context + works[i].continuation for i in chosen]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for k, row in enumerate(rows):
            ids[k, : len(row)] = torch.tensor(row)
        logits = model(input_ids=ids, use_cache=False).logits
        for k, i in enumerate(chosen):
            context = len(works[i].context)
            here = logits[k, context - 1 : len(rows[k]) - 1]
            found[i] = torch.log_softmax(here.float(), dim=-1)
    return [found[i] for i in range(len(works))]


@dataclass(frozen=True)
class Seen:
    """What a look saw of one development probe."""

    margin: float
    """log p(wanted) - log p(unwanted), nats over the whole answers."""
    greedy: bool
    """Every token of the wanted answer is the likeliest one: it is the greedy answer."""


def look_at(model: nn.Module, looks: Sequence[wire.Look]) -> list[Seen]:
    """The margin and the greedy answer of each development probe, from one teacher-forced reading."""
    works = [wire.Work(look.context, answer) for look in looks for answer in (look.wanted, look.unwanted)]
    totals: list[float] = []
    greedy: list[bool] = []
    for work, logps in zip(works, next_token_logps(model, works), strict=True):
        tokens = torch.tensor(work.continuation)
        totals.append(float(logps.gather(1, tokens.unsqueeze(1)).sum()))
        greedy.append(bool((logps.argmax(dim=1) == tokens).all()))
    return [Seen(totals[2 * i] - totals[2 * i + 1], greedy[2 * i]) for i in range(len(looks))]


class Lesson:
    """One job, from its message to its last write."""

    def __init__(self, model: nn.Module, arena: Arena, job: wire.Train, share: float = 1.0) -> None:
        self.model = model
        self._share = share
        self._bounds: Bounds | None = None
        self.arena = arena
        self.job = job
        try:
            settings = OptimizerSettings.model_validate(job.optimizer)
        except ValidationError as e:
            raise BadInput(f"optimizer settings: {e}", "server and trainer differ in version?") from None
        self.optimizer = Apollo(model, settings, seed=job.seed)
        self._lr = self.optimizer.lr
        if job.optimizer_in is not None:
            load_optimizer(self.optimizer, Path(job.optimizer_in))

    def run(self, report: Callable[[dict[str, object]], None], check: Callable[[], None]) -> wire.Done:
        """All steps. `report` sends a metric; `check` raises Cancelled when somebody asked for it."""
        job = self.job
        kl = {on: self._before(found) for on, found in job.kl.items()}
        anchors = self._recorded([w for w in job.replay if w.hold], "replay examples")
        pool = [w for w in job.replay if not w.hold]
        new = job.examples
        teachers = self._teachers()
        if teachers is not None:
            new = new[: len(teachers)]
        works = new + pool
        examples = [_example(w) for w in works]
        refs: list[Reference | None] | None = None
        if job.objective in ("dpo", "dpop"):
            refs = references(self.model, examples)
        self._look(0, report)
        stopped_by, step, loss, pace = "max_steps", 0, math.nan, time.monotonic()
        dealt = batches(
            len(new),
            len(pool) + len(anchors),
            batch_size=job.batch_size,
            steps=job.steps,
            share=job.replay_share,
            seed=job.seed,
        )
        for step, (fresh, old) in enumerate(dealt, start=1):
            check()
            self._give_way(time.monotonic() - pace, check)
            self._cool(step)
            begun = time.monotonic()
            chosen = fresh + [len(new) + i for i in old if i < len(pool)]
            held = [anchors[i - len(pool)] for i in old if i >= len(pool)]
            result = self._step(chosen, examples, works, refs, teachers, held)
            if self._bounds is None and result.wrote:
                self._bounds = Bounds.after(self.job.objective, result.losses, result.grad_norm)
            now = time.monotonic()
            loss = result.loss
            rate = result.num_tokens / max(now - begun, 1e-9)
            pace = begun
            metric = StepMetric(
                step=step, loss=loss, tokens_per_s=rate, grad_norm=result.grad_norm, drift=result.drift
            )
            report(metric.model_dump(exclude={"drift"} if result.drift is None else None))
            if step % job.look_every == 0 or step == job.steps:
                reason = self._look(step, report, [m for m in result.margins[: len(fresh)] if m is not None])
                if reason:
                    stopped_by = reason
                    break
            learned = len(fresh) == len(new) and max(result.losses[: len(fresh)]) < job.learned_loss
            if learned and not anchors:  # with anchors, the steps that remain heal what the first ones did
                stopped_by = "learned"  # none of them has a gradient left: more steps would only disturb
                break
        check()
        means = {on: self._after(on, before, report) for on, before in kl.items() if before}
        save_optimizer(self.optimizer, Path(job.optimizer_out))
        moved = [m.model_dump() for m in self.optimizer.moved()]
        return wire.Done(job.job, step, loss, means, moved, stopped_by)

    def _recorded(self, works: Sequence[wire.Work], what: str) -> list[Anchor]:
        """The distributions along these continuations before the first write: as many as fit in memory."""
        examples = [_example(w) for w in works]
        count = affordable(examples, vocab_size(self.model))
        if count < len(examples):
            LOG.warning(
                "lesson %s: the first %d of %d %s fit in memory", self.job.lesson, count, len(works), what
            )
        return record(self.model, examples[:count])

    def _teachers(self) -> list[torch.Tensor] | None:
        """SDFT: what the model says along each example's answer with the correction in its context."""
        if self.job.objective != "sdft":
            return None
        read = [wire.Work(w.teacher or w.context, w.continuation) for w in self.job.examples]
        found = [anchor.logps_TV for anchor in self._recorded(read, "sampled answers")]
        if not found:
            longest = max(len(w.continuation) for w in read)
            raise TrainingError(
                f"the distributions along one answer of {longest} tokens do not fit in {MAX_BYTES:,} bytes",
                "`sdft` keeps one number per token and entry of the vocabulary: write the answers, and use `sft`",
            )
        return found

    def _before(self, works: Sequence[wire.Work]) -> list[Anchor]:
        """The distributions that the KL of the lesson is measured against: the first positions of each answer."""
        examples = [
            _example(wire.Work(w.context, w.continuation[:MAX_KL_TOKENS])) for w in works if w.continuation
        ]
        return record(self.model, examples[: affordable(examples, vocab_size(self.model), MAX_BYTES // 2)])

    def _after(self, on: str, before: Sequence[Anchor], report: Callable[[dict[str, object]], None]) -> float:
        """KL(before || now) on one set of prompts; reported as a metric, and its mean given back."""
        per_prompt = divergences(self.model, before)
        mean = _mean(per_prompt)
        num_tokens = sum(len(anchor.logps_TV) for anchor in before)
        metric = {"on": on, "mean": mean, "per_prompt": per_prompt, "num_tokens": num_tokens}
        report(KlMetric.model_validate(metric).model_dump())
        return mean

    def _give_way(self, worked_s: float, check: Callable[[], None]) -> None:
        """Pause after a step of `worked_s` seconds, while requests are being answered, for the rest of the time."""
        until = time.monotonic() + worked_s * (1 / self._share - 1)
        while self.arena.load and time.monotonic() < until:
            time.sleep(min(PAUSE_S, max(0.0, until - time.monotonic())))
            check()

    def _cool(self, step: int) -> None:
        """The learning rate of this step: it falls in a straight line over the last `cooldown` of the steps."""
        last = self.optimizer.settings.cooldown * self.job.steps
        if last > 0:
            self.optimizer.lr = self._lr * min(1.0, (self.job.steps - step + 1) / last)

    def _step(
        self,
        chosen: list[int],
        examples: list[Example],
        works: list[wire.Work],
        refs: list[Reference | None] | None,
        teachers: list[torch.Tensor] | None,
        anchors: Sequence[Anchor],
    ) -> StepResult:
        try:
            return train_step(
                self.model,
                self.optimizer,
                [examples[i] for i in chosen],
                self.job.objective,  # pyright: ignore[reportArgumentType]  (checked by the server)
                writing=self.arena.writing,
                references=None if refs is None else [refs[i] for i in chosen],
                teachers=None
                if teachers is None
                else [teachers[i] if i < len(teachers) else None for i in chosen],
                learned_loss=self.job.learned_loss,
                anchors=anchors,
                anchor_weight=self.job.replay_weight,
                bounds=self._bounds,
            )
        except (NonFinite, Exploded) as e:
            # named by its place in the batch; the user knows it by its own name
            message = re.sub(r"example (\d+)", lambda m: works[chosen[int(m[1])]].label or m[0], e.message)
            raise type(e)(message, e.hint) from None

    def _look(
        self, step: int, report: Callable[[dict[str, object]], None], own: list[float] | None = None
    ) -> str | None:
        """Margins of the development probes; why to stop, if there is a reason to."""
        job = self.job
        margins: dict[str, list[float]] = {}
        greedy: dict[str, list[bool]] = {}
        for look, seen in zip(job.development, look_at(self.model, job.development), strict=True):
            margins.setdefault(look.side, []).append(seen.margin)
            greedy.setdefault(look.side, []).append(seen.greedy)
        passed = {side: _mean(found) for side, found in greedy.items()}
        if margins:
            if not all(math.isfinite(m) for found in margins.values() for m in found):
                raise NonFinite(
                    f"a development margin is not finite after step {step}", "lower the learning rate"
                )
            report(
                LookMetric.model_validate({"step": step, "margins": margins, "passed": passed}).model_dump()
            )
        other = _mean(margins.get("other", []))
        if step == 0:
            self._other_at_start = other
            return None
        right = margins.get("right") or own or []
        reasons: list[str] = []
        if job.until_margin is not None:
            if not right or _mean(right) < job.until_margin:
                return self._gave_way(other)
            reasons.append("until_margin")
        if job.until_passed is not None:
            if passed.get("right", 0.0) < job.until_passed:
                return self._gave_way(other)
            reasons.append("until_passed")
        return " and ".join(reasons) or self._gave_way(other)

    def _gave_way(self, other: float) -> str | None:
        """The other side of the behaviour led at first and no longer does: more steps would do harm."""
        return "the other side gave way" if self._other_at_start > 0 > other else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


class Worker:
    """The loop around the socket."""

    def __init__(self, socket: zmq.Socket[bytes], parent: int) -> None:
        self._socket = socket
        self._parent = parent
        self._model: nn.Module | None = None
        self._arena: Arena | None = None
        self._share = 1.0
        self._ended = False

    def serve(self) -> None:
        """Take messages until told to end, or until the parent is gone."""
        while not self._ended:
            message = self._next(POLL_MS)
            if isinstance(message, wire.Attach):
                self._attach(message)
            elif isinstance(message, wire.Train):
                self._train(message)
            elif isinstance(message, wire.Shutdown):
                self._ended = True

    def _next(self, wait_ms: int) -> wire.ToTrainer | None:
        if os.getppid() != self._parent:
            self._ended = True
            raise SystemExit(0)
        return wire.decode_for_trainer(self._socket.recv()) if self._socket.poll(wait_ms) else None

    def _send(self, message: wire.ToServer) -> None:
        self._socket.send(wire.encode(message))

    def _attach(self, message: wire.Attach) -> None:
        torch.set_num_threads(message.threads)
        self._share = message.share
        try:
            self._arena = Arena.attach(message.manifest)
            self._model = _model(Path(message.model_dir), self._arena, message.layout)
            self_test(self._model)
        except SecondnatureError as e:
            self._send(wire.Failed("", e.to_wire()))
            return
        self._send(wire.Ready(os.getpid(), len(self._arena.tensors)))

    def _train(self, job: wire.Train) -> None:
        """One job; whatever becomes of it, the process lives on."""

        def check() -> None:
            message = self._next(0)
            if isinstance(message, wire.Cancel) and message.job == job.job:
                raise Cancelled("cancelled")
            if isinstance(message, wire.Shutdown):
                self._ended = True
                raise Cancelled("the server is shutting down")

        try:
            if self._model is None or self._arena is None:
                raise TrainingError("no weights are mapped", "restart the server")
            lesson = Lesson(self._model, self._arena, job, self._share)
            answer: wire.ToServer = lesson.run(lambda m: self._send(wire.Progress(job.job, m)), check)
        except SecondnatureError as e:
            answer = wire.Failed(job.job, e.to_wire())
        except (RuntimeError, ValueError, MemoryError, ArithmeticError, LookupError, TypeError) as e:
            LOG.exception("job %s", job.job)
            failure = TrainingError(f"{type(e).__name__}: {e}"[:2000], "please report it, with trainer.log")
            answer = wire.Failed(job.job, failure.to_wire())
        self._send(answer)


def main(endpoint: str, parent: int) -> None:
    """Connect and serve."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    transformers.logging.set_verbosity_error()  # it warns of kernels that no CPU has
    with contextlib.suppress(OSError):
        os.nice(NICE)
    socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(endpoint)
    try:
        Worker(socket, parent).serve()
    finally:
        socket.close()
        if os.getppid() != parent:  # nobody else is left to clean up
            path = Path(endpoint.removeprefix("ipc://"))
            with contextlib.suppress(OSError):
                path.unlink()
                path.parent.rmdir()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
