"""Writing small updates into bf16 weights in place, so that on average nothing of them is lost (trainer).

bf16 keeps 8 significant bits: rounding to the nearest value throws away 91 % of an update at a learning rate of
1e-5 and 99.5 % at 5e-7 (the embedded model, docs/benchmarks.md). Here the sum is rounded up or down with the
probability that makes its expectation exact
(stochastic rounding: Gupta et al. 2015, arXiv 1502.02551). The sum is that of fp64, because fp32 itself would
lose 5 % of an update of 5e-7 on a weight near 1; on a CPU most of it is done in fp32, with the same result. The
random bits come from a counter-based generator (Philox, Salmon et al. 2011) keyed by names and numbers, not by
call order: the same seed gives the same bits, in any process, after any restart, in exact integer arithmetic.

Each element is rounded with 45 random bits, all that fp64 has below bf16. Its upper 16 are its own; the lower 29
are drawn once per chunk: they decide only where the upper ones tie, about once in 65,536 elements, so every
element is rounded without bias and the elements of a chunk are all but independent, at a quarter of the draws.
"""

from __future__ import annotations

import hashlib
import math
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secondnature.errors import NonFinite, UnsupportedModel

__all__ = [
    "CHUNK",
    "RandomWords",
    "Writer",
    "chunk_rows",
    "overflow",
    "scratch",
    "square_sum",
    "stochastic_round_",
]

CHUNK = 1 << 16
"""Elements rounded at a time, unless one row has more: the fp64 temporaries stay in the cache."""
_PLAIN_ROWS = 64
"""At least so many at a time where nothing is rounded: a product with fewer rows is slow."""
_LOST_BITS = 52 - 7
"""Mantissa bits that fp64 has and bf16 has not."""
_SHARED_BITS = _LOST_BITS - 16
_HEADER_WORDS = 4
"""Of each chunk's words, before those of its elements: the first holds the shared bits, three are unused. One whole
block of the generator, so that a chunk's elements begin with a block."""
_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
"""The integers that have a dtype's bits."""
_OVERFLOW = 2.0**128
"""The least number that is too large for bf16 and fp32 after rounding down."""
_LEAST_NORMAL, _INFINITY = 0x0080, 0x7F80
"""Their bits in bf16."""

Words = np.ndarray[tuple[int], np.dtype[np.uint64]]


def overflow(name: str) -> NonFinite:
    """What to raise where a weight of tensor `name` does not fit into its dtype any more."""
    return NonFinite(f"tensor {name}: the updated weight is not finite", "lower the learning rate")


class RandomWords:
    """An endless stream of random 64-bit words that depends on its key only, e.g. ("round", seed, name, step)."""

    def __init__(self, *key: str | int) -> None:
        digest = hashlib.sha256("\x1f".join(str(k) for k in key).encode()).digest()
        self.key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
        """Of Philox-4x64: two 64-bit words."""
        self._philox = np.random.Philox(key=np.array(self.key, dtype=np.uint64))

    def __call__(self, count: int) -> Words:
        """The next `count` words."""
        return self._philox.random_raw(count)


class _Scratch(threading.local):
    """Temporaries by name, kept between tensors: fresh memory costs more than the arithmetic on it."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.device], Tensor] = {}

    def __call__(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A vector of `count` elements; whoever asks next for that name gets the same memory."""
        kept = self._kept.get((name, device))
        if kept is None or kept.numel() < count:
            kept = self._kept[name, device] = torch.empty(count, dtype=dtype, device=device)
        return kept[:count]


scratch = _Scratch()


