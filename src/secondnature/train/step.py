"""One training step, top to bottom: freeze the contexts, score the answers, sum gradients, check, write (trainer).

Answers to one context, of one example or of several, are scored together on one prefix; contexts that begin alike
are computed once (`forest`), and where all layers are attention answers to different ones share a forward. Results
and errors speak of the batch as it was given.

The weights are the engine's own (law 1): nothing is written before everything was computed and found finite, and
the writes are bracketed by the caller's `writing()`, so that the engine can tell which answers overlapped with
them. The context gets no gradient: exact for a frozen context, a truncation of full training (see `prefix`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secondnature.errors import NonFinite
from secondnature.model.gradients import GradientSink
from secondnature.model.recompute import recomputed
from secondnature.model.upcast import collect
from secondnature.records import Example
from secondnature.train.anchors import HELD, Anchor, drifts
from secondnature.train.apollo import Apollo
from secondnature.train.forest import MAX_BYTES, MAX_TOKENS, forwards, portions
from secondnature.train.guard import (
    Bounds,
    check_examples,
    check_finite,
    check_loss,
    check_tensors,
    limit_norm_,
    vocab_size,
)
from secondnature.train.losses import Objective, Reference, example_loss, sdft, sequence_logprob
from secondnature.train.memory import room
from secondnature.train.phases import Each, unwatched
from secondnature.train.prefix import Prefix, continuation_logits, continuation_logps, freeze
from secondnature.train.readback import floats

__all__ = ["StepResult", "log_probs", "references", "train_step"]

LEARNED_LOSS = 1e-3
"""Examples below this loss are passed over: the optimizer normalises, and would turn their tiny gradients into full
steps."""

MAX_SDFT_LOGITS = 2**26
"""In one forward of SDFT, whose loss needs whole distributions (256 MB in fp32)."""


@dataclass(frozen=True)
class StepResult:
    """What one step saw and did."""

    loss: float
    """Weighted mean over the batch, before the step."""
    losses: tuple[float, ...]
    """Per example."""
    margins: tuple[float | None, ...]
    """Per example log p(chosen) - log p(rejected) before the step, nats over whole answers; None without a pair."""
    num_tokens: int
    """Continuation tokens that were scored, chosen and rejected."""
    grad_norm: float
    """Over all tensors, before `max_grad_norm`."""
    num_learned: int
    """Examples that gave no gradient because they are learned already."""
    wrote: bool
    """False if all examples are learned already: the weights are as before."""
    drift: float | None = None
    """Mean KL(before the lesson || now) of the anchors before the step, nats per token; None without anchors."""


def train_step(
    model: nn.Module,
    optimizer: Apollo,
    batch: Sequence[Example],
    objective: Objective = "sft",
    *,
    writing: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    references: Sequence[Reference | None] | None = None,
    teachers: Sequence[Tensor | None] | None = None,
    max_grad_norm: float | None = None,
    learned_loss: float = LEARNED_LOSS,
    anchors: Sequence[Anchor] = (),
    anchor_weight: float = 1.0,
    max_tokens: int = MAX_TOKENS,
    max_bytes: int = MAX_BYTES,
    recompute: bool = False,
    bounds: Bounds | None = None,
    each: Each = unwatched,
) -> StepResult:
    """One step on a batch: the weighted mean of the examples' losses, its gradient, one write.

    With `anchors` their mean drift, times `anchor_weight`, is added to the loss that the gradient is of.

    Examples without a rejected answer are SFT in every objective, unless they have a teacher. `references`: for
    DPO and DPOP, from `references()` before the first step. `teachers`: for SDFT, per example the log-probabilities
    (T, V) that the teacher gives along its continuation, from before the first step. `learned_loss` 0 switches the
    passing-over off. `max_tokens` of answers go through one forward, `max_bytes` of frozen contexts are kept at a
    time (see `forest`); both bound the memory and leave the result as it is, to rounding. `recompute` keeps the
    layers' inputs instead of all activations, for one more forward of the answers; the result is the same. `each`
    hears after every forward how many examples were read; what it raises ends the step before anything is written.

    Raises:
        BadExample, ContextOverflow: an example does not fit the model.
        NonFinite: a loss, gradient or update is not finite; names the example and the tensor; nothing was written.
        Exploded: a loss or the gradient is beyond `bounds`; nothing was written.
    """
    check_examples(model, batch, objective)
    total_weight = sum(e.weight for e in batch)
    answers = [_answers(e, objective) for e in batch]
    losses = [0.0] * len(batch)
    margins: list[float | None] = [None] * len(batch)
    num_learned = 0
    num_read = 0
    grad_norm = 0.0

    def score(frozen: Mapping[int, Prefix], chosen: Sequence[int]) -> dict[int, Tensor]:
        """The weighted losses of some examples, with gradients; notes what they are. `frozen`: their contexts."""
        distilled = [i for i in chosen if teachers is not None and teachers[i] is not None]
        compared = [i for i in chosen if i not in distilled]
        weighted: dict[int, Tensor] = {}
        found_losses: dict[int, Tensor] = {}
        found_margins: dict[int, Tensor] = {}
        if distilled:
            logits = continuation_logits(
                model, [frozen[i] for i in distilled], [answers[i][0] for i in distilled]
            )
            for i, logits_TV in zip(distilled, logits, strict=True):
                teacher = teachers[i] if teachers is not None else None
                assert teacher is not None, "chosen above"
                found_losses[i] = sdft(teacher, logits_TV)
        found = iter(_logps(model, frozen, answers, compared) if compared else [])
        for i in compared:
            wanted, *others = [next(found) for _ in answers[i]]
            rejected = others[0] if others else None
            found_losses[i] = example_loss(objective, wanted, rejected, references[i] if references else None)
            if rejected is not None:
                found_margins[i] = sequence_logprob(wanted) - sequence_logprob(rejected)
        # all of them are computed before the first is read
        numbers = floats([x.detach() for x in (*found_losses.values(), *found_margins.values())])
        for i, value in zip(found_losses, numbers, strict=False):
            check_loss(value, i)
            losses[i] = value
            if bounds is not None:
                bounds.check_loss(value, i)
            weighted[i] = found_losses[i] * (batch[i].weight / total_weight)
        for i, value in zip(found_margins, numbers[len(found_losses) :], strict=True):
            margins[i] = value
        return weighted

    if not recompute:
        max_tokens = min(max_tokens, room(model))
    if objective == "sdft":
        max_tokens = min(max_tokens, max(1, MAX_SDFT_LOGITS // vocab_size(model)))
    with contextlib.ExitStack() as stack:
        gradients = stack.enter_context(collect(model, factored=optimizer.factored))
        copy_share = 1 / stack.enter_context(recomputed(model)) if recompute else 1.0
        contexts = [e.context_ids for e in batch]
        for prefixes, chosen in forwards(
            model, contexts, answers, max_tokens=max_tokens, max_bytes=max_bytes, copy_share=copy_share
        ):
            frozen = dict(zip(chosen, prefixes, strict=True))
            weighted = score(frozen, chosen)
            taught = [i for i in chosen if losses[i] >= learned_loss]
            num_learned += len(chosen) - len(taught)
            if taught:
                torch.stack([weighted[i] for i in taught]).sum().backward()
                try:
                    check_finite(gradients, f"{_named(taught)}: the gradient")
                except NonFinite:
                    for i in taught if len(taught) > 1 else []:  # whose fault is it? one by one, to say so
                        gradients.clear()
                        score(frozen, [i])[i].backward()
                        check_finite(gradients, f"{_named([i])}: the gradient")
                    raise
            del prefixes, frozen, weighted  # or the next would be computed while they are still in memory
            num_read += len(chosen)
            each(num_read)
        if gradients:
            grad_norm = check_tensors(gradients, f"{_named(range(len(batch)))}: the gradient")
        if bounds is not None:  # of the examples: the anchors' pull is as strong as it is asked to be
            bounds.check_norm(gradients, grad_norm, f"{_named(range(len(batch)))}: the gradient")
        drift = _hold(model, gradients, anchors, anchor_weight, lambda: each(num_read)) if anchors else None
        if anchors and gradients:
            grad_norm = check_tensors(gradients, "the gradient")
        limit_norm_(gradients, grad_norm, max_grad_norm)
    if gradients:
        optimizer.step(gradients, writing=writing, use_up=True)
    return StepResult(
        loss=sum(e.weight * x for e, x in zip(batch, losses, strict=True)) / total_weight,
        losses=tuple(losses),
        margins=tuple(margins),
        num_tokens=sum(len(a) for of_one in answers for a in of_one),
        grad_norm=grad_norm,
        num_learned=num_learned,
        wrote=bool(gradients),
        drift=drift,
    )


def _answers(example: Example, objective: Objective) -> list[list[int]]:
    """The continuations that an example's loss reads: chosen, and rejected if the objective compares."""
    if example.rejected_ids is None or objective in ("sft", "sdft"):
        return [example.continuation_ids]
    return [example.continuation_ids, example.rejected_ids]


