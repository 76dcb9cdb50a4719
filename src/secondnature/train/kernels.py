"""An update as one Triton kernel: each weight is read once and written once (trainer, CUDA only).

W += scale * (L^T R) - decay * W for W (A, B) bf16, L (S, A), R (S, B) as backward found them, one scale per row or
per column; or W += change - decay * W for a whole change, fp32. Both round stochastically in the same pass. The
random bits are those of `weights.rounding.Writer`, computed where they are used: Philox-4x64 with ten rounds
(Salmon et al. 2011), in integers, one block of the generator for 16 neighbouring elements. Only the matrix product
may differ from the chunked path in its last bits, as two matrix products do.

Import it only where triton is (on CUDA); tests run it on the CPU too, in Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]  (no part of a CPU's environment)
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from secondnature.weights.rounding import RandomWords, chunk_rows, overflow

__all__ = ["add_dense_", "add_factored_", "fits", "fits_dense"]

_FEW_TOKENS = {"TILE_A": 32, "TILE_B": 64, "TILE_S": 32}
_MANY_TOKENS = {"TILE_A": 64, "TILE_B": 64, "TILE_S": 64}
"""Fastest of those tried on an H100 (benchmarks/gpu.py) for 64 and for 512 tokens."""
_TILE = 1024


@triton.jit
def _philox_block(counter: tl.tensor, key0: tl.tensor, key1: tl.tensor) -> tl.tensor:
    """Block number `counter` of numpy's stream: four 64-bit words. numpy counts before it draws."""
    c0 = counter + 1
    c1 = c0 * 0
    c2 = c0 * 0
    c3 = c0 * 0
    m0 = c0 * 0 + 0xD2E7470EE14C6C93
    m1 = c0 * 0 + 0xCA5A826395121157
    k0 = c0 * 0 + key0.to(tl.uint64)
    k1 = c0 * 0 + key1.to(tl.uint64)
    w0 = c0 * 0 + 0x9E3779B97F4A7C15
    w1 = c0 * 0 + 0xBB67AE8584CAA73B
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, m0)
        high1 = tl.umulhi(c2, m1)
        low0 = c0 * m0
        low1 = c2 * m1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += w0
        k1 += w1
    return c0, c1, c2, c3


