"""Casts of weights: a piece at a time in one piece of memory, which nothing that backward looks back at is in."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from secondnature.model import products
from secondnature.model.products import MIN_KEPT, PIECE, cast, matmul, times, times_transposed
from secondnature.model.upcast import collect, compute_at_use

SIDE = 512
assert MIN_KEPT <= SIDE**2 <= PIECE, "these are of a size for which memory is kept"


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(SIDE, SIDE, dtype=torch.bfloat16) for _ in range(3)))
    model.requires_grad_(False)
    return model


def test_casts_share_memory() -> None:
    one, other = torch.randn(2 * SIDE, SIDE).bfloat16(), torch.randn(SIDE, SIDE).bfloat16()
    first = cast(one, torch.float32)
    assert torch.equal(first, one.float())
    second = cast(other, torch.float32)
    assert torch.equal(second, other.float())
    assert second.data_ptr() == first.data_ptr()
    wide = torch.randn(3)
    assert cast(wide, torch.float32) is wide, "nothing to cast"


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_large_matrix_is_cast_a_piece_at_a_time(rows: int) -> None:
    """Its products are those of the whole, and no more memory is kept than for two pieces."""
    torch.manual_seed(1)
    weight, bias = torch.randn(5000, 700).bfloat16(), torch.randn(5000)
    assert weight.numel() > 3 * PIECE
    x, dy = torch.randn(2, rows, 700), torch.randn(2, rows, 5000)
    cast.kept.clear()
    forward, backward = times_transposed(x, weight, bias), times(dy, weight)
    assert torch.allclose(forward.double(), x.double() @ weight.double().T + bias.double(), atol=1e-4)
    assert torch.allclose(backward.double(), dy.double() @ weight.double(), atol=1e-3)
    assert sum(kept.numel() for kept in cast.kept.values()) <= 2 * PIECE


def test_both_ways_of_multiplying_are_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """On matrices as they come in forward and backward: whole, transposed, and as parts of others."""
    torch.manual_seed(2)
    a, b = torch.randn(64, 700), torch.randn(900, 700)
    found: list[list[torch.Tensor]] = []
    for onednn in (None, torch.ops.mkldnn._linear_pointwise):
        monkeypatch.setattr(products, "_onednn", lambda onednn=onednn: onednn)
        found.append(
            [matmul(a, b.T), matmul(b, a.T), matmul(a.T, a), matmul(a[:, 100:400], b[:500, 100:400].T)]
        )
    wanted = [a @ b.T, b @ a.T, a.T @ a, a[:, 100:400] @ b[:500, 100:400].T]
    for one in found:
        assert all(torch.allclose(x, y, atol=1e-3) for x, y in zip(one, wanted, strict=True))
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert not all(torch.equal(x, y) for x, y in zip(*found, strict=True)), "one of them did all the work"


def test_memory_from_inference_mode_is_used_outside_it() -> None:
    cast.kept.clear()
    with torch.inference_mode():
        cast(torch.ones(MIN_KEPT + 1, dtype=torch.bfloat16), torch.float32)
    assert torch.equal(cast(torch.ones(MIN_KEPT, dtype=torch.bfloat16), torch.float32), torch.ones(MIN_KEPT))


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


def test_the_last_positions_of_prompts_are_multiplied_in_one_product() -> None:
    hidden = torch.randn(3, 5, 64, dtype=torch.bfloat16)
    weight = torch.randn(4096, 64, dtype=torch.bfloat16)
    for x in (hidden[:, -1:], hidden[:1, -1:]):
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            found = times_transposed(x, weight)
        assert torch.equal(found, torch.nn.functional.linear(x.contiguous(), weight))
        assert "aten::bmm" not in {event.key for event in trace.key_averages()}, (
            "the matrix is copied for each row"
        )
