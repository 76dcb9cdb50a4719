"""Log-probabilities of given tokens without a matrix of logits: tokens x vocabulary, a piece at a time (trainer).

A loss over answers needs one number per token, not a distribution: log p = logit of the target - logsumexp. Both
come from slices of the vocabulary, and so does the gradient, from slices computed a second time (as in Wijmans et
al. 2024, arXiv 2411.09009). What is held is `MAX_LOGITS` numbers instead of N x V (and, where the weight's gradient
is kept as factors, the logits' gradient once, in the compute dtype); and the head runs on the positions that are
asked for, not on the padding.

Only a model whose logits are the head's output on its body's last hidden state can be taken apart so. `find_head`
asks the model itself: it lets the head answer with a ramp and looks whether that comes out, unscaled and uncapped.

Shapes: N positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondnature.model.gradients import GradientSink
from secondnature.model.products import cast, matmul, times_transposed
from secondnature.model.upcast import stored_linear

__all__ = [
    "MAX_LOGITS",
    "Head",
    "find_head",
    "likeliest",
    "picked_logps",
    "target_logps",
    "token_logps",
    "token_ranks",
    "whole_logits",
]

MAX_LOGITS = 2**22
"""Logits in memory at a time (16 MB in fp32); with fewer in all, nothing is computed twice."""
MAX_CAST = 2**21
"""Elements of the head's weight that are cast at a time (8 MB in fp32), into memory that is there already."""


@dataclass(frozen=True)
class Head:
    """The two parts of a language model: logits = linear(body(ids).last_hidden_state)."""

    body: nn.Module
    linear: Any


_FOUND: WeakKeyDictionary[nn.Module, Head | None] = WeakKeyDictionary()


def find_head(model: nn.Module) -> Head | None:
    """The parts of the model; None if its logits are anything else than the head on the last hidden state.

    Runs the model on one token the first time; after that it is remembered.
    """
    if model not in _FOUND:
        _FOUND[model] = _probe(model)
    return _FOUND[model]


@torch.no_grad()
def _probe(model: Any) -> Head | None:
    body, getter = getattr(model, "base_model", model), getattr(model, "get_output_embeddings", None)
    linear = None if getter is None else getter()
    if body is model or linear is None or stored_linear(linear) is None:
        return None
    read: list[Tensor] = []
    told: list[Tensor] = []

    def tell(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        read.append(args[0])
        told.append(torch.linspace(-300, 300, output.numel()).view(output.shape).to(output))
        return told[-1]

    ids = torch.zeros((1, 1), dtype=torch.long, device=next(model.parameters()).device)
    handle = linear.register_forward_hook(tell)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    hidden = body(input_ids=ids, use_cache=False).last_hidden_state
    whole = len(read) == 1 and _same(read[0], hidden) and _same(told[0], logits)
    return Head(body, linear) if whole else None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.isclose(a, b.to(a.dtype), rtol=0, atol=0, equal_nan=True).all())


