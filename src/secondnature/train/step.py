"""One training step, top to bottom: freeze the context, score the answers, sum gradients, check, write (trainer).

The weights are the engine's own (law 1): nothing is written before everything was computed and found finite, and
the writes are bracketed by the caller's `writing()`, so that the engine can tell which answers overlapped with
them. The context gets no gradient: exact for a frozen context, a truncation of full training (see `prefix`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from secondnature.errors import NonFinite
from secondnature.model.upcast import GradientSink, collect
from secondnature.records import Example
from secondnature.train.anchors import HELD, Anchor, drifts
from secondnature.train.apollo import Apollo
from secondnature.train.guard import check_examples, check_loss, check_tensors, limit_norm_
from secondnature.train.losses import Objective, Reference, example_loss, sequence_logprob
from secondnature.train.prefix import continuation_logps, freeze

__all__ = ["StepResult", "log_probs", "references", "train_step"]

LEARNED_LOSS = 1e-3
"""Examples below this loss are passed over: the optimizer normalises, and would turn their tiny gradients into full
steps."""


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
    max_grad_norm: float | None = None,
    learned_loss: float = LEARNED_LOSS,
    anchors: Sequence[Anchor] = (),
    anchor_weight: float = 1.0,
) -> StepResult:
    """One step on a batch: the weighted mean of the examples' losses, its gradient, one write.

    With `anchors` their mean drift, times `anchor_weight`, is added to the loss that the gradient is of.

    Examples without a rejected answer are SFT in every objective. `references`: for DPO and DPOP, from
    `references()` before the first step. `learned_loss` 0 switches the passing-over off.

    Raises:
        BadExample, ContextOverflow: an example does not fit the model.
        NonFinite: a loss, gradient or update is not finite; names the example and the tensor; nothing was written.
    """
    check_examples(model, batch, objective)
    total_weight = sum(e.weight for e in batch)
    losses: list[float] = []
    margins: list[float | None] = []
    num_tokens = num_learned = 0
    grad_norm = 0.0
    with collect(model) as gradients:
        for i, example in enumerate(batch):
            answers = [example.continuation_ids]
            if example.rejected_ids is not None and objective != "sft":
                answers.append(example.rejected_ids)
            prefix = freeze(model, example.context_ids)
            chosen, *others = continuation_logps(model, prefix, answers)
            rejected = others[0] if others else None
            loss = example_loss(objective, chosen, rejected, references[i] if references else None)
            check_loss(loss, i)
            losses.append(float(loss.detach()))
            margins.append(
                None
                if rejected is None
                else float((sequence_logprob(chosen) - sequence_logprob(rejected)).detach())
            )
            num_tokens += sum(len(a) for a in answers)
            if losses[-1] < learned_loss:
                num_learned += 1
                continue
            (loss * (example.weight / total_weight)).backward()
            grad_norm = check_tensors(gradients, f"example {i}: the gradient")
        drift = _hold(model, gradients, anchors, anchor_weight) if anchors else None
        if anchors and gradients:
            grad_norm = check_tensors(gradients, "the gradient")
        limit_norm_(gradients, grad_norm, max_grad_norm)
    if gradients:
        optimizer.step(gradients, writing=writing)
    return StepResult(
        loss=sum(e.weight * x for e, x in zip(batch, losses, strict=True)) / total_weight,
        losses=tuple(losses),
        margins=tuple(margins),
        num_tokens=num_tokens,
        grad_norm=grad_norm,
        num_learned=num_learned,
        wrote=bool(gradients),
        drift=drift,
    )


def _hold(model: nn.Module, gradients: GradientSink, anchors: Sequence[Anchor], weight: float) -> float:
    """Add the gradient of the anchors' drift; returns its mean. Raises NonFinite."""
    total = 0.0
    for found in drifts(model, anchors):
        for drift in found:
            if not bool(torch.isfinite(drift)):
                raise NonFinite("replay: the drift of an answer is not finite", "lower the learning rate")
            total += max(0.0, float(drift.detach()))
        drifted = [d for d in found if float(d.detach()) >= HELD]
        if drifted:
            (torch.stack(drifted).sum() * (weight / len(anchors))).backward()
            check_tensors(gradients, "replay: the gradient")
    return total / len(anchors)


@torch.no_grad()
def log_probs(
    model: nn.Module,
    context_ids: Sequence[int],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
) -> list[float]:
    """log p(continuation | context) of each continuation, nats over all its tokens; the context is read once.

    Raises:
        BadExample: the context or a continuation is empty.
    """
    prefix = freeze(model, context_ids)
    totals: list[float] = []
    for start in range(0, len(continuations), batch_size):
        for logps in continuation_logps(model, prefix, continuations[start : start + batch_size]):
            totals.append(float(sequence_logprob(logps)))
    return totals


def references(model: nn.Module, examples: Sequence[Example]) -> list[Reference | None]:
    """What DPO and DPOP compare with: taken once, before the first write (the weights change in place)."""
    found: list[Reference | None] = []
    for example in examples:
        if example.rejected_ids is None:
            found.append(None)
            continue
        answers = [example.continuation_ids, example.rejected_ids]
        found.append(Reference(*log_probs(model, example.context_ids, answers)))
    return found
