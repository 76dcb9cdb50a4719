"""What must hold before a step may write (trainer).

Examples are checked before anything is computed; losses, gradients and updates before anything is written. A step
that fails here has changed neither weights nor moments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secondnature.errors import BadExample, ContextOverflow, NonFinite
from secondnature.model.gradients import Gradient
from secondnature.model.load import context_limit
from secondnature.records import Example
from secondnature.train.losses import Objective

__all__ = ["check_examples", "check_loss", "check_norms", "check_tensors", "limit_norm_", "vocab_size"]

HINT = "lower the learning rate, or drop the example"


def vocab_size(model: nn.Module) -> int:
    """How many token ids the model knows."""
    config: Any = model.config
    return config.get_text_config(decoder=True).vocab_size


def check_examples(model: nn.Module, examples: Sequence[Example], objective: Objective) -> None:
    """Every example fits the model: ids inside the vocabulary, length inside the context.

    Raises:
        BadExample: an id outside the vocabulary, or no rejected answer for an objective that compares.
        ContextOverflow: context and continuation are longer than the model can read.
    """
    known = vocab_size(model)
    config: Any = model.config
    limit = context_limit(config)
    if objective not in ("sft", "sdft") and all(e.rejected_ids is None for e in examples):
        raise BadExample(f"`{objective}` needs rejected_ids; no example has any", "send them, or use sft")
    for i, example in enumerate(examples):
        rejected = example.rejected_ids or []
        highest = max(*example.context_ids, *example.continuation_ids, *rejected)
        if highest >= known:
            raise BadExample(
                f"example {i}: token id {highest}; the vocabulary has {known}", "wrong tokenizer?"
            )
        length = len(example.context_ids) + max(len(example.continuation_ids), len(rejected))
        if length > limit:
            raise ContextOverflow(
                f"example {i}: {length} tokens; the model reads {limit}", "shorten the conversation"
            )


def check_loss(loss: Tensor, example: int) -> None:
    """Raises NonFinite if the loss of an example is NaN or infinite."""
    if not math.isfinite(float(loss.detach())):
        raise NonFinite(
            f"example {example}: the loss is {float(loss.detach())}",
            "the weights or the learning rate are bad",
        )


def check_tensors(tensors: Mapping[str, Gradient], what: str) -> float:
    """The norm over all gradients, if every value is finite.

    Raises:
        NonFinite: names the first tensor that is not, and `what` it is ("example 3: the gradient").
    """
    whole = [t for t in tensors.values() if isinstance(t, Tensor)]
    parts = [float(t.norm()) for t in tensors.values() if not isinstance(t, Tensor)]
    norm = math.hypot(float(torch.nn.utils.get_total_norm(whole)) if whole else 0.0, *parts)
    if not math.isfinite(norm):
        check_norms({name: float(tensor.norm()) for name, tensor in tensors.items()}, what)
        raise NonFinite(f"{what} has no finite norm", HINT)
    return norm


def check_norms(norms: Mapping[str, float], what: str) -> None:
    """Raises NonFinite for the first tensor whose norm is not finite, by name."""
    for name, norm in norms.items():
        if not math.isfinite(norm):
            raise NonFinite(f"{what} of {name} is not finite", HINT)


def limit_norm_(tensors: Mapping[str, Gradient], norm: float, limit: float | None) -> None:
    """Scale the gradients in place so that their common norm is at most `limit`."""
    if limit is not None and norm > limit:
        for tensor in tensors.values():
            tensor.mul_(limit / norm)
