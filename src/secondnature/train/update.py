"""APOLLO for one tensor: state and gradient in, state and update out, then one pass over the weight (trainer).

One implementation for both forms of a gradient. Dense, G (A, B); or factored, G = L^T R over S tokens, where G is
never formed: the projection is (L P^T)^T R, channel scales go onto the factor that has the channels, the update's
norm follows from S x S Gram matrices, and the rows of the update appear chunk by chunk as they are written.

An `Update` is a plan: nothing is written, and no state changed, before all tensors' updates were found finite.

Shapes: A, B the weight's rows and columns; M = min(A, B) is projected to R, N = max(A, B) are the channels.
"""

from __future__ import annotations

import importlib.util
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from secondnature.model.gradients import Factors, Gradient, Rows, dense
from secondnature.model.products import matmul
from secondnature.records import OptimizerSettings
from secondnature.train.readback import Reading, together
from secondnature.weights.rounding import RandomWords, Writer, scratch, square_sum

__all__ = [
    "Rule",
    "TensorState",
    "Update",
    "fresh_state",
    "moment_shape",
    "plan_update",
    "planned_update",
    "projection",
    "write_",
]

DENOMINATOR_FLOOR = 0.1
"""Adam's denominator is at least this share of its root mean square over the tensor, where `floored`."""

GATE = 0.01
"""Where a gradient is below this share of the root mean square of its history, APOLLO's step shrinks with it."""
_SIGNS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float32) * 2 - 1
"""Of each byte's bits, the highest first."""
_KEPT_BYTES = 1 << 26
"""Of projections that are kept between steps: enough for models of 100M parameters at rank 64."""
_Key = tuple[tuple[int, int], str, int, str]
_kept: dict[_Key, tuple[int, Tensor]] = {}
"""By (seed, rank), tensor, size and device: the epoch and its projection; the least recently used first."""
_keeping = threading.Lock()
_BLOCK = 1 << 17
"""Elements of a gradient that are worked on while they are in the cache."""
_BLOCK_ON_GPU = 1 << 24
_LARGE = 2.0**99
"""A change below it cannot make a weight overflow that is below 2^64."""

Rule = Literal["apollo", "adam", "floored", "rows"]
"""How a tensor is updated.

apollo: matrices whose smaller side exceeds the rank. adam: the rest (norms, biases, convolutions, small matrices).
floored: Adam, elements with a gradient far below the tensor's take proportionally smaller steps instead of full
ones. For A_log and dt_bias, whose tiny gradients are mostly rounding noise of the chunked delta rule; and for an
embedding that is tied to the head, where the softmax gives every token of the vocabulary some gradient.
rows: Adam on those rows of an embedding that have a gradient; the others keep weights and moments to the bit.
"""


@dataclass(frozen=True)
class TensorState:
    """What is remembered of one tensor; a value, replaced as a whole when a step is written."""

    m: Tensor
    v: Tensor
    steps: Tensor
    """How many gradients it has seen: a scalar (int64, on the CPU), or per row (int32)."""
    level: float = 0.0
    """Norm of the last update in units of the learning rate, for the limiter."""
    rows: Tensor | None = None
    """Of the rule `rows`: which rows (K, ascending) `m`, `v` (K, D) and `steps` (K) are of; all others are new."""


@dataclass(frozen=True)
class Update:
    """A tensor's step in units of the learning rate, uphill: `factor` * `source`, its channels scaled."""

    source: Gradient
    norm: float
    """Frobenius norm of the whole."""
    factor: float = 1.0
    channels: Tensor | None = None
    """Scales (N) of the longer side of `source`: columns if A <= B, else rows."""
    rows: Tensor | None = None
    """The tensor's rows (K) that `source` (K, B) is for; None: all."""


