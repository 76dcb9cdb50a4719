"""Computing with bf16 weights in fp32: each weight is cast where it is used, no fp32 copy is kept (any engine).

The arena's bf16 is the truth (law 1). `compute_at_use` gives every module that owns parameters a subclass in which
reading a parameter (`self.weight`, `self.A_log`, also from the outside as in `self.conv1d.weight`) yields the cast
value, which is how `torch.nn.utils.parametrize` works too; no forward of transformers is changed. The three
modules that hold nearly all weights compute themselves: Linear, transformers' Conv1D and Embedding (which casts
the gathered rows only), with backward passes that keep the bf16 weight instead of its cast.

Gradients of bf16 leaves would be bf16: too coarse. Inside `collect` they are summed in fp32 (fp64 for fp64
compute) in a `GradientSink` by parameter name; a tied parameter's uses add up. A matrix's gradient may stay two
factors (`gradients`).

Shapes: x (..., I), Linear weight (O, I), Conv1D weight (I, O), Embedding weight (V, D).
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Set
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from secondnature.model.gradients import GradientSink
from secondnature.model.products import times, times_transposed

__all__ = ["collect", "compute_at_use", "compute_dtype", "stored_linear"]


class _Wiring:
    """What all modules of one model share: the compute dtype and, while gradients are collected, their sink."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.sink: GradientSink | None = None

    def collecting(self, parameter: Tensor) -> GradientSink | None:
        """The sink, if this use of the parameter needs a gradient."""
        return self.sink if parameter.requires_grad and torch.is_grad_enabled() else None

    def read(self, name: str, parameter: Tensor | None) -> Tensor | None:
        """The parameter as the computation sees it."""
        if parameter is None:
            return None
        sink = self.collecting(parameter)
        if sink is not None:
            return _Cast.apply(parameter, self.dtype, sink, name)
        return parameter if parameter.dtype == self.dtype else parameter.to(self.dtype)


