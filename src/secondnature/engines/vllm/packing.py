# pyright: reportMissingImports=false
"""No weight is packed: what computes is the Parameter itself (vLLM's worker, on CPUs).

vLLM's CPU build copies matrices into layouts of oneDNN or AMX at load and drops the Parameter, or keeps it as a
dead second copy; on processors with avx512_bf16 also the convolution of a GatedDeltaNet. A write would then change
nothing. Here matrices are multiplied as they lie, and the convolution's kernels are given the plain weight. The
price: docs/benchmarks.md, Inside vLLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["install", "is_plain"]


FEW = 64
"""Rows up to which the weight is the product's first factor."""


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`: x [..., in], weight [out, in], bias [out] -> [..., out].

    For few rows of bf16 the weight goes first: a large matrix then takes 70 % of the time
    (docs/decisions/packing-off.md). Not in compiled code: a branch on the number of rows would be fixed there.
    """
    if bias is None and x.dtype is torch.bfloat16 and not torch.compiler.is_compiling():
        rows = x.reshape(-1, x.size(-1))
        if rows.size(0) == 1:
            return torch.mv(weight, rows[0]).view(*x.shape[:-1], weight.size(0))
        if rows.size(0) <= FEW:
            return torch.mm(weight, rows.t()).t().contiguous().view(*x.shape[:-1], weight.size(0))
    return torch.nn.functional.linear(x, weight, bias)


def _leave_plain(layer: Any, remove_weight: bool) -> None:
    """In the place of vLLM's `dispatch_cpu_unquantized_gemm`."""
    layer.cpu_linear = _linear


def is_plain(layer: Any) -> bool:
    """Does this module compute with its Parameter, as far as packing goes?"""
    return getattr(layer, "cpu_linear", _linear) is _linear


def install() -> None:
    """Take packing away, on CPUs: elsewhere nothing is packed. Later calls change nothing."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    if utils.dispatch_cpu_unquantized_gemm is _leave_plain:
        return
    utils.dispatch_cpu_unquantized_gemm = _leave_plain
    for name in ("causal_conv1d_fwd_cpu", "causal_conv1d_update_cpu"):
        original = getattr(_custom_ops, name, None)
        if original is not None:
            setattr(_custom_ops, name, _with_plain_weight(original))


def _with_plain_weight(original: Any) -> Any:
    def convolve(*, x: Tensor, weight: Tensor, is_weight_packed: bool, **others: Any) -> Any:
        if weight.dim() == 3:  # [channels, 1, width], as the Parameter is
            weight = weight.view(weight.size(0), weight.size(2))
        if x.size(-1) == 1:  # [channels, tokens]: for a lone token the kernel wants strides that mean nothing
            x = x.t().clone(memory_format=torch.contiguous_format).t()
        return original(x=x, weight=weight, is_weight_packed=False, **others)

    return convolve