def moment_shape(rule: Rule, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Of the two moments: (R, N), or the tensor's own shape."""
    return (rank, max(shape)) if rule == "apollo" else tuple(shape)


def fresh_state(rule: Rule, shape: tuple[int, ...], rank: int, device: torch.device) -> TensorState:
    """The state before the first gradient."""
    if rule == "rows":
        none, ids = torch.zeros(0, shape[1], device=device), torch.zeros(0, dtype=torch.int64, device=device)
        return TensorState(none, none, ids.to(torch.int32), rows=ids)
    zeros = torch.zeros(moment_shape(rule, shape, rank), dtype=torch.float32, device=device)
    return TensorState(zeros, zeros, torch.zeros((), dtype=torch.int64))


def projection(
    seed: int, name: str, epoch: int, rank: int, size: int, device: torch.device | None = None
) -> Tensor:
    """The (rank, size) matrix of signs / sqrt(rank) of one tensor and epoch; the same bits on every device."""
    words = RandomWords("project", seed, name, epoch)(-(-rank * size // 64)).astype("<u8")
    length = np.float32(1) / np.float32(math.sqrt(rank))
    if device is None or device.type == "cpu":
        signs = torch.from_numpy((_SIGNS * length)[words.view(np.uint8)])
    else:  # 64 signs travel as one word
        held = torch.from_numpy(words.view(np.int64)).to(device)
        bits = (held.unsqueeze(1) >> torch.arange(64, device=device).view(8, 8).flip(1).view(1, 64)) & 1
        signs = bits.float().mul_(2 * float(length)).sub_(float(length))
    return signs.view(-1)[: rank * size].view(rank, size)


def _kept_projection(seed: int, name: str, epoch: int, rank: int, size: int, device: torch.device) -> Tensor:
    """`projection`, made once per epoch as long as there is room.

    Where there is none, those of other seeds and ranks go, the least recently used first. Those of the same run
    stay: a step asks for each once, in turn, so that the one used longest ago is the next to be used.
    """
    key: _Key = (seed, rank), name, size, str(device)
    with _keeping:
        kept = _kept.pop(key, None)
        if kept is not None and kept[0] == epoch:
            _kept[key] = kept
            return kept[1]
    p_RM = projection(seed, name, epoch, rank, size, device)
    with _keeping:
        room = _KEPT_BYTES - p_RM.nbytes - sum(held.nbytes for _, held in _kept.values())
        for stale in [k for k in _kept if k[0] != key[0]]:
            if room >= 0:
                break
            room += _kept.pop(stale)[1].nbytes
        if room >= 0:
            _kept[key] = epoch, p_RM
    return p_RM


def plan_update(
    rule: Rule,
    gradient: Gradient,
    old: TensorState,
    settings: OptimizerSettings,
    *,
    seed: int,
    name: str,
    use_up: bool = False,
) -> tuple[Update, TensorState] | None:
    """The update of one tensor and the state after it; None where the gradient is zero. Changes nothing.

    A gradient that is not finite gives an update whose norm is not. With `use_up` a whole gradient's memory may
    become the update's.
    """
    planning = planned_update(rule, gradient, old, settings, seed=seed, name=name, use_up=use_up)
    (found,) = together([planning], at_once=False)
    return found


def planned_update(
    rule: Rule,
    gradient: Gradient,
    old: TensorState,
    settings: OptimizerSettings,
    *,
    seed: int,
    name: str,
    use_up: bool = False,
) -> Reading[tuple[Update, TensorState] | None]:
    """`plan_update`, which stops where it needs numbers: so that those of many tensors can be read at once."""
    if rule == "apollo":
        return (yield from _apollo(gradient, old, settings, seed=seed, name=name))
    if rule == "rows":
        return (yield from _adam_rows(gradient, old, settings))
    whole = dense(gradient)
    (norm,) = yield [whole.norm()]
    if norm == 0:
        return None
    wide = whole.float()
    out = wide if use_up or wide is not gradient else None
    state, step = _adam(old, wide, settings, floored=rule == "floored", out=out)
    (norm,) = yield [step.norm()]
    return Update(step, norm), state


def _adam(
    old: TensorState,
    gradient: Tensor,
    settings: OptimizerSettings,
    *,
    floored: bool = False,
    out: Tensor | None = None,
) -> tuple[TensorState, Tensor]:
    """Adam's moments after `gradient`, and its bias-corrected step. Kingma & Ba 2014, arXiv 1412.6980.

    `out` takes the step; it may be `gradient` itself.
    """
    beta1, beta2 = settings.betas
    steps = old.steps + 1
    # m / c1 / (sqrt(v / c2) + eps) = m / (sqrt(v * c1^2 / c2) + eps * c1)
    if steps.ndim:  # per-row counts broadcast over the columns
        count = steps.to(torch.float64).unsqueeze(1)
        correction, square = (
            (1 - beta1**count).float(),
            ((1 - beta1**count) ** 2 / (1 - beta2**count)).float(),
        )
    else:
        correction = 1 - beta1 ** int(steps)
        square = correction**2 / (1 - beta2 ** int(steps))
    m, v = torch.empty_like(old.m), torch.empty_like(old.v)
    step = torch.empty_like(old.m) if out is None else out
    tensors = old.m, old.v, gradient, m, v, step
    whole = m.numel() <= _BLOCK or m.is_cuda or steps.ndim or not gradient.is_contiguous()
    blocks = [tensors] if whole else list(zip(*(t.view(-1).split(_BLOCK) for t in tensors), strict=True))
    norms: list[Tensor] = []
    for old_m, old_v, g, new_m, new_v, done in blocks:
        torch.lerp(old_m, g, 1 - beta1, out=new_m)
        torch.mul(old_v, beta2, out=new_v).addcmul_(g, g, value=1 - beta2)
        torch.mul(new_v, square, out=done).sqrt_()
        if floored:
            norms.append(done.norm())
        else:
            torch.div(new_m, done.add_(correction * settings.eps), out=done)
    if floored:
        norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
        floor = DENOMINATOR_FLOOR * (norm if m.is_cuda else float(norm)) / math.sqrt(m.numel())
        for _, _, _, new_m, _, done in blocks:
            torch.div(new_m, done.clamp_(min=floor).add_(correction * settings.eps), out=done)
    return replace(old, m=m, v=v, steps=steps), step


def _adam_rows(
    gradient: Gradient, old: TensorState, settings: OptimizerSettings
) -> Reading[tuple[Update, TensorState] | None]:
    """Adam on the rows that have a gradient, each with its own count; moments of rows that ever had one."""
    assert old.rows is not None, "made by fresh_state"
    if isinstance(gradient, Rows):
        rows, values = gradient.rows, gradient.values
    else:
        values = dense(gradient)
        rows = torch.arange(len(values), device=values.device)
    with_gradient = values.ne(0).any(dim=1)
    rows, values = rows[with_gradient], values[with_gradient].float()
    if not len(rows):
        return None
    known = torch.cat([old.rows, rows]).unique()
    kept, place = torch.searchsorted(known, old.rows), torch.searchsorted(known, rows)

    def widened(table: Tensor) -> Tensor:
        return table.new_zeros(len(known), *table.shape[1:]).index_copy_(0, kept, table)

    m, v, steps = widened(old.m), widened(old.v), widened(old.steps)
    new, step = _adam(TensorState(m[place], v[place], steps[place]), values, settings)
    state = replace(
        old,
        m=m.index_copy_(0, place, new.m),
        v=v.index_copy_(0, place, new.v),
        steps=steps.index_copy_(0, place, new.steps),
        rows=known,
    )
    (norm,) = yield [step.norm()]
    return Update(step, norm, rows=rows), state


def _apollo(
    gradient: Gradient, old: TensorState, settings: OptimizerSettings, *, seed: int, name: str
) -> Reading[tuple[Update, TensorState] | None]:
    """Algorithm 1 of the paper for one matrix, in either form."""
    rank, tall = settings.rank, gradient.shape[0] > gradient.shape[1]
    num_small, num_channels = sorted(gradient.shape)
    epoch = int(old.steps) // settings.proj_refresh
    p_RM = _kept_projection(seed, name, epoch, rank, num_small, old.m.device)
    state, scale_N, scalars = _scaled(gradient, old, p_RM, settings, tall)
    # only what the update is made of is held while numbers are waited for: others plan meanwhile
    norm, raw, square, scale = yield [*scalars, scale_N.view(-1)[0]]
    if norm == 0:
        return None
    factor = settings.scale * math.sqrt(num_small / rank)
    level, limited = _limited(norm * factor, old.level, num_small * num_channels, settings)
    # the gate comes after the limiter: what it held back is not what the next step may grow from
    gate = _gate(raw, square, int(state.steps), settings)
    factor *= limited * gate
    if rank == 1:
        update = Update(gradient, level * gate, factor=factor * scale)
    else:
        update = Update(gradient, level * gate, factor=factor, channels=scale_N)
    return update, replace(state, level=level)


def _scaled(
    gradient: Gradient, old: TensorState, p_RM: Tensor, settings: OptimizerSettings, tall: bool
) -> tuple[TensorState, Tensor, list[Tensor]]:
    """The moments after a gradient, the scales (N) of its channels, and three scalars.

    These are the norm of the scaled gradient, the norm of the projected one, and the sum of the second moments.
    """
    if isinstance(gradient, Factors):
        left, right = (t.float() for t in gradient.matrices())
        small_SM, wide_SN = (right, left) if tall else (left, right)
        r_RN = matmul(matmul(small_SM, p_RM.T).T, wide_SN)
    else:
        r_RN, norm_N = _project(dense(gradient), p_RM, tall)
    raw_N = _channel_norms(r_RN)
    state, s_RN = _adam(old, r_RN, settings, out=r_RN)
    scale_N = (_channel_norms(s_RN) / raw_N).masked_fill_(raw_N == 0, 0.0)
    if isinstance(gradient, Factors):
        norm = torch.linalg.vector_norm(gradient.channel_squares().float().sqrt() * scale_N)
    else:
        norm = torch.linalg.vector_norm(norm_N * scale_N)  # pyright: ignore[reportPossiblyUnboundVariable]
    return state, scale_N, [norm, torch.linalg.vector_norm(raw_N), state.v.sum()]


def _gate(norm: float, square: float, steps: int, settings: OptimizerSettings) -> float:
    """1, or less where the projected gradient's norm is far below its history, whose squares' sum is `square`.

    The step's length comes from the moments, its direction from this gradient alone: without the gate, momentum
    would carry noise of a learned example for a full step.
    """
    usual = math.sqrt(square / (1 - settings.betas[1] ** steps))
    return min(1.0, norm / (GATE * usual)) if usual > 0 else 1.0


def _limited(norm: float, level: float, numel: int, settings: OptimizerSettings) -> tuple[float, float]:
    """The norm-growth limiter: the new norm, at most `norm_growth_limit` times the last, and the factor to it.

    The last norm counts as no less than Adam's on pure noise, sqrt((1 - beta1) / (1 + beta1)) per element.
    """
    beta1 = settings.betas[0]
    noise = settings.scale * math.sqrt(numel * (1 - beta1) / (1 + beta1))
    limit = settings.norm_growth_limit * max(level, noise)
    return (limit, limit / norm) if level > 0 and norm > limit else (norm, 1.0)


def _project(whole_AB: Tensor, p_RM: Tensor, tall: bool) -> tuple[Tensor, Tensor]:
    """The projection (R, N) and the norms of the channels (N), or at rank 1 of the whole (a scalar)."""
    rank = len(p_RM)
    r_RN = whole_AB.new_empty((rank, max(whole_AB.shape)), dtype=torch.float32)
    squares: list[Tensor] = []
    # with fewer rows than that, the projection itself is read and written more often than the gradient is
    for start, stop in _blocks(whole_AB, least=1 if tall else 4 * rank):
        part = whole_AB[start:stop]
        if part.dtype is not torch.float32:
            part = scratch("part", part.numel(), torch.float32, part.device).view(part.shape).copy_(part)
        if tall:
            torch.mm(p_RM, part.T, out=r_RN[:, start:stop])
        else:
            torch.addmm(r_RN, p_RM[:, start:stop], part, beta=1 if start else 0, out=r_RN)
        if rank == 1:
            flat = part.reshape(-1)
            squares.append(torch.dot(flat, flat))
        elif tall:
            squares.append(torch.linalg.vector_norm(part, dim=1))
        else:
            squares.append(_column_squares(part))
    if tall and rank > 1:
        return r_RN, torch.cat(squares)
    total = squares[0] if len(squares) == 1 else torch.stack(squares).sum(0)
    return r_RN, total.sqrt()


def _channel_norms(r_RN: Tensor) -> Tensor:
    """(N), or a scalar at rank 1: there the tensor is one channel."""
    if len(r_RN) == 1:
        return torch.linalg.vector_norm(r_RN)
    squares = [_column_squares(r_RN[start:stop]) for start, stop in _blocks(r_RN)]
    return (squares[0] if len(squares) == 1 else torch.stack(squares).sum(0)).sqrt_()


def _column_squares(part_AB: Tensor) -> Tensor:
    """Sums of squares (B); torch's norm over the first dimension takes ten times as long."""
    memory = scratch("squares", part_AB.numel(), torch.float32, part_AB.device)
    return torch.mul(part_AB, part_AB, out=memory.view(part_AB.shape)).sum(0)


def _blocks(matrix_AB: Tensor, least: int = 1) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) of blocks that fit a CPU's cache; `least` rows or more."""
    num_rows, num_columns = matrix_AB.shape
    step = max(least, (_BLOCK_ON_GPU if matrix_AB.is_cuda else _BLOCK) // num_columns)
    for start in range(0, num_rows, step):
        yield start, min(num_rows, start + step)


def write_(
    target: Tensor,
    update: Update,
    *,
    lr: float,
    weight_decay: float,
    seed: int,
    name: str,
    step: int,
    total: Tensor | None = None,
    overflowed: Tensor | None = None,
) -> float:
    """target -= lr * (update + weight_decay * target), rounded stochastically, in one pass by chunks of rows.

    Decoupled weight decay acts on matrices, on the rows that have a step. With `total` (fp32, like `target`) the
    intended change is added there too, and the squared norm of what rounding added to it is returned; else 0.

    Raises:
        NonFinite: a sum does not fit into the dtype. With `overflowed` (1, int32, on the device), a kernel marks
            that there instead, for who reads it later.
    """
    if total is None and _in_one_kernel(
        target, update, lr=lr, decay=weight_decay, seed=seed, name=name, step=step, bad=overflowed
    ):
        return 0.0
    part = target if update.rows is None else target[update.rows]
    writer = Writer(part, seed=seed, name=name, step=step, measure=total is not None)
    sums = None if total is None else (total.view(-1, 1) if total.ndim != 2 else total)
    decay = lr * weight_decay if target.ndim >= 2 else 0.0
    fill, add = _rows_of(update, -lr), None
    if not decay and update.rows is None and lr * update.norm < _LARGE:
        add = _addition_of(update, -lr)
    intended = 0.0
    for start, stop in writer.chunks():
        added = add is not None and writer.let_add_(start, stop, add)
        if added and sums is None:
            continue
        change = writer.buffer(start, stop)
        fill(start, stop, change)
        if decay:
            change.add_(writer.rows_AB[start:stop], alpha=-decay)
        if sums is not None:
            intended += square_sum(change)
            if update.rows is None:
                sums[start:stop].add_(change)
            else:
                sums.index_add_(0, update.rows[start:stop], change)
        if not added:
            writer.add_(start, stop, change)
    if update.rows is not None:
        target.index_copy_(0, update.rows, part)
    return writer.written - intended if total is not None else 0.0


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _in_one_kernel(
    target: Tensor,
    update: Update,
    *,
    lr: float,
    decay: float,
    seed: int,
    name: str,
    step: int,
    bad: Tensor | None,
) -> bool:
    """Do the update on a GPU in one kernel, where there is one for it; whether it was done."""
    if not (target.is_cuda and _has_triton()):
        return False
    from secondnature.train import kernels  # needs triton

    source, factor = update.source, -lr * update.factor
    decay = lr * decay if target.ndim >= 2 else 0.0
    key: dict[str, Any] = {"decay": decay, "seed": seed, "name": name, "step": step, "bad": bad}
    if isinstance(source, Factors):
        if not kernels.fits(target):
            return False
        left, right, scale = source.stored()
        ones = torch.ones(max(target.shape), device=target.device)
        channels = ones if update.channels is None else update.channels
        kernels.add_factored_(target, left, right, channels * (factor * scale), **key)
        return True
    part = target if update.rows is None else target[update.rows]
    if not kernels.fits_dense(part):
        return False
    change = dense(source) * factor
    if update.channels is not None:
        tall = change.shape[0] > change.shape[1]
        change.mul_(update.channels.unsqueeze(1) if tall else update.channels)
    kernels.add_dense_(part, change, **key)
    if update.rows is not None:
        target.index_copy_(0, update.rows, part)
    return True


def _scaled_factors(source: Factors, update: Update, factor: float) -> tuple[Tensor, Tensor]:
    """(left (S, A), right (S, B)) whose product is `factor` * update."""
    left, right = (t.float() for t in source.matrices())
    factor *= update.factor
    if update.channels is None:
        return left, right * factor
    scale = update.channels * factor
    return (left * scale, right) if source.shape[0] > source.shape[1] else (left, right * scale)


def _rows_of(update: Update, factor: float) -> Callable[[int, int, Tensor], object]:
    """A function that puts rows start..stop of `factor` * update into a buffer (stop - start, B)."""
    source = update.source
    if isinstance(source, Factors):
        left, right = _scaled_factors(source, update, factor)
        return lambda start, stop, out: out.copy_(matmul(left[:, start:stop].T, right))
    factor *= update.factor
    scale = None if update.channels is None else update.channels * factor
    whole = dense(source)
    rows = whole if whole.ndim == 2 else whole.reshape(-1, 1)
    if scale is None:
        scale_AB, by_row = torch.tensor(factor, device=rows.device), False
    else:
        scale_AB, by_row = (scale.unsqueeze(1), True) if rows.shape[0] > rows.shape[1] else (scale, False)

    def fill(start: int, stop: int, out: Tensor) -> None:
        here = scale_AB[start:stop] if by_row else scale_AB
        if rows.dtype is out.dtype:
            torch.mul(rows[start:stop], here, out=out)
        else:
            out.copy_(rows[start:stop]).mul_(here)

    return fill


def _addition_of(update: Update, factor: float) -> Callable[[int, int, Tensor], object] | None:
    """A function that adds rows start..stop of `factor` * update to fp32 rows at once; None if there is none."""
    source = update.source
    if isinstance(source, Factors):
        left, right = _scaled_factors(source, update, factor)
        return lambda start, stop, to: to.addmm_(left[:, start:stop].T, right)
    if not isinstance(source, Tensor) or source.dtype is not torch.float32:
        return None
    factor *= update.factor
    rows = source if source.ndim == 2 else source.reshape(-1, 1)
    if update.channels is None:
        return lambda start, stop, to: to.add_(rows[start:stop], alpha=factor)
    scale = update.channels * factor
    if rows.shape[0] > rows.shape[1]:
        by_row = scale.unsqueeze(1)
        return lambda start, stop, to: to.addcmul_(rows[start:stop], by_row[start:stop])
    return lambda start, stop, to: to.addcmul_(rows[start:stop], scale)
