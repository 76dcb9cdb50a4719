"""The factored form: equal to the dense one, without the gradient ever being formed, resumable to the bit."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, VOCAB_SIZE, in_arena, read_weights, save_tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secondnature.errors import NonFinite
from secondnature.model.gradients import Factors, Gradient, GradientSink, Rows
from secondnature.model.load import build
from secondnature.model.upcast import collect
from secondnature.records import Example, OptimizerSettings
from secondnature.train.apollo import Apollo
from secondnature.train.guard import check_tensors, limit_norm_
from secondnature.train.state import load_optimizer, save_optimizer
from secondnature.train.step import train_step
from secondnature.weights import rounding

MATRIX = "model.layers.1.mlp.up_proj.weight"


class Dense(Apollo):
    """The same optimizer, which asks for whole gradients."""

    @property
    def factored(self) -> frozenset[str]:
        return frozenset()


class Recording(Apollo):
    """It also keeps the gradients that it was given; `step` may use theirs up."""

    seen: dict[str, Gradient]

    def step(self, gradients: Mapping[str, Gradient], **options: Any) -> None:
        self.seen = {n: g.clone() if isinstance(g, Tensor) else g for n, g in gradients.items()}
        super().step(gradients, **options)


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(2, VOCAB_SIZE), k=count)


def batch(step: int = 0) -> list[Example]:
    """Two contexts and few enough tokens for the factors to be smaller than the gradients."""
    return [
        Example(context_ids=tokens(20, step), continuation_ids=tokens(5, step + 1)),
        Example(context_ids=tokens(70, step + 2), continuation_ids=tokens(4, step + 3), weight=2.0),
    ]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: save_tiny(make(), root / name) for name, make in CONFIGS.items()}


def wide_model(directory: Path) -> nn.Module:
    """With fp32 weights: no rounding, so that two ways of computing can be compared."""
    return build(directory, {n: t.float() for n, t in read_weights(directory).items()})


@pytest.mark.parametrize("rank", [8, 1])
@pytest.mark.parametrize("kind", ["hybrid", "dense", "gpt2"])
def test_factored_equals_dense_after_20_steps(directories: dict[str, Path], kind: str, rank: int) -> None:
    """Each step a batch over two prefixes; projections are drawn anew and the limiter works on the way.

    Both optimizers see the gradients of one model: what they do with them is compared, not how training amplifies.
    """
    chosen = OptimizerSettings(lr=1e-3, rank=rank, proj_refresh=7, weight_decay=0.01)
    models = [wide_model(directories[kind]) for _ in range(2)]
    start = {n: p.detach().clone() for n, p in models[0].named_parameters()}
    factored, dense = Recording(models[0], chosen), Apollo(models[1], chosen)
    for step in range(20):
        train_step(models[0], factored, batch(step))
        dense.step({n: g if isinstance(g, Tensor) else g.dense() for n, g in factored.seen.items()})
    kept = {n for n, g in factored.seen.items() if not isinstance(g, Tensor)}
    small = {n for n in factored.factored if min(factored.parameters[n].shape) < 9}
    assert kept == factored.factored - small, "9 tokens: of smaller matrices the gradient is cheaper"
    assert len(kept) >= 12
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (a - b).norm() <= 1e-5 * (b - start[name]).norm(), name
    for name, state in factored.state_dict()[0].items():
        if name.endswith(":level"):
            assert float(state) == pytest.approx(float(dense.state_dict()[0][name]), rel=1e-5)


@pytest.mark.parametrize("kind", ["hybrid", "dense", "gpt2"])
def test_the_whole_training_is_the_same(directories: dict[str, Path], kind: str) -> None:
    """Eight steps, each model on its own gradients: the same losses."""
    losses = []
    for optimizer in (Apollo, Dense):
        model = wide_model(directories[kind])
        mine = optimizer(model, OptimizerSettings(lr=1e-3, rank=8))
        losses.append([train_step(model, mine, batch(), max_grad_norm=1.0).loss for _ in range(8)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.5


def test_factors_are_the_gradient(directories: dict[str, Path]) -> None:
    """Of every model and matrix, accumulated over backward passes that share residual streams."""
    for kind, directory in directories.items():
        _, model = in_arena(directory)
        names = Apollo(model, OptimizerSettings(rank=8)).factored
        texts = [torch.tensor([tokens(7, 1)]), torch.tensor([tokens(9, 2)])]
        with collect(model, factored=names) as found:
            for text in texts:
                model(text, labels=text).loss.backward()
        with collect(model) as wanted:
            for text in texts:
                model(text, labels=text).loss.backward()
        assert set(found) == set(wanted)
        for name, whole in wanted.items():
            mine = found[name]
            assert isinstance(mine, Tensor) == (name not in names), name
            assert isinstance(mine, Rows) == (
                kind != "hybrid" and name.endswith(("embed_tokens.weight", "wpe.weight"))
            )
            assert tuple(mine.shape) == tuple(whole.shape)
            if not isinstance(mine, Tensor):
                assert float((mine.dense() - whole).norm()) <= 1e-6 * float(whole.norm()), name
                assert float(mine.norm()) == pytest.approx(float(whole.norm()), rel=1e-5), f"{kind} {name}"
        total = math.sqrt(sum(float(t.norm()) ** 2 for t in wanted.values()))
        assert check_tensors(found, "the gradient") == pytest.approx(total, rel=1e-5)
        limit_norm_(found, total, total / 4)
        assert check_tensors(found, "the gradient") == pytest.approx(total / 4, rel=1e-5)


def test_the_sink_keeps_whichever_is_smaller() -> None:
    """S (A + B) < A B, over the whole update: 48 x 80 turns at 30 tokens."""
    generator = torch.Generator().manual_seed(0)

    def factors(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, 48, generator=generator), torch.randn(count, 80, generator=generator)

    sink = GradientSink(frozenset({"w"}))
    wanted = torch.zeros(48, 80)
    for count, kept in ((10, True), (19, True), (1, False), (3, False)):
        left, right = factors(count)
        sink.add_product("w", left, right)
        wanted += left.T @ right
        found = sink["w"]
        assert isinstance(found, Factors) is kept
        whole = found.dense() if not isinstance(found, Tensor) else found
        torch.testing.assert_close(whole, wanted, rtol=0, atol=1e-4)
    sink.add_product("other", *factors(2))
    assert isinstance(sink["other"], Tensor)
    mixed = GradientSink(frozenset({"w"}))
    left, right = factors(2)
    mixed.add_product("w", left, right)
    mixed.add("w", torch.ones(48, 80))
    found = mixed["w"]
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, left.T @ right + 1)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view and not func._schema.name.endswith("_"):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_tensor_of_a_matrixs_size_is_made(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning and writing hold factors and chunks only; with the task vector they hold what it needs."""
    monkeypatch.setattr(rounding, "CHUNK", 256)
    monkeypatch.setattr(rounding, "scratch", rounding._Scratch())  # pyright: ignore[reportPrivateUsage]
    _, model = in_arena(directories["dense"])
    smallest = 24 * 48
    optimizer = Apollo(model, OptimizerSettings(rank=8), track=False)
    sink = GradientSink(optimizer.factored)
    generator = torch.Generator().manual_seed(0)
    for name in optimizer.factored:
        rows, columns = optimizer.parameters[name].shape
        assert rows * columns >= smallest
        if optimizer.rules[name] == "rows":
            gradient = torch.randn(4, columns, generator=generator)
            sink.add_rows(name, optimizer.parameters[name], torch.tensor([3, 50, 3, 8]), gradient)
            continue
        sink.add_product(
            name, torch.randn(4, rows, generator=generator), torch.randn(4, columns, generator=generator)
        )
    optimizer.step(sink)  # makes the state
    with _Largest() as largest:
        optimizer.step(sink)
    assert 0 < largest.numel < smallest, "R x N moments of 8 x 97 are the largest"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nothing_is_written_if_a_factor_is_not_finite(
    directories: dict[str, Path], side: int, bad: float
) -> None:
    arena, model = in_arena(directories["dense"])
    before = {n: t.clone() for n, t in arena.tensors.items()}
    optimizer = Apollo(model, OptimizerSettings(rank=8))
    sink = GradientSink(optimizer.factored)
    for name in sorted(optimizer.factored):
        rows, columns = optimizer.parameters[name].shape
        sides = [torch.ones(3, rows), torch.ones(3, columns)]
        if name == MATRIX:
            sides[side][1, 2] = bad
        sink.add_product(name, *sides)
    with pytest.raises(NonFinite, match=f"example 2: the gradient of {MATRIX} is not finite"):
        check_tensors(sink, "example 2: the gradient")
    with pytest.raises(NonFinite, match=f"the update of {MATRIX} is not finite"):
        optimizer.step(sink)
    assert all(torch.equal(t, before[n]) for n, t in arena.tensors.items())
    assert optimizer.state_dict()[0] == {}
    assert optimizer.steps == 0


