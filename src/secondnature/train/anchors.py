"""Replay by distribution: the model is held to what it said before the lesson, not to one answer (trainer).

An answer replayed as a target pulls even where nothing has changed, and says nothing of the runners-up: a near tie
flips under it. An anchor keeps the next-token distributions along an answer, taken before the first write: of each
the likeliest tokens, and what mass all others have together. It costs KL(before || now): no gradient until
something drifts, and then exactly against the drift (Li & Hoiem 2016, arXiv 1606.09282; the direction of the KL is
that of Hinton et al. 2015, arXiv 1503.02531).

The context is read with gradients too, all but its first token: the drift of the prompt's own keys and values is
part of what an answer suffers from, and only so can it be pulled back.

Shapes: S tokens of a conversation, T of them the answer, K tokens kept of each distribution, V the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secondnature.errors import NonFinite
from secondnature.records import Example
from secondnature.train.guard import vocab_size
from secondnature.train.losses import divergence
from secondnature.train.memory import room
from secondnature.train.phases import Each, unwatched
from secondnature.train.prefix import (
    continuation_likeliest,
    continuation_logits,
    continuation_picked,
    freeze,
)

__all__ = [
    "HELD",
    "KEPT_TOKENS",
    "MAX_BYTES",
    "Anchor",
    "affordable",
    "distributions",
    "divergences",
    "drift_of",
    "drifts",
    "record",
]

HELD = 1e-6
"""An anchor whose KL is below this, nats per token, gives no gradient: it is rounding noise, and the optimizer
normalises."""
KEPT_TOKENS = 1024
"""Of a distribution; `divergence` says what is left out. Along answers that SmolLM2 had not written itself all
other tokens had 0.5 % of the mass together (mean over 166 positions; 2.5 % at most)."""
TOGETHER = 16
"""Anchors read in one forward, at most; of them together, padding included, as many as `room` gives tokens."""
MAX_BYTES = 256 * 2**20
"""Of all recorded distributions together."""


@dataclass(frozen=True)
class Anchor:
    """One conversation and what followed each of its positions before the lesson."""

    ids: tuple[int, ...]
    """S tokens: context and answer."""
    tokens_TK: Tensor
    """The likeliest tokens at each of the answer's positions, by ascending id (int32)."""
    logps_TK: Tensor
    """Their log-probabilities, fp32."""

    @property
    def num_tokens(self) -> int:
        """Of the answer: T."""
        return len(self.tokens_TK)


def affordable(examples: Sequence[Example], num_kept: int, limit_bytes: int = MAX_BYTES) -> int:
    """How many of the examples, from the first, can be recorded within the limit, at so many numbers a token."""
    total = 0
    for count, example in enumerate(examples):
        total += 4 * num_kept * len(example.continuation_ids)
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
        prefix, last = freeze(model, ids[:1]), len(example.continuation_ids)
        tokens = continuation_likeliest(model, prefix, ids[1:], last, KEPT_TOKENS)
        (logps,) = continuation_picked(model, prefix, [ids[1:]], [tokens])
        anchors.append(Anchor(ids, tokens.to(torch.int32), logps))
    return anchors


@torch.no_grad()
def distributions(model: nn.Module, examples: Sequence[Example], each: Each = unwatched) -> list[Tensor]:
    """Per example all log-probabilities (T, V) along its answer, fp32: what a teacher of SDFT says."""
    found: list[Tensor] = []
    for example in examples:
        each(len(found))
        ids = (*example.context_ids, *example.continuation_ids)
        last = [len(example.continuation_ids)]
        (answer,) = continuation_logits(model, freeze(model, ids[:1]), [ids[1:]], last=last)
        found.append(torch.log_softmax(answer.float(), dim=-1))
    return found


def drifts(model: nn.Module, anchors: Sequence[Anchor]) -> Iterator[list[Tensor]]:
    """KL(before || now) per anchor, mean over its answer, nats per token; some at a time, with gradients.

    Anchors that begin with the same token (chats do) share a forward. To be used up in order: `backward` on one
    list frees its memory before the next is computed.
    """
    begins: dict[int, list[Anchor]] = {}
    for anchor in sorted(anchors, key=lambda a: len(a.ids)):
        begins.setdefault(anchor.ids[0], []).append(anchor)
    whole, max_tokens = vocab_size(model) <= KEPT_TOKENS, room(model)
    for first, group in begins.items():
        prefix = freeze(model, [first])
        for here in _together(group, max_tokens):
            now = continuation_picked(model, prefix, [a.ids[1:] for a in here], [a.tokens_TK for a in here])
            yield [divergence(a.logps_TK, n, whole=whole) for a, n in zip(here, now, strict=True)]


def _together(group: Sequence[Anchor], max_tokens: int) -> list[list[Anchor]]:
    """Anchors in ascending length, spread over forwards that keep to the caps; one in each at least."""
    found: list[list[Anchor]] = []
    for anchor in group:
        rows = len(found[-1]) + 1 if found else 0
        if not 0 < rows <= TOGETHER or rows * len(anchor.ids) > max_tokens:
            found.append([])
        found[-1].append(anchor)
    return found


@torch.no_grad()
def drift_of(model: nn.Module, anchors: Sequence[Anchor]) -> float:
    """Mean of KL(before || now) over some anchors, nats per token, several in a forward: cheap, for a curve.

    Raises:
        NonFinite: it is NaN or infinite: the weights are broken.
    """
    found = [float(x) for group in drifts(model, anchors) for x in group]
    value = sum(found) / len(found)
    if not math.isfinite(value):
        raise NonFinite(f"KL(before || now) is {value}", "lower the learning rate")
    return max(0.0, value)


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
        (now,) = continuation_picked(model, prefix, [anchor.ids[1:]], [anchor.tokens_TK])
        value = float(divergence(anchor.logps_TK, now, whole=vocab_size(model) <= KEPT_TOKENS))
        if not math.isfinite(value):
            raise NonFinite(f"KL(before || now) of an answer is {value}", "lower the learning rate")
        found.append(max(0.0, value))
    return found
