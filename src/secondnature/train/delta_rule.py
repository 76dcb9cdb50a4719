"""Which kernels of the gated delta rule a model trains with on a GPU: fused ones, if they run here and are right.

transformers takes those of flash-linear-attention where that is installed. Some of its versions refuse the backward
pass with some versions of Triton, at the first step, for they would compute wrong gradients; whether others compute
them right is not to be believed either. So the rule that would be used is tried once, forward and backward, against
transformers' own reference in torch, and the reference is put in its place where they differ (trainer).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["choose"]

LOG = logging.getLogger("secondnature.trainer")
RULE = "torch_chunk_gated_delta_rule"
"""Its name in transformers' modules, whichever implementation is behind it; `__wrapped__` is the reference."""
NUM_TOKENS, NUM_HEADS, HEAD_DIM = 70, 2, 64
"""Over one chunk of 64, as in the self-test."""
TOLERANCE = 0.05
"""Of outputs and gradients in bf16, relative to their norm."""


def choose(model: nn.Module) -> list[str]:
    """See to it that the model's delta rule is right on its device; where the reference was put in place."""
    device = next(model.parameters()).device
    replaced: list[str] = []
    for name in sorted({type(module).__module__ for module in model.modules()}):
        module: Any = sys.modules[name]
        rule = getattr(module, RULE, None)
        reference = getattr(rule, "__wrapped__", None)
        if rule is None or reference is None:
            continue
        wrong = _wrong(rule, reference, device)
        if wrong:
            setattr(module, RULE, reference)
            replaced.append(name)
            LOG.warning("the fused delta rule is not used: %s", wrong)
    return replaced


def _wrong(rule: Callable[..., Any], reference: Callable[..., Any], device: torch.device) -> str:
    """Why a rule is not to be used; empty: it computes what the reference does."""
    expected = _tried(reference, device)
    try:
        found = _tried(rule, device)
    except Exception as e:  # noqa: BLE001  (a library's own kinds, and compilers')
        return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:300]}"
    for what, one, other in zip(
        ("output", "query", "key", "value", "decay", "beta"), found, expected, strict=True
    ):
        difference = float((one.float() - other.float()).norm() / other.float().norm())
        if not difference <= TOLERANCE:
            where = "its output" if what == "output" else f"the gradient of {what}"
            return f"{where} differs by {difference:.2g} of its norm; expected at most {TOLERANCE:g}"
    return ""


def _tried(rule: Callable[..., Any], device: torch.device) -> list[Tensor]:
    """The output, and the gradients of all inputs, on random ones."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    wide = (1, NUM_TOKENS, NUM_HEADS, HEAD_DIM)
    query, key, value = (random(*wide).to(device, torch.bfloat16) for _ in range(3))
    decay = (-0.1 * random(*wide[:3]).abs()).to(device)
    beta = random(*wide[:3]).sigmoid().to(device, torch.bfloat16)
    inputs = [x.requires_grad_() for x in (query, key, value, decay, beta)]
    with torch.enable_grad():
        output, _ = rule(*inputs[:3], g=decay, beta=beta, use_qk_l2norm_in_kernel=True)
        direction = random(*output.shape).to(device)
        gradients = torch.autograd.grad((output.float() * direction).sum(), inputs)
    return [output.detach(), *gradients]
