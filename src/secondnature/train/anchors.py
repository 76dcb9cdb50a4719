"""Replay by distribution: the model is held to what it said before the lesson, not to one answer (trainer).

An answer replayed as a target pulls even where nothing has changed, and says nothing of the runners-up: a near tie
flips under it. An anchor keeps every next-token distribution along an answer, taken before the first write, and
costs KL(before || now): no gradient until something drifts, and then exactly against the drift (Li & Hoiem 2016,
arXiv 1606.09282; the direction of the KL is that of Hinton et al. 2015, arXiv 1503.02531).

The context is read with gradients too, all but its first token: the drift of the prompt's own keys and values is
part of what an answer suffers from, and only so can it be pulled back.

Shapes: S tokens of a conversation, T of them the answer, V the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secondnature.errors import NonFinite
from secondnature.records import Example
from secondnature.train.losses import divergence
from secondnature.train.phases import Each, unwatched
from secondnature.train.prefix import continuation_logits, freeze

__all__ = ["HELD", "MAX_BYTES", "Anchor", "affordable", "divergences", "drifts", "record"]

HELD = 1e-6
"""An anchor whose KL is below this, nats per token, gives no gradient: it is rounding noise, and the optimizer
normalises."""
TOGETHER = 16
"""Anchors read in one forward, at most; of them together, padding included:"""
MAX_TOKENS = 2048
"""What is kept for backward grows with it."""
MAX_LOGITS = 2**24
"""The KL keeps several numbers for each (64 MB in fp32)."""
MAX_BYTES = 256 * 2**20
"""Of all recorded distributions together."""


@dataclass(frozen=True)
class Anchor:
    """One conversation and what followed each of its positions before the lesson."""

    ids: tuple[int, ...]
    """S tokens: context and answer."""
    logps_TV: Tensor
    """Log-probabilities of the answer's tokens and of all others in their places, fp32."""


def affordable(examples: Sequence[Example], vocab_size: int, limit_bytes: int = MAX_BYTES) -> int:
    """How many of the examples, from the first, can be recorded within the limit."""
    total = 0
    for count, example in enumerate(examples):
        total += 4 * vocab_size * len(example.continuation_ids)
        if total > limit_bytes:
            return count
    return len(examples)


@torch.no_grad()
def record(model: nn.Module, examples: Sequence[Example], each: Each = unwatched) -> list[Anchor]:
    """The anchors of these examples under the weights as they are; before the first write of a lesson."""
    anchors: list[Anchor] = []
    for example in examples:
        each(len(anchors))
        ids = (*example.context_ids, *example.continuation_ids)
        last = [len(example.continuation_ids)]
        (answer,) = continuation_logits(model, freeze(model, ids[:1]), [ids[1:]], last=last)
        anchors.append(Anchor(ids, torch.log_softmax(answer.float(), dim=-1)))
    return anchors


def drifts(model: nn.Module, anchors: Sequence[Anchor]) -> Iterator[list[Tensor]]:
    """KL(before || now) per anchor, mean over its answer, nats per token; some at a time, with gradients.

    Anchors that begin with the same token (chats do) share a forward. To be used up in order: `backward` on one
    list frees its memory before the next is computed.
    """
    begins: dict[int, list[Anchor]] = {}
    for anchor in sorted(anchors, key=lambda a: len(a.ids)):
        begins.setdefault(anchor.ids[0], []).append(anchor)
    for first, group in begins.items():
        prefix = freeze(model, [first])
        for here in _together(group):
            last = [len(a.logps_TV) for a in here]
            logits = continuation_logits(model, prefix, [a.ids[1:] for a in here], last=last)
            yield [
                divergence(anchor.logps_TV, logits_TV) for anchor, logits_TV in zip(here, logits, strict=True)
            ]


def _together(group: Sequence[Anchor]) -> list[list[Anchor]]:
    """Anchors in ascending length, spread over forwards that keep to the caps; one in each at least."""
    found: list[list[Anchor]] = []
    num_logits = 0
    for anchor in group:
        num_logits += anchor.logps_TV.numel()
        rows = len(found[-1]) + 1 if found else 0
        if not 0 < rows <= TOGETHER or rows * len(anchor.ids) > MAX_TOKENS or num_logits > MAX_LOGITS:
            found.append([])
            num_logits = anchor.logps_TV.numel()
        found[-1].append(anchor)
    return found


@torch.no_grad()
def divergences(model: nn.Module, anchors: Sequence[Anchor], each: Each = unwatched) -> list[float]:
    """KL(before || now) of each anchor, in order, nats per token; exactly 0 while nothing was written.

    One at a time, as they were recorded.

    Raises:
        NonFinite: a divergence is NaN or infinite: the weights are broken.
    """
    found: list[float] = []
    for anchor in anchors:
        each(len(found))
        prefix = freeze(model, anchor.ids[:1])
        last = [len(anchor.logps_TV)]
        (logits_TV,) = continuation_logits(model, prefix, [anchor.ids[1:]], last=last)
        value = float(divergence(anchor.logps_TV, logits_TV))
        if not math.isfinite(value):
            raise NonFinite(f"KL(before || now) of an answer is {value}", "lower the learning rate")
        found.append(max(0.0, value))
    return found
