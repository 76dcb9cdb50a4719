"""Looks at the development probes in a lesson: the margin of each, and whether its answer is greedy (trainer).

Both answers of a probe are read in one pass over its context, which is read once, and the head answers in slices of
the vocabulary: what is in memory does not grow with probes times vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from secondnature import wire
from secondnature.model.head import find_head
from secondnature.train.forest import MAX_TOKENS, forwards
from secondnature.train.guard import vocab_size
from secondnature.train.phases import Each, unwatched
from secondnature.train.prefix import continuation_ranks

__all__ = ["Seen", "look_at"]

MAX_WHOLE_LOGITS = 2**24
"""In one forward of a model whose head cannot be taken off (64 MB in fp32)."""


@dataclass(frozen=True)
class Seen:
    """What a look saw of one development probe."""

    margin: float
    """log p(wanted) - log p(unwanted), nats over the whole answers."""
    greedy: bool
    """Every token of the wanted answer is the likeliest one: it is the greedy answer."""


@torch.no_grad()
def look_at(model: nn.Module, looks: Sequence[wire.DevelopmentProbe], each: Each = unwatched) -> list[Seen]:
    """The margin and the greedy answer of each development probe, in order, from one teacher-forced reading."""
    contexts = [look.context for look in looks]
    answers = [[look.wanted, look.unwanted] for look in looks]
    max_tokens = MAX_TOKENS
    if looks and find_head(model) is None:
        max_tokens = min(max_tokens, max(1, MAX_WHOLE_LOGITS // vocab_size(model)))
    found: dict[int, Seen] = {}
    for prefix, chosen in forwards(model, contexts, answers, max_tokens=max_tokens):
        ranks = iter(continuation_ranks(model, prefix, [a for i in chosen for a in answers[i]]))
        for i in chosen:
            (wanted, likeliest), (unwanted, _) = next(ranks), next(ranks)
            found[i] = Seen(float(wanted.sum()) - float(unwanted.sum()), bool(likeliest.all()))
        del prefix
        each(len(found))
    return [found[i] for i in range(len(looks))]