def _logps(
    model: nn.Module,
    frozen: Mapping[int, Prefix],
    answers: Sequence[Sequence[Sequence[int]]],
    chosen: Sequence[int],
) -> list[Tensor]:
    """Of all answers of the chosen examples, each on its frozen context, one after the other, in one forward."""
    rows = [frozen[i] for i in chosen for _ in answers[i]]
    return continuation_logps(model, rows, [a for i in chosen for a in answers[i]])


def _named(examples: Sequence[int]) -> str:
    return ", ".join(f"example {i}" for i in examples)


def _hold(
    model: nn.Module,
    gradients: GradientSink,
    anchors: Sequence[Anchor],
    weight: float,
    check: Callable[[], object],
) -> float:
    """Add the gradient of the anchors' drift; returns its mean. Raises NonFinite."""
    total = 0.0
    for found in drifts(model, anchors):
        check()
        for drift in found:
            if not bool(torch.isfinite(drift)):
                raise NonFinite("replay: the drift of an answer is not finite", "lower the learning rate")
            total += max(0.0, float(drift.detach()))
        drifted = [d for d in found if float(d.detach()) >= HELD]
        if drifted:
            (torch.stack(drifted).sum() * (weight / len(anchors))).backward()
            check_finite(gradients, "replay: the gradient")
    return total / len(anchors)


