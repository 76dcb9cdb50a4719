"""Gradients as a training step holds them: whole tensors, factors of a matrix's, rows of an embedding's.

The gradient of y = x W^T over some tokens is dY^T X: as long as tokens * (A + B) < A * B, its factors are smaller
than it is, and cheaper to work with. They are kept as backward found them, block after block, over all backward
passes of one update; when they would outgrow the product, the product takes their place. Norms of its columns come
from a tokens x tokens Gram matrix, ||(L^T R)_j||^2 = (((L L^T) R) o R) summed over the tokens, and all other norms
from those. An embedding's gradient is zero but for the
rows of the tokens that were read: a few hundred of 250,000.

Shapes: a weight (A, B); left (S, A) and right (S, B) for S tokens: dY and X for Linear, X and dY for Conv1D.
"""

from __future__ import annotations

import math
from collections.abc import Set

import torch
from torch import Tensor

from secondnature.model.products import matmul

__all__ = ["Factors", "Gradient", "GradientSink", "Rows", "dense"]


class Factors:
    """The gradient L^T R of one matrix, never formed."""

    def __init__(self, left_SA: Tensor, right_SB: Tensor) -> None:
        self._blocks = [(left_SA, right_SB)]
        self._scale = 1.0
        self._squares_N: Tensor | None = None
        """Of the channels, of all blocks, unscaled."""
        self._num_finite = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Of the gradient: (A, B)."""
        left, right = self._blocks[0]
        return left.shape[1], right.shape[1]

    @property
    def num_tokens(self) -> int:
        """S, over all blocks."""
        return sum(len(left) for left, _ in self._blocks)

    def append(self, left_SA: Tensor, right_SB: Tensor) -> None:
        """Add the gradient of further tokens."""
        assert self._scale == 1.0, "gradients are scaled when they are complete"
        self._blocks.append((left_SA, right_SB))
        self._squares_N = None

    def mul_(self, factor: float) -> Factors:
        """Scale the gradient: a number is remembered."""
        self._scale *= factor
        return self

    def norm(self) -> Tensor:
        """The Frobenius norm, a scalar (fp64); NaN or infinite if any element of the gradient is."""
        return self.channel_squares().sum(dtype=torch.float64).sqrt()

    def channel_squares(self) -> Tensor:
        """Squared norms (N) of the columns, or of the rows if these are more; computed once."""
        if self._squares_N is None:
            left, right, _ = self.stored()
            dtype = torch.promote_types(left.dtype, torch.float32)
            small, wide = (right, left) if left.shape[1] > right.shape[1] else (left, right)
            small, wide = small.to(dtype), wide.to(dtype)
            # rounding can leave a tiny negative sum; clamp_min keeps NaN
            self._squares_N = (matmul(matmul(small, small.T), wide) * wide).sum(0).clamp_min_(0.0)
        return self._squares_N * self._scale**2

    def matrices(self) -> tuple[Tensor, Tensor]:
        """(left (S, A), right (S, B)), fp32 or wider, of all tokens; their product is the gradient."""
        left, right, scale = self.stored()
        dtype = torch.promote_types(left.dtype, torch.float32)
        left, right = left.to(dtype), right.to(dtype)
        return left, right if scale == 1.0 else right * scale

    def stored(self) -> tuple[Tensor, Tensor, float]:
        """(left (S, A), right (S, B), scale): the gradient is scale * L^T R; in the dtype of backward."""
        left, right = self._blocks[0]
        if len(self._blocks) > 1:
            left, right = (torch.cat(parts) for parts in zip(*self._blocks, strict=True))
        return left, right, self._scale

    def dense(self) -> Tensor:
        """The gradient (A, B), formed."""
        left, right = self.matrices()
        return matmul(left.T, right)

    def finite(self) -> bool:
        """Whether all factors are numbers; blocks that were found so are not read again."""
        for left, right in self._blocks[self._num_finite :]:
            if not math.isfinite(float(left.sum(dtype=torch.float32) + right.sum(dtype=torch.float32))):
                return False
            self._num_finite += 1
        return True


class Rows:
    """The gradient (V, D) of an embedding, kept for the rows that have one."""

    def __init__(self, shape: tuple[int, int], rows_N: Tensor, values_ND: Tensor) -> None:
        self.shape = shape
        self.rows, self.values = _summed(rows_N, values_ND)
        """Which rows (K), ascending, each once; and theirs (K, D), fp32 or wider."""

    def append(self, rows_N: Tensor, values_ND: Tensor) -> None:
        """Add the gradient of further uses."""
        values = torch.cat([self.values, values_ND.to(self.values.dtype)])
        self.rows, self.values = _summed(torch.cat([self.rows, rows_N]), values)

    def mul_(self, factor: float) -> Rows:
        """Scale the gradient."""
        self.values.mul_(factor)
        return self

    def norm(self) -> Tensor:
        """The Frobenius norm, a scalar; NaN or infinite if any element of the gradient is."""
        return self.values.norm()

    def dense(self) -> Tensor:
        """The gradient (V, D), formed."""
        return self.values.new_zeros(self.shape).index_copy_(0, self.rows, self.values)


def _summed(rows_N: Tensor, values_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Each row once, ascending, with the sum of its values."""
    rows, place = rows_N.unique(return_inverse=True)
    wide = values_ND.to(torch.promote_types(values_ND.dtype, torch.float32))
    return rows, wide.new_zeros(len(rows), wide.shape[1]).index_add_(0, place, wide)


