"""The Triton kernel writes the chunked path's bits: in its interpreter on a CPU, on a GPU where there is one."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from secondnature.errors import NonFinite
from secondnature.weights import rounding
from secondnature.weights.rounding import Writer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton cannot be imported: its kernel is not tested here",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Small chunks, so that tiles and chunks cut across each other."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(rounding, "CHUNK", 1 << 10)
    from secondnature.train import kernels

    return kernels


def factors(rows: int, columns: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Multiples of a power of two: their product has the same bits in whichever order it is added up."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randint(-8, 9, (num_tokens, n), generator=generator).float() for n in (rows, columns)
    )
    return left / 4096, right / 4096


@pytest.mark.parametrize(
    ("rows", "columns", "num_tokens"), [(32, 64, 5), (70, 48, 40), (33, 144, 1), (5, 4096, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_writes_the_same_bits(
    kernels: Any, rows: int, columns: int, num_tokens: int, dtype: torch.dtype
) -> None:
    left, right = factors(rows, columns, num_tokens)
    start = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    start[0, :3] = torch.tensor([1.0, -0.0, -1.0])
    right[:, 1] = 0.0  # its column keeps its bits, -0.0 among them
    wanted, found = start.clone(), start.clone().to(DEVICE)
    writer = Writer(wanted, seed=7, name="w", step=3)
    for begin, stop in writer.chunks():
        writer.add_(begin, stop, (left.T @ right)[begin:stop])
    assert rows < 30 or len(list(writer.chunks())) > 1
    give = (left * 64).to(dtype), (right * 64).to(dtype)
    scale = torch.full((max(rows, columns),), 2.0**-12)
    given = [x.to(DEVICE) for x in (*give, scale)]
    kernels.add_factored_(found, *given, decay=0.0, seed=7, name="w", step=3)
    assert torch.equal(found.cpu().view(torch.int16), wanted.view(torch.int16))
    assert not torch.equal(wanted, start)


def test_weight_decay_is_part_of_the_pass(kernels: Any) -> None:
    """A decay that is a power of two has no rounding of its own."""
    left, right = factors(32, 64, 4)
    start = (torch.randn(32, 64, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    wanted, found = start.clone(), start.clone().to(DEVICE)
    writer = Writer(wanted, seed=7, name="w", step=3)
    for begin, stop in writer.chunks():
        change = (left.T @ right)[begin:stop]
        writer.add_(begin, stop, change - start[begin:stop].float() * 2.0**-6)
    given = [x.to(DEVICE) for x in (left, right, torch.ones(64))]
    kernels.add_factored_(found, *given, decay=2.0**-6, seed=7, name="w", step=3)
    assert torch.equal(found.cpu().view(torch.int16), wanted.view(torch.int16))


def test_overflow_is_named(kernels: Any) -> None:
    weight = torch.full((32, 64), 3.38e38).bfloat16().to(DEVICE)
    ones, key = torch.ones(1, 64, device=DEVICE), {"decay": 0.0, "seed": 0, "name": "w", "step": 0}
    with pytest.raises(NonFinite, match="tensor w"):
        kernels.add_factored_(weight, ones[:, :32] * 1e38, ones * 3, ones[0], **key)
    with pytest.raises(NonFinite, match="tensor w"):
        kernels.add_dense_(weight, torch.full((32, 64), 3e38, device=DEVICE), **key)
    assert torch.equal(weight, torch.full_like(weight, 3.38e38))


@pytest.mark.parametrize("channels", ["rows", "columns"])
def test_channels_are_scaled(kernels: Any, channels: str) -> None:
    rows, columns = (80, 48) if channels == "rows" else (48, 80)
    left, right = factors(rows, columns, 4)
    scale = torch.randint(1, 5, (80,), generator=torch.Generator().manual_seed(2)).float()
    wanted = torch.zeros(rows, columns).bfloat16()
    found = wanted.clone().to(DEVICE)
    change = (left.T @ right) * (scale.unsqueeze(1) if channels == "rows" else scale)
    writer = Writer(wanted, seed=7, name="w", step=3)
    for begin, stop in writer.chunks():
        writer.add_(begin, stop, change[begin:stop])
    given = [x.to(DEVICE) for x in (left, right, scale)]
    kernels.add_factored_(found, *given, decay=0.0, seed=7, name="w", step=3)
    assert torch.equal(found.cpu().view(torch.int16), wanted.view(torch.int16))


@pytest.mark.parametrize("shape", [(70, 48), (3008,), (5, 4096), (36, 1, 4), (48,)])
def test_a_whole_change_gives_the_same_bits(kernels: Any, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    change = torch.randn(shape, generator=generator) * 1e-4
    change.view(-1)[::5] = 0.0
    wanted = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    wanted.view(-1)[:6] = torch.tensor([1.0, -0.0, -1.0, 0.0, 3e38, -1e-38])
    found = wanted.clone().to(DEVICE)
    writer = Writer(wanted, seed=7, name="w", step=3)
    flat = change.reshape(writer.rows_AB.shape)
    for begin, stop in writer.chunks():
        writer.add_(begin, stop, flat[begin:stop])
    kernels.add_dense_(found, change.to(DEVICE), decay=0.0, seed=7, name="w", step=3)
    assert torch.equal(found.cpu().view(torch.int16), wanted.view(torch.int16))


def test_what_it_does_not_take(kernels: Any) -> None:
    assert kernels.fits(torch.zeros(3, 32, dtype=torch.bfloat16))
    for other in (torch.zeros(3, 32), torch.zeros(3, 33).bfloat16(), torch.zeros(32).bfloat16()):
        assert not kernels.fits(other)
    assert kernels.fits_dense(torch.zeros(32).bfloat16())
    for other in (torch.zeros(32), torch.zeros(36).bfloat16(), torch.zeros(2, 33, 48).bfloat16().mT):
        assert not kernels.fits_dense(other)
