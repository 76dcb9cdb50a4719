"""Matrix products as this machine makes them best, among them those with stored bf16 weights (any engine).

*Casts in pieces.* A weight that is computed with in fp32 is cast for each product. A cast of the whole matrix is
fresh memory: of a large one (a head over 49,152 tokens) the kernel clears the pages each time, which takes several
times as long as the product, and the cast is in no cache when it is read. So it is cast a piece at a time, each
into the memory of the one before, and used while it is near.

*Who multiplies.* MKL, which torch calls for fp32, uses AVX-512 on Intel's processors only. On others oneDNN, built
into torch as well, takes half the time from a few rows on. Both are fp32 and differ in the last bits.

Shapes: x (..., I), dy (..., O), W (O, I), stored in any dtype.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["matmul", "times", "times_transposed"]

PIECE = 2**20
"""Elements of a matrix that are cast at a time (4 MB in fp32), if it has more than twice as many."""
MIN_KEPT = 2**18
"""Elements of casts for which memory is kept: smaller ones leave no holes that matter."""
MIN_ROWS, MIN_PRODUCTS = 4, 2**20
"""From here on oneDNN was faster on an AMD EPYC with AVX-512: rows, and rows times the matrix's elements."""


class _Casts(threading.local):
    """Pieces of weights, cast, each in the memory of the one before.

    Between what lives on, fresh memory for each leaves holes that the next one does not fit.
    """

    def __init__(self) -> None:
        self.kept: dict[torch.dtype, Tensor] = {}

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, until the next call: for products that no backward pass looks back at."""
        if weight.dtype == dtype:
            return weight
        count = weight.numel()
        if count < MIN_KEPT or weight.device.type != "cpu":
            return weight.to(dtype)
        kept = self.kept.get(dtype)
        if kept is None or kept.numel() < count:
            self.kept.pop(dtype, None)
            with torch.inference_mode(False):  # it outlives that mode, and is written again outside it
                kept = self.kept[dtype] = torch.empty(max(count, PIECE), dtype=dtype)
        return kept[:count].view(weight.shape).copy_(weight)


_cast = _Casts()


def _pieces(weight_OI: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Rows of the matrix that are cast together; all of them where nothing is cast, or on an accelerator."""
    count, columns = weight_OI.shape
    rows = count
    if weight_OI.dtype != dtype and weight_OI.device.type == "cpu" and weight_OI.numel() > 2 * PIECE:
        rows = max(1, PIECE // columns)
    for start in range(0, count, rows):
        yield slice(start, start + rows)


def times_transposed(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T (+ bias), (..., O), in the dtype of x; for whatever no backward pass looks back at."""
    count = weight_OI.shape[0]
    whole: Tensor | None = None
    for rows in _pieces(weight_OI, x.dtype):
        bias = None if bias_O is None else bias_O[rows]
        part = _linear(x, _cast(weight_OI[rows], x.dtype), bias)
        if part.shape[-1] == count:
            return part
        if whole is None:
            whole = x.new_empty(*x.shape[:-1], count)
        whole[..., rows] = part
    assert whole is not None, "a matrix has rows"
    return whole


def times(dy: Tensor, weight_OI: Tensor) -> Tensor:
    """dy W, (..., I), in the dtype of dy; for whatever no backward pass looks back at."""
    whole: Tensor | None = None
    for rows in _pieces(weight_OI, dy.dtype):
        here = dy if rows.stop == dy.shape[-1] and whole is None else dy[..., rows]
        part = _linear(here, _cast(weight_OI[rows], dy.dtype).T, None)
        whole = part if whole is None else whole.add_(part)
    assert whole is not None, "a matrix has rows"
    return whole


def matmul(a_NK: Tensor, b_KM: Tensor) -> Tensor:
    """a @ b (N, M) of two matrices of one dtype; for whatever no backward pass looks back at."""
    return _linear(a_NK, b_KM.T, None)


def _linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    rows = x.numel() // max(1, x.shape[-1])
    if (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and rows >= MIN_ROWS
        and rows * weight_OI.numel() >= MIN_PRODUCTS
    ):
        onednn = _onednn()
        if onednn is not None:
            return onednn(x, weight_OI, bias_O, "none", [], "")
    # of a slice (each row's last position) torch would make one product per row, each with a copy of the matrix
    flat = F.linear(x.reshape(-1, x.shape[-1]), weight_OI, bias_O)
    return flat.view(*x.shape[:-1], flat.shape[-1])


@cache
def _onednn() -> Any:
    """torch's door to oneDNN for fp32, where that is the faster one; else None."""
    found = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        of_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    return None if of_intel or not torch.backends.mkl.is_available() else found