Gradient = Tensor | Factors | Rows


def dense(gradient: Gradient) -> Tensor:
    """The whole gradient; itself if it is held so."""
    return gradient if isinstance(gradient, Tensor) else gradient.dense()


class GradientSink(dict[str, Gradient]):
    """Gradients by parameter name, summed at full precision over all uses and examples.

    Args:
        factored: names of matrices whose gradients are kept as factors while those are smaller, and of embeddings
            whose gradients are kept by rows.
    """

    def __init__(self, factored: Set[str] = frozenset()) -> None:
        super().__init__()
        self._factored = factored

    def add(self, name: str, gradient: Tensor, *, fresh: bool = False) -> None:
        """Add a gradient of the parameter's own shape; `fresh`: nobody else holds it, so it may be kept."""
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        held = self._dense(name)
        if held is not None:
            held.add_(wide)
        else:
            self[name] = wide if fresh or wide is not gradient else wide.clone()

    def add_product(self, name: str, left_SA: Tensor, right_SB: Tensor) -> None:
        """Add L^T R to the gradient of a matrix (A, B), as factors if that is allowed and cheaper."""
        left_SA, right_SB = left_SA.detach(), right_SB.detach()  # their graph is not kept
        if self.keeps_factors(name, len(left_SA), left_SA.shape[1], right_SB.shape[1]):
            held = self.get(name)
            if isinstance(held, Factors):
                held.append(left_SA, right_SB)
            else:
                self[name] = Factors(left_SA, right_SB)
            return
        whole = self._dense(name)
        if whole is None:
            self.add(name, matmul(left_SA.T, right_SB), fresh=True)
        else:
            left, right = left_SA.T.to(whole.dtype), right_SB.to(whole.dtype)
            if whole.is_cuda:
                whole.addmm_(left, right)
            else:  # worth a temporary: `matmul` knows who multiplies best
                whole.add_(matmul(left, right))

    def keeps_factors(self, name: str, num_tokens: int, num_rows: int, num_columns: int) -> bool:
        """Whether a product over `num_tokens` more would be kept as factors, rather than formed."""
        held = self.get(name)
        if name not in self._factored or isinstance(held, Tensor | Rows):
            return False
        if isinstance(held, Factors):
            num_tokens += held.num_tokens
        return num_tokens * (num_rows + num_columns) < num_rows * num_columns

    def add_rows(self, name: str, weight: Tensor, rows: Tensor, gradient: Tensor) -> None:
        """Add gradients (N, D) of the weight's rows `rows` (N)."""
        kept = self.get(name)
        if isinstance(kept, Rows):
            kept.append(rows, gradient)
            return
        if name in self._factored and kept is None:
            self[name] = Rows((weight.shape[0], weight.shape[1]), rows, gradient)
            return
        held = self.whole(name, weight, gradient.dtype)
        held.index_add_(0, rows, gradient.to(held.dtype))

    def whole(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum so far, of the shape of `like`, to be added to in place; fp32 or wider."""
        held = self._dense(name)
        if held is None:
            dtype = torch.promote_types(dtype, torch.float32)
            held = self[name] = torch.zeros(like.shape, dtype=dtype, device=like.device)
        return held

    def _dense(self, name: str) -> Tensor | None:
        """What is held, as a tensor that may be added to."""
        held = self.get(name)
        if held is not None and not isinstance(held, Tensor):
            held = self[name] = held.dense()
        return held