class _Cast(torch.autograd.Function):
    """A parameter in the compute dtype; its gradient goes to the sink."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, dtype: torch.dtype, sink: GradientSink, name: str) -> Tensor:
        ctx.sink, ctx.name = sink, name
        return parameter.to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.sink.add(ctx.name, gradients[0])
        return None, None, None, None


class _Matmul(torch.autograd.Function):
    """x @ W^T for W (O, I), or x @ W for W (I, O) if `transposed`; keeps W as it is stored."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, sink: GradientSink, name: str, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sink, ctx.name, ctx.transposed = sink, name, transposed
        return times(x, weight) if transposed else times_transposed(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dy = gradients[0]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = times_transposed(dy, weight) if ctx.transposed else times(dy, weight)
        flat_x, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        left, right = (flat_x, flat_dy) if ctx.transposed else (flat_dy, flat_x)
        ctx.sink.add_product(ctx.name, left, right)
        return dx, None, None, None, None


class _Gather(torch.autograd.Function):
    """Rows of an embedding table in the compute dtype."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, rows: Tensor, dtype: torch.dtype, sink: GradientSink, name: str
    ) -> Tensor:
        ctx.save_for_backward(weight, rows)
        ctx.sink, ctx.name = sink, name
        return F.embedding(rows, weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, rows = ctx.saved_tensors
        ctx.sink.add_rows(ctx.name, weight, rows.reshape(-1), gradients[0].reshape(-1, weight.shape[1]))
        return None, None, None, None, None


class _AtUse:
    """Mixed into the class of every module that owns parameters; `compute_at_use` sets these two."""

    _wiring: _Wiring
    _full_names: dict[str, str]

    def _matmul(self: Any, x: Tensor, transposed: bool) -> Tensor:
        weight: Tensor = self._parameters["weight"]
        sink = self._wiring.collecting(weight)
        if sink is not None:
            y: Tensor = _Matmul.apply(x, weight, sink, self._full_names["weight"], transposed)  # pyright: ignore[reportAssignmentType]
            return y if self.bias is None else y + self.bias
        looked_back_at = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if looked_back_at:
            wide = weight.to(self._wiring.dtype)
            return F.linear(x, wide.T if transposed else wide, self.bias)
        if not transposed:
            return times_transposed(x, weight, self.bias)
        y = times(x, weight)
        return y if self.bias is None else y + self.bias


class _Linear(_AtUse):
    def forward(self, x: Tensor) -> Tensor:
        return self._matmul(x, transposed=False)


class _Conv1D(_AtUse):
    def forward(self, x: Tensor) -> Tensor:
        return self._matmul(x, transposed=True)


class _Embedding(_AtUse):
    def forward(self: Any, rows: Tensor) -> Tensor:
        weight: Tensor = self._parameters["weight"]
        sink = self._wiring.collecting(weight)
        if sink is not None:
            return _Gather.apply(weight, rows, self._wiring.dtype, sink, self._full_names["weight"])  # pyright: ignore[reportReturnType]
        return F.embedding(rows, weight).to(self._wiring.dtype)


_OWN_FORWARD: list[tuple[type[nn.Module], type[_AtUse]]] = [
    (nn.Linear, _Linear),
    (Conv1D, _Conv1D),
    (nn.Embedding, _Embedding),
]


@cache
def _class_at_use(original: type[nn.Module], parameters: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of a module's class whose parameters read as cast values."""
    # a subclass with a forward of its own (scaled embeddings) keeps it: it reads the cast weight by name
    mixin = next((m for cls, m in _OWN_FORWARD if original.forward is cls.forward), _AtUse)

    def reader(name: str) -> property:
        return property(
            lambda self: self._wiring.read(self._full_names.get(name, ""), self._parameters[name])
        )

    return type(original.__name__, (mixin, original), {name: reader(name) for name in parameters})


def compute_at_use(model: nn.Module, dtype: torch.dtype) -> None:
    """Make the model compute in `dtype`, whatever its parameters are stored in; call once, when they are in.

    `model.parameters()`, `named_parameters()` and `state_dict()` stay the stored tensors.
    """
    wiring = _Wiring(dtype)
    first_name: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        first_name[id(parameter)] = name
    for module in model.modules():
        own = dict(module._parameters)
        if not own:
            continue
        module.__dict__["_wiring"] = wiring
        module.__dict__["_full_names"] = {n: first_name[id(p)] for n, p in own.items() if p is not None}
        module.__class__ = _class_at_use(type(module), tuple(own))
    model.__dict__["_wiring"] = wiring


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a model made by `build` computes in."""
    return model.__dict__["_wiring"].dtype


@overload
def collect(model: nn.Module) -> AbstractContextManager[dict[str, Tensor]]: ...
@overload
def collect(model: nn.Module, *, factored: Set[str]) -> AbstractContextManager[GradientSink]: ...
def collect(model: nn.Module, *, factored: Set[str] = frozenset()) -> AbstractContextManager[Any]:
    """While open, backward passes put the gradients of all parameters into the yielded sink.

    Those of Linear and Conv1D weights named in `factored` stay factors while these are smaller than the gradient.
    """
    return _collect(model, factored)


@contextlib.contextmanager
def _collect(model: nn.Module, factored: Set[str]) -> Generator[GradientSink]:
    wiring: _Wiring = model.__dict__["_wiring"]
    assert wiring.sink is None, "gradients are collected once at a time"
    wiring.sink = GradientSink(factored)
    model.requires_grad_(True)
    try:
        yield wiring.sink
    finally:
        wiring.sink = None
        model.requires_grad_(False)


def stored_linear(module: object) -> tuple[Tensor, GradientSink | None, str] | None:
    """A Linear's weight (O, I) as it is stored, the sink that its gradient goes to, and under which name.

    For computations that take it in pieces. No sink: no gradient is asked for. None: not a Linear of a model made
    by `build`, or one with a forward of its own.
    """
    if not isinstance(module, _Linear):
        return None
    weight: Tensor = module._parameters["weight"]  # pyright: ignore[reportAttributeAccessIssue]
    return weight, module._wiring.collecting(weight), module._full_names["weight"]
