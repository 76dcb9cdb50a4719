"""Casts of weights: one piece of memory for all, and none of it where a backward pass looks back at a cast."""

from __future__ import annotations

import torch
from torch import nn

from secondnature.model.upcast import MAX_KEPT, MIN_KEPT, _cast, collect, compute_at_use

SIDE = 512
assert MIN_KEPT <= SIDE**2 <= MAX_KEPT, "these are of a size for which memory is kept"


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(SIDE, SIDE, dtype=torch.bfloat16) for _ in range(3)))
    model.requires_grad_(False)
    return model


def test_casts_share_memory() -> None:
    one, other = torch.randn(2 * SIDE, SIDE).bfloat16(), torch.randn(SIDE, SIDE).bfloat16()
    first = _cast(one, torch.float32)
    assert torch.equal(first, one.float())
    second = _cast(other, torch.float32)
    assert torch.equal(second, other.float())
    assert second.data_ptr() == first.data_ptr()
    wide = torch.randn(3)
    assert _cast(wide, torch.float32) is wide, "nothing to cast"


def test_large_casts_are_given_back() -> None:
    large = torch.zeros(1, dtype=torch.bfloat16).expand(MAX_KEPT + 1)
    assert torch.equal(_cast(large, torch.float32)[:5], torch.zeros(5))
    assert all(kept.numel() <= MAX_KEPT for kept in _cast._kept.values())


def test_memory_from_inference_mode_is_used_outside_it() -> None:
    _cast._kept.clear()
    with torch.inference_mode():
        _cast(torch.ones(MIN_KEPT + 1, dtype=torch.bfloat16), torch.float32)
    assert torch.equal(_cast(torch.ones(MIN_KEPT, dtype=torch.bfloat16), torch.float32), torch.ones(MIN_KEPT))


def test_what_is_differentiated_looks_back_at_its_own_casts() -> None:
    """Three layers of one shape: with one cast for all, each gradient would be of the last layer's weight."""
    model, x = stack(), torch.randn(2, SIDE, requires_grad=True)
    reference = x.detach().double().requires_grad_(True)
    y = reference
    for layer in model:
        weight, bias = (layer.get_parameter(name).detach().double() for name in ("weight", "bias"))
        y = y @ weight.T + bias
    y.square().sum().backward()
    compute_at_use(model, torch.float32)
    model(x).square().sum().backward()
    assert x.grad is not None
    assert reference.grad is not None
    assert torch.allclose(x.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)
    x.grad = None
    with collect(model):  # and where the weights' gradients are asked for
        model(x).square().sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)
