"""Writing small updates into bf16 weights in place, so that on average nothing of them is lost (trainer).

bf16 keeps 8 significant bits: rounding to the nearest value throws away 91 % of an update at a learning rate of
1e-5 and 99.5 % at 5e-7 (the embedded model, docs/benchmarks.md). Here the sum is rounded up or down with the
probability that makes its expectation exact
(stochastic rounding: Gupta et al. 2015, arXiv 1502.02551). The sum is formed in fp64, because fp32 itself would
lose 5 % of an update of 5e-7 on a weight near 1. The random bits come from a counter-based generator (Philox,
Salmon et al. 2011) keyed by names and numbers, not by call order: the same seed gives the same bits, in any
process, after any restart, in exact integer arithmetic.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from secondnature.errors import NonFinite, UnsupportedModel

__all__ = ["RandomWords", "stochastic_round_"]

_CHUNK = 1 << 17
"""Elements rounded at a time: the fp64 temporaries stay in the cache."""
_LOST_BITS = 52 - 7
"""Mantissa bits that fp64 has and bf16 has not."""


class RandomWords:
    """An endless stream of random 64-bit words that depends on its key only, e.g. ("round", seed, name, step)."""

    def __init__(self, *key: str | int) -> None:
        digest = hashlib.sha256("\x1f".join(str(k) for k in key).encode()).digest()
        self._philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def __call__(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """The next `count` words."""
        return self._philox.random_raw(count)


def stochastic_round_(target: Tensor, update: Tensor, *, seed: int, name: str, step: int) -> float:
    """Add `update` (fp32, same shape) to `target` in place and return the norm of what was really written.

    bf16 is rounded stochastically, keyed by (seed, name, step); fp32 is a plain addition. Elements whose update is
    zero keep their bits, also -0.0.

    Raises:
        NonFinite: the sum does not fit into the dtype; that chunk and what follows was not written.
        UnsupportedModel: `target` is neither bf16 nor fp32, or not contiguous.
    """
    if target.dtype not in (torch.bfloat16, torch.float32) or not target.is_contiguous():
        raise UnsupportedModel(f"tensor {name}: {target.dtype}; expected contiguous bfloat16 or float32")
    words = RandomWords("round", seed, name, step)
    olds, updates = target.detach().view(-1), update.detach().reshape(-1)
    written = 0.0
    for start in range(0, olds.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        old, change = olds[part].double(), updates[part].double()
        new = old + change
        if target.dtype is torch.bfloat16:
            new = _round_to_bf16(new, words)
        stored = torch.where(change == 0, old, new).to(target.dtype)
        if not bool(torch.isfinite(stored).all()):
            raise NonFinite(f"tensor {name}: the updated weight is not finite", "lower the learning rate")
        olds[part] = stored
        written += float((stored.double() - old).square_().sum())
    return math.sqrt(written)


def _round_to_bf16(value: Tensor, words: RandomWords) -> Tensor:
    """fp64 values with the mantissa of bf16: random bits are added below it, then everything below is cut off."""
    count = value.numel()
    noise = words(-(-count // 2)).view(np.uint32)[:count].astype(np.int64) << (_LOST_BITS - 32)
    bits = value.view(torch.int64) + torch.from_numpy(noise).to(value.device)
    return (bits & -(1 << _LOST_BITS)).view(torch.float64)
