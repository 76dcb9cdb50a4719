"""ApolloOptimizer: the trainer's arithmetic behind torch's own interface, in any training loop."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from test_train_apollo import Layers, gradients
from torch import Tensor, nn

from secondnature.errors import BadCheckpoint, ConfigError, NonFinite
from secondnature.records import OptimizerSettings
from secondnature.train.apollo import Apollo
from secondnature.train.optimizer import ApolloOptimizer


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """As the trainer would treat them: the embedding's rows on their own."""
    named = dict(model.named_parameters())
    table = [("table.weight", named.pop("table.weight"))]
    return [{"params": list(named.items())}, {"params": table, "rule": "rows"}]


def give(model: nn.Module, found: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = found[name].to(parameter.dtype)


@pytest.mark.parametrize("rank", [4, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_gives_the_trainers_bits(dtype: torch.dtype, rank: int) -> None:
    """Every rule, twelve steps, a zero gradient and a limited step among them."""
    one, other = Layers(dtype), Layers(dtype)
    apollo = Apollo(one, OptimizerSettings(lr=1e-2, rank=rank, weight_decay=0.1, proj_refresh=5), seed=3)
    optimizer = ApolloOptimizer(groups(other), lr=1e-2, rank=rank, weight_decay=0.1, proj_refresh=5, seed=3)
    for step in range(12):
        found = gradients(one, step, scale=0.0 if step == 3 else 10 ** (step % 3))
        apollo.step({n: g.to(dtype) for n, g in found.items()})
        give(other, found)
        optimizer.step()
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert b.grad is not None
        assert torch.equal(b.grad, found[name].to(dtype)), "the gradient is the caller's"  # pyright: ignore[reportPossiblyUnboundVariable]


def test_it_trains_a_model_with_a_scheduler() -> None:
    """A regression in bf16 with names from the module, torch's own schedule and closure."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24)).to(torch.bfloat16)
    x, target = torch.randn(64, 24).bfloat16(), torch.randn(64, 24).bfloat16() * 0.3
    optimizer = ApolloOptimizer(model.named_parameters(), lr=2e-2, rank=4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=150)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x).float() - target.float()).square().mean()
        loss.backward()
        return loss

    losses = []
    for _ in range(150):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert losses[-1] < 0.4 * losses[0]
    assert optimizer.param_groups[0]["lr"] < 1e-5
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_it_resumes_to_the_bit() -> None:
    """In bf16, where torch's own `load_state_dict` would cast the moments to bf16 and counts with them."""
    straight, cut = Layers(torch.bfloat16), Layers(torch.bfloat16)
    options: dict[str, Any] = {"lr": 1e-2, "rank": 4, "proj_refresh": 4, "seed": 11}
    optimizer, first = ApolloOptimizer(groups(straight), **options), ApolloOptimizer(groups(cut), **options)
    for step in range(12):
        give(straight, gradients(straight, step))
        optimizer.step()
    for step in range(6):
        give(cut, gradients(cut, step))
        first.step()
    second = ApolloOptimizer(groups(cut), lr=1.0, rank=4, seed=0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(6, 12):
        give(cut, gradients(cut, step))
        second.step()
    for (name, a), b in zip(straight.named_parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b), name
    for state in second.state.values():
        assert state["m"].dtype == state["v"].dtype == torch.float32
        assert state["steps"].dtype in (torch.int64, torch.int32)


def test_another_models_state_is_refused() -> None:
    model, other = Layers(), Layers()
    optimizer = ApolloOptimizer(model.named_parameters(), rank=4)
    give(model, gradients(model, 0))
    optimizer.step()
    other.wide = nn.Parameter(torch.zeros(24, 41))
    for params in (list(other.named_parameters()), list(model.parameters())):
        foreign = ApolloOptimizer(params, rank=4)
        with pytest.raises(BadCheckpoint, match="of other parameters: fingerprint"):
            foreign.load_state_dict(optimizer.state_dict())
        assert not foreign.state


def test_nothing_is_written_if_one_gradient_is_not_finite() -> None:
    model = Layers(torch.bfloat16)
    optimizer = ApolloOptimizer(model.named_parameters(), lr=1e-2, rank=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = gradients(model, 0)
    found["small"][1, 1] = math.inf
    give(model, found)
    with pytest.raises(NonFinite, match="the update of small is not finite"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not optimizer.state


def test_what_cannot_be_is_refused() -> None:
    model = Layers()
    with pytest.raises(ConfigError, match=r"rank 24 fits no matrix; the largest .* 24"):
        ApolloOptimizer(model.parameters(), rank=24)
    with pytest.raises(ConfigError, match="no matrix"):
        ApolloOptimizer([model.norm])
    for options in (
        {"rank": 0},
        {"betas": (0.9, 1.0)},
        {"eps": 0.0},
        {"lr": -1.0},
        {"norm_growth_limit": 1.0},
    ):
        with pytest.raises(ConfigError, match=next(iter(options))):
            ApolloOptimizer(model.parameters(), **{"rank": 4, **options})
    with pytest.raises(ConfigError, match="rule 'sgd'"):
        ApolloOptimizer([{"params": [model.wide], "rule": "sgd"}], rank=4)
    with pytest.raises(ConfigError, match="parameter 0 is no matrix"):
        ApolloOptimizer([{"params": [model.norm], "rule": "rows"}], rank=4)
    with pytest.raises(ConfigError, match="float64"):
        ApolloOptimizer([torch.zeros(9, 9, dtype=torch.float64, requires_grad=True)], rank=4)