@triton.jit
def _lanes(
    w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor, TILE_A: tl.constexpr, TILE_B: tl.constexpr
) -> tl.tensor:
    """(TILE_A, TILE_B) random 16-bit numbers from the blocks (TILE_A, TILE_B / 16) of those elements."""
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (TILE_A, TILE_B // 4))
    lane0 = words & 0xFFFF
    lane1 = (words >> 16) & 0xFFFF
    lane2 = (words >> 32) & 0xFFFF
    lane3 = words >> 48
    return tl.reshape(tl.join(tl.join(lane0, lane2), tl.join(lane1, lane3)), (TILE_A, TILE_B))


@triton.jit
def _round_into(
    place: tl.tensor,
    old: tl.tensor,
    change: tl.tensor,
    own: tl.tensor,
    shared: tl.tensor,
    inside: tl.tensor,
    bad: tl.tensor,
) -> None:
    """Store old + change, rounded by the random bits; `shared` broadcasts over `own`. Marks `bad` on overflow."""
    noise = ((own << 29) | (shared >> 35)).to(tl.int64)
    exact = old.to(tl.float64) + change.to(tl.float64)
    bits = (exact.to(tl.int64, bitcast=True) + noise) & -35184372088832
    rounded = bits.to(tl.float64, bitcast=True)
    finite = tl.abs(rounded) < 340282366920938463463374607431768211456.0
    new = tl.where(finite, rounded, 0.0).to(tl.float32).to(tl.bfloat16)  # exact: it has bf16's mantissa
    tl.store(place, tl.where((change == 0) | (finite == 0), old, new), mask=inside)
    worst = tl.max(tl.max(tl.where(inside & (finite == 0), 1, 0), axis=1), axis=0)
    tl.store(bad, 1, mask=worst > 0)


@triton.jit(do_not_specialize=["key0", "key1"])
def _add_factored(
    weight: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    scale: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
    bad: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_tokens: tl.tensor,
    decay: tl.tensor,
    rows_per_chunk: tl.tensor,
    blocks_per_chunk: tl.tensor,
    SCALED_ROWS: tl.constexpr,
    WIDENED: tl.constexpr,
    TILE_A: tl.constexpr,
    TILE_B: tl.constexpr,
    TILE_S: tl.constexpr,
) -> None:
    """One (TILE_A, TILE_B) tile of the weight."""
    a = tl.program_id(0).to(tl.int64) * TILE_A + tl.arange(0, TILE_A)
    b = tl.program_id(1).to(tl.int64) * TILE_B + tl.arange(0, TILE_B)
    change = tl.zeros((TILE_A, TILE_B), dtype=tl.float32)
    for begin in range(0, num_tokens, TILE_S):
        s = begin + tl.arange(0, TILE_S)
        left_AS = tl.load(
            left + s[None, :] * num_rows + a[:, None],
            mask=(s[None, :] < num_tokens) & (a[:, None] < num_rows),
            other=0.0,
        )
        right_SB = tl.load(
            right + s[:, None] * num_columns + b[None, :],
            mask=(s[:, None] < num_tokens) & (b[None, :] < num_columns),
            other=0.0,
        )
        if WIDENED:
            left_AS = left_AS.to(tl.float32)
            right_SB = right_SB.to(tl.float32)
        change += tl.dot(left_AS, right_SB, input_precision="ieee")
    if SCALED_ROWS:
        change *= tl.load(scale + a, mask=a < num_rows, other=0.0)[:, None]
    else:
        change *= tl.load(scale + b, mask=b < num_columns, other=0.0)[None, :]
    inside = (a[:, None] < num_rows) & (b[None, :] < num_columns)
    place = weight + a[:, None] * num_columns + b[None, :]
    old = tl.load(place, mask=inside, other=0.0)
    change -= old.to(tl.float32) * decay

    first = (a // rows_per_chunk) * blocks_per_chunk
    shared, _, _, _ = _philox_block(first.to(tl.uint64), key0, key1)
    sixteen = tl.program_id(1).to(tl.int64) * (TILE_B // 16) + tl.arange(0, TILE_B // 16)
    inner = (a % rows_per_chunk)[:, None] * (num_columns // 16) + sixteen[None, :]
    w0, w1, w2, w3 = _philox_block((first[:, None] + 1 + inner).to(tl.uint64), key0, key1)
    own = _lanes(w0, w1, w2, w3, TILE_A, TILE_B)
    _round_into(place, old, change, own, shared[:, None], inside, bad)


@triton.jit(do_not_specialize=["key0", "key1"])
def _add_dense(
    weight: tl.tensor,
    change_of: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
    bad: tl.tensor,
    numel: tl.tensor,
    decay: tl.tensor,
    chunk: tl.tensor,
    blocks_per_chunk: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """TILE neighbouring elements, as one row per block of the generator."""
    group = tl.program_id(0).to(tl.int64) * (TILE // 16) + tl.arange(0, TILE // 16)
    element = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = element < numel
    place = weight + element
    old = tl.load(place, mask=inside, other=0.0)
    change = tl.load(change_of + element, mask=inside, other=0.0) - old.to(tl.float32) * decay
    first = (group * 16 // chunk) * blocks_per_chunk
    shared, _, _, _ = _philox_block(first.to(tl.uint64), key0, key1)
    inner = first + 1 + (group * 16 % chunk) // 16
    w0, w1, w2, w3 = _philox_block(inner.to(tl.uint64)[:, None], key0, key1)
    own = _lanes(w0, w1, w2, w3, TILE // 16, 16)
    _round_into(place, old, change, own, shared[:, None], inside, bad)


def fits(target: Tensor) -> bool:
    """Whether `add_factored_` takes this matrix: contiguous bf16, columns in sixteens (the generator's blocks)."""
    return (
        target.ndim == 2
        and target.dtype is torch.bfloat16
        and target.is_contiguous()
        and target.shape[1] % 16 == 0
    )


def fits_dense(target: Tensor) -> bool:
    """Whether `add_dense_` takes this tensor: contiguous bf16, elements and chunks in sixteens."""
    columns = target.shape[1] if target.ndim == 2 else 1
    whole = target.dtype is torch.bfloat16 and target.is_contiguous()
    return whole and target.numel() % 16 == 0 and chunk_rows(columns) * columns % 16 == 0


def add_factored_(
    target: Tensor,
    left_SA: Tensor,
    right_SB: Tensor,
    scale: Tensor,
    *,
    decay: float,
    seed: int,
    name: str,
    step: int,
    bad: Tensor | None = None,
) -> None:
    """target (A, B) += scale * (L^T R) - decay * target, rounded stochastically, keyed by (seed, name, step).

    Args:
        left_SA, right_SB: of one dtype, bf16 or fp32.
        scale: fp32, per row if there are more rows than columns, else per column.
        bad: (1), int32, zero: becomes 1 where a sum does not fit; the caller reads it, when it suits.

    Raises:
        NonFinite: without `bad`, a sum does not fit into the dtype; that element was not written, others were.
    """
    assert fits(target)
    num_rows, num_columns = target.shape
    rows = chunk_rows(num_columns)
    blocks = 1 + -(-min(num_rows, rows) * num_columns // 16)
    key0, key1 = _keys(seed, name, step)
    flag = torch.zeros(1, dtype=torch.int32, device=target.device) if bad is None else bad
    tiles = _FEW_TOKENS if len(left_SA) <= 128 else _MANY_TOKENS
    grid = (triton.cdiv(num_rows, tiles["TILE_A"]), triton.cdiv(num_columns, tiles["TILE_B"]))
    _add_factored[grid](  # pyright: ignore[reportIndexIssue]
        target,
        left_SA.contiguous(),
        right_SB.contiguous(),
        scale.float().contiguous(),
        key0,
        key1,
        flag,
        num_rows,
        num_columns,
        len(left_SA),
        decay,
        rows,
        blocks,
        SCALED_ROWS=num_rows > num_columns,
        WIDENED=not target.is_cuda,  # the interpreter multiplies bf16 by its bits
        **tiles,
    )
    if bad is None:
        _check(flag, name)


def add_dense_(
    target: Tensor,
    change: Tensor,
    *,
    decay: float,
    seed: int,
    name: str,
    step: int,
    bad: Tensor | None = None,
) -> None:
    """target += change (fp32, of its shape) - decay * target, rounded stochastically, keyed by (seed, name, step).

    `bad` and Raises: as `add_factored_`.
    """
    assert fits_dense(target)
    columns = target.shape[1] if target.ndim == 2 else 1
    chunk, numel = chunk_rows(columns) * columns, target.numel()
    blocks = 1 + -(-min(numel, chunk) // 16)
    key0, key1 = _keys(seed, name, step)
    flag = torch.zeros(1, dtype=torch.int32, device=target.device) if bad is None else bad
    _add_dense[(triton.cdiv(numel, _TILE),)](  # pyright: ignore[reportIndexIssue]
        target, change.float().contiguous(), key0, key1, flag, numel, decay, chunk, blocks, TILE=_TILE
    )
    if bad is None:
        _check(flag, name)


def _keys(seed: int, name: str, step: int) -> tuple[int, int]:
    """The generator's key as signed 64-bit numbers: a kernel takes no others as plain arguments."""
    first, second = (k - (1 << 64) if k >> 63 else k for k in RandomWords("round", seed, name, step).key)
    return first, second


def _check(bad: Tensor, name: str) -> None:
    if int(bad):
        raise overflow(name)