@torch.no_grad()
def log_probs(
    model: nn.Module, context_ids: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[float]:
    """log p(continuation | context) of each continuation, nats over all its tokens; the context is read once.

    Raises:
        BadExample: the context or a continuation is empty.
    """
    prefix = freeze(model, context_ids)
    groups = [[c] for c in continuations]
    totals = [0.0] * len(continuations)
    for chosen in portions(groups, prefix.num_bytes):
        for i, logps in zip(
            chosen, _logps(model, dict.fromkeys(chosen, prefix), groups, chosen), strict=True
        ):
            totals[i] = float(sequence_logprob(logps))
    return totals


@torch.no_grad()
def references(
    model: nn.Module, examples: Sequence[Example], each: Each = unwatched
) -> list[Reference | None]:
    """What DPO and DPOP compare with: taken once, before the first write (the weights change in place)."""
    pairs = [i for i, e in enumerate(examples) if e.rejected_ids is not None]
    contexts = [examples[i].context_ids for i in pairs]
    answers = [_answers(examples[i], "dpo") for i in pairs]
    found: list[Reference | None] = [None] * len(examples)
    for prefixes, chosen in forwards(model, contexts, answers):
        frozen = dict(zip(chosen, prefixes, strict=True))
        totals = [float(sequence_logprob(x)) for x in _logps(model, frozen, answers, chosen)]
        for k, i in enumerate(chosen):
            found[pairs[i]] = Reference(totals[2 * k], totals[2 * k + 1])
        del prefixes, frozen
        each(sum(reference is not None for reference in found))
    return found
