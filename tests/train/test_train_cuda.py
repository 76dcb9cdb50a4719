"""The training step on a GPU: the same code in bf16, the Triton kernels inside. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, VOCAB_SIZE, read_weights, save_tiny
from torch import Tensor, nn

from secondnature.errors import NonFinite
from secondnature.model.load import build
from secondnature.model.upcast import collect
from secondnature.records import Example, OptimizerSettings
from secondnature.train.apollo import Apollo
from secondnature.train.prefix import continuation_logps, freeze, self_test
from secondnature.train.step import train_step
from secondnature.train.update import projection

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the step is not tested on one")
SETTINGS = OptimizerSettings(lr=1e-3, rank=8)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: save_tiny(make(), root / name) for name, make in CONFIGS.items()}


def on_gpu(directory: Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return build(directory, {n: t.to("cuda", dtype) for n, t in read_weights(directory).items()})


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB_SIZE, (count,), generator=generator).tolist()


def batch() -> list[Example]:
    contexts = [tokens(70, 1), tokens(33, 2)]
    return [Example(context_ids=contexts[i % 2], continuation_ids=tokens(9 + i, 10 + i)) for i in range(6)]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(("rank", "size"), [(1, 48), (8, 97), (64, 5120)])
def test_projections_have_the_same_bits(rank: int, size: int) -> None:
    here = projection(3, "w", 2, rank, size)
    there = projection(3, "w", 2, rank, size, torch.device("cuda"))
    assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_gradients_are_those_of_the_cpu(directories: dict[str, Path], kind: str) -> None:
    """In fp32, 1e-5 in all."""
    found: list[dict[str, Tensor]] = []
    for device in ("cpu", "cuda"):
        weights = {n: t.float().to(device) for n, t in read_weights(directories[kind]).items()}
        model = build(directories[kind], weights)
        with collect(model) as gradients:
            prefix = freeze(model, tokens(130, 1))
            logps = continuation_logps(model, prefix, [tokens(40, 2), tokens(7, 3)])
            (-torch.cat(logps).mean()).backward()
        found.append({n: g.cpu().double() for n, g in gradients.items()})
    wanted, mine = found
    wrong = sum(float((g - mine[n]).square().sum()) for n, g in wanted.items())
    assert wrong**0.5 <= 1e-5 * sum(float(g.square().sum()) for g in wanted.values()) ** 0.5


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_prefix_in_bf16(directories: dict[str, Path], kind: str) -> None:
    """It stands the self-test, and is read again to the bit."""
    model = on_gpu(directories[kind])
    self_test(model)
    prefix = freeze(model, tokens(70, 1))
    first, again = ([x.detach() for x in continuation_logps(model, prefix, [tokens(9, 2)])] for _ in range(2))
    assert torch.equal(first[0], again[0])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_it_learns_and_repeats_to_the_bit(directories: dict[str, Path], kind: str, recompute: bool) -> None:
    """Twenty steps; only the rows of an untied embedding that were read have moved."""
    start = bits(on_gpu(directories[kind]))
    ends: list[dict[str, Tensor]] = []
    losses: list[float] = []
    rules: dict[str, str] = {}
    for _ in range(2):
        model = on_gpu(directories[kind])
        optimizer = Apollo(model, SETTINGS, track=False)
        rules.update(optimizer.rules)
        losses = [train_step(model, optimizer, batch(), recompute=recompute).loss for _ in range(20)]
        ends.append(bits(model))
    assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())
    assert losses[-1] < losses[0] - 0.5
    assert any(not torch.equal(t, start[n]) for n, t in ends[0].items() if t.ndim == 2)
    for name, rule in rules.items():
        if rule == "rows" and "wpe" not in name:
            read = {i for e in batch() for i in (e.context_ids[-1:] + e.continuation_ids[:-1])}
            moved = (ends[0][name] != start[name]).any(dim=1).nonzero().squeeze(1).tolist()
            assert set(moved) <= read


def test_the_kernel_is_the_chunked_path(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step with and without the kernels: the same weights but for sums in another order."""
    ends: list[dict[str, Tensor]] = []
    for kernel in (True, False):
        model = on_gpu(directories["dense"])
        optimizer = Apollo(model, SETTINGS, track=False)
        if not kernel:
            monkeypatch.setattr("secondnature.train.update._in_one_kernel", lambda *_, **__: False)
        train_step(model, optimizer, batch())
        ends.append(bits(model))
    for name, mine in ends[0].items():
        same = float((mine == ends[1][name]).float().mean())
        assert same > 0.99, f"{name}: {same:.1%} of the elements have the same bits"


def test_a_bad_weight_is_met_before_any_write(directories: dict[str, Path]) -> None:
    model = on_gpu(directories["hybrid"])
    optimizer = Apollo(model, SETTINGS, track=False)
    train_step(model, optimizer, batch())
    parameter: Any = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    parameter.data[0, 0] = float("nan")
    before = bits(model)
    with pytest.raises(NonFinite, match="example"):
        train_step(model, optimizer, batch())
    for name, tensor in bits(model).items():
        assert torch.equal(tensor.view(torch.int16), before[name].view(torch.int16)), name