def chunk_rows(num_columns: int) -> int:
    """How many rows of a matrix are rounded at a time; part of what decides the random bits."""
    return max(1, CHUNK // max(1, num_columns))


class Writer:
    """Adds updates to one tensor, row by row, in one pass: reads it once, writes it once, holds one chunk.

    Args:
        target: bf16 or fp32, contiguous. A matrix is written by rows (A, B); anything else counts as (numel, 1).
        seed, name, step: the key of the random bits.
        measure: also sum the squares of what is really written (`written`).

    Raises:
        UnsupportedModel: `target` is neither bf16 nor fp32, or not contiguous.
    """

    def __init__(self, target: Tensor, *, seed: int, name: str, step: int, measure: bool = False) -> None:
        if target.dtype not in (torch.bfloat16, torch.float32) or not target.is_contiguous():
            raise UnsupportedModel(f"tensor {name}: {target.dtype}; expected contiguous bfloat16 or float32")
        self.rows_AB = target.detach() if target.ndim == 2 else target.detach().view(-1, 1)
        self.written = 0.0
        """Sum of squares of the written differences, if measured."""
        self._name = name
        self._measure = measure
        self._key = seed, name, step
        self._words: RandomWords | None = None

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first row, row after the last) of every chunk, in the order in which `add_` expects them."""
        num_rows, num_columns = self.rows_AB.shape
        step = chunk_rows(num_columns)
        if self.rows_AB.dtype is torch.float32:
            step = max(8 * step, _PLAIN_ROWS)
        for start in range(0, num_rows, step):
            yield start, min(num_rows, start + step)

    def buffer(self, start: int, stop: int) -> Tensor:
        """Memory for these rows' changes, fp32; the next chunk, and the next tensor, overwrite it."""
        num_columns = self.rows_AB.shape[1]
        count = (stop - start) * num_columns
        memory = scratch("change", count, torch.float32, self.rows_AB.device)
        return memory.view(stop - start, num_columns)

    def let_add_(self, start: int, stop: int, add: Callable[[int, int, Tensor], object]) -> bool:
        """Let `add(start, stop, rows)` add to fp32 rows in place, far from overflow; whether it was done.

        What it adds must be finite and below 2^100. A -0.0 may become 0.0.
        """
        rows = self.rows_AB[start:stop]
        if rows.dtype is not torch.float32 or not _is_small(rows.view(-1)):
            return False
        before = rows.double() if self._measure else None
        add(start, stop, rows)
        if before is not None:
            self.written += float((rows.double() - before).square_().sum())
        return True

    def add_(self, start: int, stop: int, change_AB: Tensor) -> None:
        """Add `change_AB` (fp32, stop - start rows) to the rows; elements whose change is zero keep their bits.

        Raises:
            NonFinite: the sum does not fit into the dtype; that chunk was not written.
        """
        target = self.rows_AB[start:stop].view(-1)
        change = change_AB.detach().reshape(-1)
        if target.dtype is torch.bfloat16:
            words = self._draw(target.numel())
            new = _rounded_in_fp32(target, change, words) if target.device.type == "cpu" else None
            if new is None:
                exact, new = _rounded_in_fp64(target, change, words)
                self._check(exact)
                if _has_negative_0(target):
                    new = torch.where(change == 0, target, new)
        else:
            new = target + change
            self._check(new)
            if _has_negative_0(target):
                new = torch.where(change == 0, target, new)
        if self._measure:
            self.written += _moved(target, new)
        target.copy_(new)

    def _check(self, exact: Tensor) -> None:
        low, high = exact.aminmax()  # NaN if any is
        if not (float(low) > -_OVERFLOW and float(high) < _OVERFLOW):
            raise overflow(self._name)

    def _draw(self, count: int) -> Words:
        """The next chunk's words."""
        if self._words is None:
            self._words = RandomWords("round", *self._key)
        return self._words(_HEADER_WORDS + 4 * -(-count // 16))


def square_sum(values: Tensor) -> float:
    """The sum of squares of fp32 values, in fp32 as far as that reaches."""
    flat = values.reshape(-1)
    found = float(torch.dot(flat, flat))
    return found if math.isfinite(found) else float(flat.double().square_().sum())


def _moved(old: Tensor, new: Tensor) -> float:
    """The sum of squared differences; those of bf16 numbers are the same in fp32, but for the last bits of few."""
    if new.dtype is not torch.bfloat16:
        return float((new.double() - old.double()).square_().sum())
    count, device = new.numel(), new.device
    difference, before = (scratch(name, count, torch.float32, device) for name in ("moved", "before"))
    return square_sum(difference.copy_(new).sub_(before.copy_(old)))


def _is_small(values: Tensor) -> bool:
    """Whether the sum of squares is finite: no NaN, and no element reaches 2^64."""
    return math.isfinite(float(torch.dot(values, values)))


def _has_negative_0(values: Tensor) -> bool:
    """-0.0 + 0.0 is 0.0; the bits of -0.0 are the least of all integers."""
    integers = values.view(_BITS[values.dtype])
    return int(integers.amin()) == torch.iinfo(integers.dtype).min


def _own_and_shared(words: Words, count: int) -> tuple[np.ndarray[Any, np.dtype[np.uint16]], int]:
    """The upper 16 random bits of each element of a chunk, and the lower 29 of all."""
    return words[_HEADER_WORDS:].view(np.uint16)[:count], int(words[0] >> np.uint64(64 - _SHARED_BITS))


def _rounded_in_fp64(old: Tensor, change: Tensor, words: Words) -> tuple[Tensor, Tensor]:
    """The sum in fp64 and bf16: random bits are added below its mantissa, everything below is cut off."""
    count, device = old.numel(), old.device
    exact, noise = (scratch(name, count, torch.float64, device) for name in ("exact", "noise"))
    bits, noise_bits = exact.view(torch.int64), noise.view(torch.int64)
    own, shared = _own_and_shared(words, count)
    exact.copy_(old)
    noise.copy_(change)
    exact.add_(noise)
    noise_bits.copy_(torch.from_numpy(own))
    noise_bits.bitwise_left_shift_(_SHARED_BITS).bitwise_or_(shared)
    bits.add_(noise_bits).bitwise_and_(-(1 << _LOST_BITS))
    return exact, scratch("new", count, torch.bfloat16, device).copy_(exact)


def _rounded_in_fp32(old: Tensor, change: Tensor, words: Words) -> Tensor | None:
    """The same bits at half the cost, on a CPU; None where fp32 cannot give them, or to refuse overflow.

    fp32 has just the 16 own random bits below bf16. Half of bf16's last place is taken off them, so that torch's
    rounding to nearest cuts off. The fp32 sum is fp64's cut off, or one more in the last place, and the shared bits
    carry one into that place or none: both matter only where the 16 bits end up as all ones or all zeros, at two of
    65,536 elements. These are done in fp64, and so are chunks with sums that are zero, below bf16's normal numbers,
    or too large.
    """
    count, device = old.numel(), old.device
    own, shared = _own_and_shared(words, count)
    total = scratch("sum", count, torch.float32, device).copy_(old).add_(change)
    bits = total.view(torch.int32)
    wide = bits.numpy()
    np.add(wide, np.bitwise_xor(own, 0x8000).view(np.int16), out=wide)
    new = scratch("new", count, torch.bfloat16, device).copy_(total)
    new_bits = new.view(torch.int16).numpy()
    narrow = scratch("low", count, torch.int16, device).copy_(bits).numpy()
    np.add(narrow, 0x7FFF, out=narrow)  # all ones and all zeros are now -2 and -1
    ties = np.flatnonzero(np.greater_equal(narrow.view(np.uint16), 0xFFFE))
    magnitude = np.bitwise_and(new_bits, 0x7FFF, out=narrow)
    if magnitude.min() <= _LEAST_NORMAL or magnitude.max() >= _INFINITY:
        return None
    for i in ties.tolist():
        (exact,) = struct.unpack("<Q", struct.pack("<d", old[i].item() + change[i].item()))
        cut = exact + (int(own[i]) << _SHARED_BITS | shared) >> _LOST_BITS << _LOST_BITS
        (new[i],) = struct.unpack("<d", struct.pack("<Q", cut))
    return new


def stochastic_round_(target: Tensor, update: Tensor, *, seed: int, name: str, step: int) -> float:
    """Add `update` (fp32, same shape) to `target` in place and return the norm of what was really written.

    bf16 is rounded stochastically, keyed by (seed, name, step); fp32 is a plain addition. Elements whose update is
    zero keep their bits, also -0.0.

    Raises:
        NonFinite: the sum does not fit into the dtype; that chunk and what follows was not written.
        UnsupportedModel: `target` is neither bf16 nor fp32, or not contiguous.
    """
    writer = Writer(target, seed=seed, name=name, step=step, measure=True)
    update_AB = update.detach().reshape(writer.rows_AB.shape)
    for start, stop in writer.chunks():
        writer.add_(start, stop, update_AB[start:stop])
    return math.sqrt(writer.written)