@pytest.mark.parametrize("rank", [8, 1])
def test_resumes_to_the_bit(directories: dict[str, Path], tmp_path: Path, rank: int) -> None:
    """N steps, weights and state into files, M steps by a new optimizer on a new model: N + M steps to the bit."""
    chosen = OptimizerSettings(lr=1e-3, rank=rank, proj_refresh=3)
    path = tmp_path / "optimizer.safetensors"
    arena, model = in_arena(directories["hybrid"])
    optimizer = Recording(model, chosen, seed=11)
    for step in range(7):
        train_step(model, optimizer, batch(step), writing=arena.writing)
        if step == 3:
            save_optimizer(optimizer, path)
            kept = {n: t.clone() for n, t in arena.tensors.items()}
    assert any(isinstance(g, Factors) for g in optimizer.seen.values())
    other_arena, other_model = in_arena(directories["hybrid"])
    other_arena.write(kept)  # pyright: ignore[reportPossiblyUnboundVariable]
    other = Apollo(other_model, chosen)
    load_optimizer(other, path)
    for step in range(4, 7):
        train_step(other_model, other, batch(step), writing=other_arena.writing)
    for name, tensor in arena.tensors.items():
        assert torch.equal(tensor.view(torch.int16), other_arena.tensors[name].view(torch.int16)), name
    one, two = optimizer.state_dict(), other.state_dict()
    assert one[1] == two[1]
    assert one[0].keys() == two[0].keys()
    assert all(torch.equal(t, two[0][k]) for k, t in one[0].items())


