"""What must hold before a step may write (trainer).

Examples are checked before anything is computed; losses, gradients and updates before anything is written. A step
that fails here has changed neither weights nor moments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secondnature.errors import BadExample, ContextOverflow, Exploded, NonFinite
from secondnature.model.gradients import Factors, Gradient
from secondnature.model.limits import context_limit
from secondnature.records import Example
from secondnature.train.losses import Objective
from secondnature.train.readback import floats

__all__ = [
    "Bounds",
    "check_examples",
    "check_finite",
    "check_loss",
    "check_norms",
    "check_tensors",
    "limit_norm_",
    "vocab_size",
]

HINT = "lower the learning rate, or drop the example"
LOSS_RISE = 20.0
"""Nats per token above the lesson's first losses: worse by far than to guess among 250,000."""
NORM_GROWTH = 1000.0
"""Times the lesson's first gradient, or times 1 if that is smaller: the first examples may be learned already."""


@dataclass(frozen=True)
class Bounds:
    """How far a lesson may go; from its first step."""

    loss: float
    """Of an example."""
    norm: float
    """Of all gradients."""

    @classmethod
    def after(cls, objective: str, losses: Sequence[float], norm: float) -> Bounds:
        """What later steps must keep to, from the first step's losses and gradient norm.

        The losses of DPO and DPOP are no nats per token, and that of SDFT has no such scale: a sure model and a
        sure teacher may differ by any number. They have the norm's bound only.
        """
        highest = max(losses) + LOSS_RISE if objective in ("sft", "orpo") else math.inf
        return cls(highest, NORM_GROWTH * max(norm, 1.0))

    def check_loss(self, loss: float, example: int) -> None:
        """Raises Exploded if the loss of an example is beyond the bound."""
        if loss > self.loss:
            raise Exploded(
                f"example {example}: the loss is {loss:.3g}; expected at most {self.loss:.3g}, {LOSS_RISE:g} above "
                "the lesson's first losses",
                HINT,
            )

    def check_norm(self, tensors: Mapping[str, Gradient], norm: float, what: str) -> None:
        """Raises Exploded if the gradients' common norm is beyond the bound; names the tensor with the largest."""
        if norm > self.norm:
            norms = {name: float(t.norm()) for name, t in tensors.items()}
            worst = max(norms, key=lambda name: norms[name])
            raise Exploded(
                f"{what} has norm {norm:.3g}; expected at most {self.norm:.3g}, {NORM_GROWTH:g} times the lesson's "
                f"first; most of it is in {worst} ({norms[worst]:.3g})",
                HINT,
            )


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


def check_loss(loss: float, example: int) -> None:
    """Raises NonFinite if the loss of an example is NaN or infinite."""
    if not math.isfinite(loss):
        raise NonFinite(
            f"example {example}: the loss is {loss}",
            "the weights or the learning rate are bad",
        )


def check_tensors(tensors: Mapping[str, Gradient], what: str) -> float:
    """The norm over all gradients, if every value is finite.

    Raises:
        NonFinite: names the first tensor that is not, and `what` it is ("example 3: the gradient").
    """
    whole = [t for t in tensors.values() if isinstance(t, Tensor)]
    parts = [t.norm() for t in tensors.values() if not isinstance(t, Tensor)]
    norm = math.hypot(*floats([*([torch.nn.utils.get_total_norm(whole)] if whole else []), *parts]))
    if not math.isfinite(norm):
        check_norms({name: float(tensor.norm()) for name, tensor in tensors.items()}, what)
        raise NonFinite(f"{what} has no finite norm", HINT)
    return norm


def check_finite(tensors: Mapping[str, Gradient], what: str) -> None:
    """As `check_tensors`, without the norm: cheap enough for every forward; reads no factor twice."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Factors):
            good = tensor.finite()
        else:
            values = tensor if isinstance(tensor, Tensor) else tensor.values
            good = math.isfinite(float(values.sum(dtype=torch.promote_types(values.dtype, torch.float32))))
        if not good:
            check_norms({name: float(tensor.norm())}, what)
            raise NonFinite(f"{what} of {name} has no finite sum", HINT)


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