def target_logps(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Log-probabilities (N) of the targets, in nats, from whole logits; in fp32 at least."""
    wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return -F.cross_entropy(wide, targets_N, reduction="none")


def token_logps(head: Head, hidden_ND: Tensor, targets_N: Tensor, *, max_logits: int = MAX_LOGITS) -> Tensor:
    """Log-probabilities (N) of the targets, in nats, from hidden states; equal to the plain way up to rounding.

    Differentiable in the hidden states and, while gradients are collected, in the head's weight and bias.
    """
    found = stored_linear(head.linear)
    assert found is not None, "find_head has seen to it"
    weight, sink, name = found
    if hidden_ND.shape[0] * weight.shape[0] <= max_logits:
        return target_logps(head.linear(hidden_ND), targets_N)
    rows, bias = _num_rows(hidden_ND, weight, max_logits), head.linear.bias
    found_N1: Tensor = _Sliced.apply(hidden_ND, weight, bias, targets_N.unsqueeze(1), rows, sink, name)  # pyright: ignore[reportAssignmentType]
    return found_N1.squeeze(1)


def picked_logps(
    head: Head, hidden_ND: Tensor, targets_NK: Tensor, *, max_logits: int = MAX_LOGITS
) -> Tensor:
    """Log-probabilities (N, K) of K different tokens at each position; else as `token_logps`."""
    found = stored_linear(head.linear)
    assert found is not None, "find_head has seen to it"
    weight, sink, name = found
    rows = _num_rows(hidden_ND, weight, max_logits)
    return _Sliced.apply(hidden_ND, weight, head.linear.bias, targets_NK, rows, sink, name)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def likeliest(head: Head, hidden_ND: Tensor, count: int, *, max_logits: int = MAX_LOGITS) -> Tensor:
    """The `count` likeliest tokens at each position (N, count), in ascending order of their ids."""
    found = stored_linear(head.linear)
    assert found is not None, "find_head has seen to it"
    weight, bias = found[0], head.linear.bias
    rows = _num_rows(hidden_ND, weight, max_logits)
    best_NK, ids_NK = hidden_ND.new_empty((len(hidden_ND), 0)), _no_tokens(hidden_ND)
    for start in range(0, weight.shape[0], rows):
        logits, _ = _slice(hidden_ND, weight, bias, start, rows)
        here = torch.arange(start, start + logits.shape[1], device=logits.device).expand(len(logits), -1)
        both, ids = torch.cat([best_NK.to(logits.dtype), logits], dim=1), torch.cat([ids_NK, here], dim=1)
        best_NK, place = both.topk(min(count, both.shape[1]), dim=1, sorted=False)
        ids_NK = ids.gather(1, place)
    return ids_NK.sort(dim=1).values


def _no_tokens(hidden_ND: Tensor) -> Tensor:
    return torch.empty((len(hidden_ND), 0), dtype=torch.long, device=hidden_ND.device)


def whole_logits(head: Head, hidden_ND: Tensor) -> Tensor:
    """All logits (N, V); without gradients the weight is cast a piece at a time, and never whole."""
    found = stored_linear(head.linear)
    assert found is not None, "find_head has seen to it"
    if torch.is_grad_enabled():
        return head.linear(hidden_ND)
    return times_transposed(hidden_ND, found[0], head.linear.bias)


@torch.no_grad()
def token_ranks(
    head: Head, hidden_ND: Tensor, targets_N: Tensor, *, max_logits: int = MAX_LOGITS
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N) of the targets, in nats, and whether each is the likeliest token (N).

    Of equally likely tokens the first counts, as in a greedy answer. Without gradients.
    """
    found = stored_linear(head.linear)
    assert found is not None, "find_head has seen to it"
    weight, bias = found[0], head.linear.bias
    rows = _num_rows(hidden_ND, weight, max_logits)
    picked_N, best_N, token_N, sums = None, None, None, []
    for start in range(0, weight.shape[0], rows):
        logits, _ = _slice(hidden_ND, weight, bias, start, rows)
        sums.append(torch.logsumexp(logits, dim=1))
        here, column = _within(targets_N, start, logits.shape[1])
        target = logits.gather(1, column.unsqueeze(1)).squeeze(1)
        top, place = logits.max(dim=1)
        if picked_N is None or best_N is None or token_N is None:
            picked_N, best_N, token_N = target, top, place
            continue
        picked_N = torch.where(here, target, picked_N)
        token_N = torch.where(top > best_N, place + start, token_N)
        best_N = torch.maximum(top, best_N)
    assert picked_N is not None
    return picked_N - torch.logsumexp(torch.stack(sums), dim=0), targets_N == token_N


def _num_rows(hidden_ND: Tensor, weight_VD: Tensor, max_logits: int) -> int:
    """How much of the vocabulary is taken at a time."""
    return max(1, min(max_logits // len(hidden_ND), MAX_CAST // weight_VD.shape[1]))


class _Sliced(torch.autograd.Function):
    """log softmax(h W^T + b) at K targets of each position, `rows` of the vocabulary at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Any,
        targets_NK: Tensor,
        rows: int,
        sink: GradientSink | None,
        name: str,
    ) -> Tensor:
        picked_NK, sums = None, []
        for start in range(0, weight_VD.shape[0], rows):
            logits, _ = _slice(hidden_ND, weight_VD, bias_V, start, rows)
            sums.append(torch.logsumexp(logits, dim=1))
            here, column = _within(targets_NK, start, logits.shape[1])
            found = logits.gather(1, column)
            picked_NK = found if picked_NK is None else torch.where(here, found, picked_NK)
        assert picked_NK is not None
        total_N = torch.logsumexp(torch.stack(sums), dim=0)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_NK, total_N)
        ctx.rows, ctx.sink, ctx.name = rows, sink, name
        return picked_NK - total_N.unsqueeze(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        hidden_ND, weight_VD, bias_V, targets_NK, total_N = ctx.saved_tensors
        gradient_NK = gradients[0]
        gradient_N1 = gradient_NK.sum(1, keepdim=True)
        d_hidden = torch.zeros_like(hidden_ND, dtype=gradients[0].dtype)
        sink: GradientSink | None = ctx.sink
        num_tokens, (num_ids, num_hidden) = len(hidden_ND), weight_VD.shape
        factored = sink is not None and sink.keeps_factors(ctx.name, num_tokens, num_ids, num_hidden)
        d_weight = d_whole = None
        if factored:
            d_whole = hidden_ND.new_empty(num_tokens, num_ids)
        elif sink is not None:
            d_weight = sink.whole(ctx.name, weight_VD, gradients[0].dtype)
        d_bias = None if bias_V is None else torch.empty_like(bias_V)
        for start in range(0, weight_VD.shape[0], ctx.rows):
            logits, weight = _slice(hidden_ND, weight_VD, bias_V, start, ctx.rows)
            d_logits = logits.sub_(total_N.unsqueeze(1)).exp_().mul_(-gradient_N1)
            here, column = _within(targets_NK, start, d_logits.shape[1])
            d_logits.scatter_add_(1, column, gradient_NK * here)
            d_logits = d_logits.to(hidden_ND.dtype)
            d_hidden += matmul(d_logits, weight)
            end = start + d_logits.shape[1]
            if d_weight is not None:
                d_weight[start:end].add_(matmul(d_logits.T, hidden_ND))
            if d_whole is not None:
                d_whole[:, start:end] = d_logits
            if d_bias is not None:
                d_bias[start:end] = d_logits.sum(0)
        if sink is not None and d_whole is not None:
            sink.add_product(ctx.name, d_whole, hidden_ND)
        return d_hidden.to(hidden_ND.dtype), None, d_bias, None, None, None, None


def _slice(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, start: int, rows: int
) -> tuple[Tensor, Tensor]:
    """Logits (N, rows) of a part of the vocabulary, in fp32 at least, and that part of the weight, cast.

    The cast lies in memory that the next one overwrites.
    """
    part = cast(weight[start : start + rows], hidden.dtype)
    logits = matmul(hidden, part.T)
    if bias is not None:
        logits = logits.add_(bias[start : start + rows])
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), part


def _within(targets: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in this part of the vocabulary, and each one's column there (any column if it does not)."""
    column = targets - start
    return (column >= 0) & (column < count), column.clamp(0, count - 1)