@pytest.mark.parametrize("form", ["factored", "dense"])
@pytest.mark.parametrize("lr", [1e-5, 5e-7])
def test_the_intended_displacement_arrives(form: str, lr: float) -> None:
    """60 steps of a bf16 matrix of trained size: what was written, projected on what fp32 weights do.

    The share's standard deviation is sqrt(gap / (lr * elements * steps)): 0.7 % at 5e-7.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(256, 384, generator=generator) * 0.02
    shared = torch.randn(20, 256, generator=generator), torch.randn(20, 384, generator=generator)
    moved: dict[torch.dtype, Tensor] = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = nn.Linear(384, 256, bias=False)
        model.weight = nn.Parameter(start.bfloat16().to(dtype))
        optimizer = Apollo(model, OptimizerSettings(lr=lr, rank=8), track=False)
        for step in range(60):
            noise = torch.Generator().manual_seed(step)
            left, right = (t + 0.5 * torch.randn(t.shape, generator=noise) for t in shared)
            gradient = Factors(left, right)
            optimizer.step({"weight": gradient if form == "factored" else gradient.dense()})
        moved[dtype] = model.weight.detach().double() - start.bfloat16().double()
    meant = moved[torch.float32]
    kept = float((moved[torch.bfloat16] * meant).sum() / meant.square().sum())
    assert 0.97 <= kept <= 1.03
