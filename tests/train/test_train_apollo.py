"""APOLLO: equal to a transcription of the paper, without the known ways to freeze, resumable to the bit."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import dense_config, gpt2_config, hybrid_config, in_arena, read_weights, save_tiny
from torch import Tensor, nn

from secondnature.errors import BadCheckpoint, ConfigError, NonFinite
from secondnature.model.gradients import Factors
from secondnature.model.load import build
from secondnature.records import OptimizerSettings
from secondnature.train import update
from secondnature.train.apollo import Apollo
from secondnature.train.update import projection

SHAPE_TALL, SHAPE_WIDE = (40, 24), (24, 40)


class Layers(nn.Module):
    """One tensor of each kind of rule."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype))

        self.tall, self.wide = parameter(*SHAPE_TALL), parameter(*SHAPE_WIDE)
        self.small, self.norm = parameter(4, 40), parameter(40)
        self.table = nn.Embedding(12, 24)
        self.table.weight = parameter(12, 24)
        self.mixer = nn.Module()
        self.mixer.A_log = parameter(6)


def settings(**changes: Any) -> OptimizerSettings:
    return OptimizerSettings(**{"lr": 1e-2, "rank": 4, **changes})


def gradients(model: nn.Module, step: int, scale: float = 1.0) -> dict[str, Tensor]:
    """A drifting mean plus noise, as a training run has."""
    generator = torch.Generator().manual_seed(1000 + step)
    found = {}
    for name, p in model.named_parameters():
        mean = torch.sin(torch.arange(p.numel()).float()).view(p.shape)
        found[name] = scale * (mean + torch.randn(p.shape, generator=generator))
    return found


def paper(w: Tensor, grads: list[Tensor], seed: int, name: str, chosen: OptimizerSettings) -> Tensor:
    """Algorithm 1 of arXiv 2412.05270 in fp64: the smaller side projected, channel-wise, or by tensor at rank 1."""
    w = w.double().clone()
    flip = w.shape[0] > w.shape[1]
    rank, lr, (beta1, beta2) = chosen.rank, chosen.lr or 1e-5, chosen.betas
    m: Any = 0.0
    v: Any = 0.0
    last = None
    for t, grad in enumerate(grads, start=1):
        g = grad.double().T if flip else grad.double()
        p = projection(seed, name, (t - 1) // chosen.proj_refresh, rank, g.shape[0]).double()
        r = p @ g
        m, v = beta1 * m + (1 - beta1) * r, beta2 * v + (1 - beta2) * r**2
        adam = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + chosen.eps)
        s = adam.norm() / r.norm() if rank == 1 else adam.norm(dim=0) / r.norm(dim=0)
        update = chosen.scale * math.sqrt(g.shape[0] / rank) * g * s
        if last is not None:
            noise = chosen.scale * math.sqrt(update.numel() * (1 - beta1) / (1 + beta1))
            update *= min(1.0, chosen.norm_growth_limit * max(last, noise) / float(update.norm()))
        last = float(update.norm())
        update = (update.T if flip else update) + chosen.weight_decay * w
        w -= lr * min(1.0, t / max(1, chosen.warmup_steps)) * update
    return w


OPTIONS: list[dict[str, Any]] = [
    {},
    {"rank": 1},
    {"rank": 8},
    {"lr": 3e-3},
    {"betas": (0.5, 0.999)},
    {"betas": (0.9, 0.95)},
    {"eps": 0.3},
    {"weight_decay": 0.3},
    {"warmup_steps": 9},
    {"scale": 0.25},
    {"proj_refresh": 3},
    {"norm_growth_limit": 1.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["tall", "wide"])
def test_equals_the_paper_with_every_option(name: str, options: dict[str, Any]) -> None:
    """25 steps over three projections, with the limiter at work; and each option makes a difference."""
    plain = settings(proj_refresh=10)
    chosen = settings(**{"proj_refresh": 10, **options})
    model = Layers()
    start = getattr(model, name).detach().clone()
    optimizer = Apollo(model, chosen, seed=5)
    seen = []
    for step in range(25):
        grads = gradients(model, step, scale=10 ** (step % 3))
        seen.append(grads[name].clone())
        optimizer.step({name: grads[name]})
    wanted = paper(start, seen, 5, name, chosen)
    moved = (wanted - start.double()).norm()
    assert (getattr(model, name).detach().double() - wanted).norm() <= 1e-5 * moved
    if options:
        assert (paper(start, seen, 5, name, plain) - wanted).norm() > 0.01 * moved


def test_the_update_is_as_long_as_adams() -> None:
    """alpha = sqrt(min(a, b) / r) per tensor: the first step of a full-rank Adam is lr per element."""
    model = Layers()
    optimizer = Apollo(model, settings(rank=16))
    optimizer.step(gradients(model, 0))
    for moved in optimizer.moved():
        per_element = moved.intended / math.sqrt(model.get_parameter(moved.name).numel())
        assert per_element == pytest.approx(1e-2, rel=0.15), moved.name


def test_bias_is_corrected_before_the_limiter() -> None:
    """With a constant gradient every step, from the first on, has the same length: no hidden warm-up."""
    model = Layers()
    optimizer = Apollo(model, settings())
    lengths = []
    for _ in range(12):
        before = model.wide.detach().clone()
        optimizer.step({"wide": gradients(model, 0)["wide"]})
        lengths.append((model.wide.detach() - before).norm().item())
    assert lengths == pytest.approx([lengths[0]] * 12, rel=1e-3)


def test_warm_up_is_linear() -> None:
    model = Layers()
    optimizer = Apollo(model, settings(warmup_steps=4))
    lengths = []
    for _ in range(6):
        before = model.wide.detach().clone()
        optimizer.step({"wide": gradients(model, 0)["wide"]})
        lengths.append((model.wide.detach() - before).norm().item())
    assert [x / lengths[-1] for x in lengths] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1], rel=1e-3)


def test_every_lesson_warms_up_anew() -> None:
    """Also one that continues where another ended: the state's own steps go on, they key the rounding."""
    model = Layers()
    earlier = Apollo(model, settings())
    for _ in range(6):
        earlier.step({"wide": gradients(model, 0)["wide"]})
    optimizer = Apollo(model, settings(warmup_steps=4))
    optimizer.load_state(*earlier.state_dict())
    lengths = []
    for _ in range(6):
        before = model.wide.detach().clone()
        optimizer.step({"wide": gradients(model, 0)["wide"]})
        lengths.append((model.wide.detach() - before).norm().item())
    assert [x / lengths[-1] for x in lengths] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1], rel=1e-3)
    assert optimizer.steps == 12


def test_growth_is_limited() -> None:
    """Against a long-standing small gradient a huge one grows the update by 1 % a step at most."""
    model = Layers()
    optimizer = Apollo(model, settings())
    lengths = []
    for step in range(60):
        before = model.wide.detach().clone()
        optimizer.step({"wide": gradients(model, step, scale=1.0 if step < 40 else 1e3)["wide"]})
        lengths.append((model.wide.detach() - before).norm().item())
    floor = 1e-2 * math.sqrt(24 * 40 * 0.1 / 1.9)
    for last, now in itertools.pairwise(lengths):
        assert now <= 1.0101 * max(last, floor)
    assert max(lengths[40:]) > 1.05 * lengths[39], "the limiter had nothing to limit"


@pytest.mark.parametrize("scale", [0.0, 1e-12])
def test_an_empty_gradient_does_not_freeze_a_tensor(scale: float) -> None:
    """Step 3 has no signal and makes no step; all later ones are at least two thirds as long as before."""
    lengths = lengths_with(3, scale)
    assert lengths[2] < 0.01 * lengths[1]
    assert min(lengths[3:]) > 2 / 3 * lengths[1]


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize("rank", [4, 1])
def test_a_gradient_far_below_the_usual_takes_no_full_step(rank: int, form: str) -> None:
    """The direction is the gradient's own and the length is the moments': momentum must not carry noise."""
    lengths = lengths_with(6, 1e-4, rank=rank, factored=form == "factored")
    assert lengths[5] < 0.05 * lengths[4]
    assert min(lengths[6:]) > 0.8 * lengths[4], "the limiter takes the gated step for the usual length"


def test_ordinary_gradients_pass_the_gate() -> None:
    """A fall to a twentieth, as within a lesson that succeeds, is not held back."""
    lengths = lengths_with(6, 0.05)
    assert lengths[5] > 0.8 * lengths[4]


def lengths_with(number: int, scale: float, *, rank: int = 4, factored: bool = False) -> list[float]:
    """How far `wide` moves in each of 9 steps with one gradient, which is scaled in one of them (from 1)."""
    model = Layers()
    optimizer = Apollo(model, settings(rank=rank))
    lengths: list[float] = []
    for step in range(1, 10):
        before = model.wide.detach().clone()
        whole = gradients(model, 0, scale=scale if step == number else 1.0)["wide"]
        optimizer.step({"wide": Factors(torch.eye(24), whole) if factored else whole})
        lengths.append((model.wide.detach() - before).norm().item())
    return lengths


def test_a_gradient_of_zero_leaves_everything_as_it_is() -> None:
    model = Layers(torch.bfloat16)
    optimizer = Apollo(model, settings(weight_decay=0.1))
    optimizer.step(gradients(model, 0))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = {k: t.clone() for k, t in optimizer.state_dict()[0].items()}
    optimizer.step({n: torch.zeros(p.shape) for n, p in model.named_parameters()})
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(t, state[k]) for k, t in optimizer.state_dict()[0].items())


def test_rows_without_gradient_keep_their_bits_and_catch_up_in_full_steps() -> None:
    model = Layers(torch.bfloat16)
    optimizer = Apollo(model, settings())
    before = model.table.weight.detach().clone()
    for _ in range(30):
        grad = torch.zeros(12, 24)
        grad[3] = 1
        optimizer.step({"table.weight": grad})
    others = [i for i in range(12) if i != 3]
    assert torch.equal(model.table.weight[others].view(torch.int16), before[others].view(torch.int16))
    grad = torch.zeros(12, 24)
    grad[7] = 1
    optimizer.step({"table.weight": grad})
    assert optimizer.task_vector is not None
    first_step = optimizer.task_vector["table.weight"][7]
    torch.testing.assert_close(first_step, torch.full((24,), -1e-2), rtol=1e-4, atol=0)


def test_small_gradients_beside_large_ones_take_small_steps_where_floored() -> None:
    """A_log, dt_bias and a tied embedding: noise is not blown up to full steps."""
    model = Layers()
    optimizer = Apollo(model, settings())
    optimizer.step({"mixer.A_log": torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1e-6])})
    assert optimizer.task_vector is not None
    steps = optimizer.task_vector["mixer.A_log"].abs()
    assert steps[:5].tolist() == pytest.approx([1e-2] * 5, rel=1e-3)
    assert steps[5] < 1e-6


def test_rules_follow_from_shape_and_use(tmp_path: Path) -> None:
    rules: dict[str, dict[str, str]] = {}
    for name, config in (("hybrid", hybrid_config()), ("dense", dense_config()), ("gpt2", gpt2_config())):
        _, model = in_arena(save_tiny(config, tmp_path / name))
        rules[name] = dict(Apollo(model, settings(rank=8)).rules)
    layer = "model.layers.0.linear_attn"
    assert rules["hybrid"]["model.embed_tokens.weight"] == "floored"
    assert rules["hybrid"][f"{layer}.A_log"] == rules["hybrid"][f"{layer}.dt_bias"] == "floored"
    assert rules["hybrid"][f"{layer}.in_proj_qkv.weight"] == "apollo"
    assert rules["hybrid"][f"{layer}.in_proj_a.weight"] == "adam", "four heads: smaller than the rank"
    assert rules["hybrid"][f"{layer}.conv1d.weight"] == "adam"
    assert rules["dense"]["model.embed_tokens.weight"] == "rows"
    assert rules["dense"]["lm_head.weight"] == "apollo"
    assert rules["gpt2"]["transformer.wte.weight"] == "floored"
    assert rules["gpt2"]["transformer.wpe.weight"] == "rows"
    assert rules["gpt2"]["transformer.h.0.mlp.c_fc.weight"] == "apollo"


def test_a_rank_that_fits_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank 24 fits no matrix of the model; the largest .* 24"):
        Apollo(Layers(), settings(rank=24))
    with pytest.raises(ValueError, match="lr"):
        OptimizerSettings(lr=0.0)


def test_projections_depend_on_name_epoch_and_seed_only() -> None:
    first = projection(0, "a", 0, 4, 30)
    assert first.unique().tolist() == [-0.5, 0.5]
    assert torch.equal(first, projection(0, "a", 0, 4, 30))
    for other in [(1, "a", 0), (0, "b", 0), (0, "a", 1)]:
        assert not torch.equal(first, projection(*other, 4, 30))
    wide = projection(0, "a", 0, 64, 4096)
    assert abs(wide.mean().item()) < 5 / math.sqrt(64 * 64 * 4096)


def test_projections_are_kept_within_a_bound_and_those_of_the_present_run_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = 4 * 6 * 30
    kept: dict[Any, Any] = {}
    monkeypatch.setattr(update, "_kept", kept)
    monkeypatch.setattr(update, "_KEPT_BYTES", 5 * one)

    def use(seed: int, name: str, epoch: int = 0) -> bool:
        """Whether it was at hand."""
        before = kept.get(((seed, 6), name, 30, "cpu"))
        found = update._kept_projection(seed, name, epoch, 6, 30, torch.device("cpu"))
        assert torch.equal(found, projection(seed, name, epoch, 6, 30))
        assert sum(p_RM.nbytes for _, p_RM in kept.values()) <= 5 * one
        return before is not None and before[1] is found

    for name in "abc":
        assert not use(1, name)
    assert use(1, "a")  # so that `b` is the one used longest ago
    for name in "de":
        assert not use(2, name)
    assert not use(2, "f")  # takes the place of `b`
    assert [key[1] for key in kept] == ["c", "a", "d", "e", "f"]
    for name in "gh":
        assert not use(2, name)
    # nothing of another run is left to go: what is there stays, or each would be thrown out before it is used again
    assert not use(2, "i")
    assert all(use(2, name) for name in "defgh")
    assert not use(2, "i")
    assert not use(2, "d", epoch=1)  # in its own place
    assert use(2, "d", epoch=1)


@pytest.mark.parametrize("rank", [4, 1])
def test_resumes_to_the_bit(tmp_path: Path, rank: int) -> None:
    """N steps, a safetensors file, M steps in another object: the same bits as N + M steps."""
    chosen = settings(rank=rank, proj_refresh=4)
    straight, cut = Layers(torch.bfloat16), Layers(torch.bfloat16)
    optimizer = Apollo(straight, chosen, seed=11)
    for step in range(12):
        optimizer.step(gradients(straight, step))
    first = Apollo(cut, chosen, seed=11)
    for step in range(6):
        first.step(gradients(cut, step))
    tensors, metadata = first.state_dict()
    save_file(tensors, tmp_path / "optimizer.safetensors", metadata)
    second = Apollo(cut, chosen)
    with safe_open(tmp_path / "optimizer.safetensors", framework="pt") as stored:
        second.load_state({k: stored.get_tensor(k) for k in stored.keys()}, stored.metadata())  # noqa: SIM118
    for step in range(6, 12):
        second.step(gradients(cut, step))
    for (name, a), b in zip(straight.named_parameters(), cut.parameters(), strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16)), name
    one, other = optimizer.state_dict(), second.state_dict()
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(t, other[0][k]) for k, t in one[0].items())


def test_a_foreign_state_is_refused() -> None:
    model = Layers()
    optimizer = Apollo(model, settings())
    optimizer.step(gradients(model, 0))
    tensors, metadata = optimizer.state_dict()
    with pytest.raises(BadCheckpoint, match="shape"):
        Apollo(model, settings(rank=8)).load_state(tensors, metadata)
    with pytest.raises(BadCheckpoint, match="format"):
        Apollo(model, settings()).load_state(tensors, {})
    other = Layers()
    other.wide = nn.Parameter(torch.zeros(24, 41))
    with pytest.raises(BadCheckpoint, match="of another model: fingerprint"):
        Apollo(other, settings()).load_state(tensors, metadata)
    with pytest.raises(BadCheckpoint, match="fingerprint None"):
        Apollo(model, settings()).load_state(
            tensors, {k: v for k, v in metadata.items() if k != "fingerprint"}
        )
    with pytest.raises(BadCheckpoint, match="incomplete or of another model"):
        Apollo(model, settings()).load_state({"nobody:m": torch.zeros(1)}, metadata)
    with pytest.raises(BadCheckpoint, match="metadata"):
        Apollo(model, settings()).load_state(tensors, {**metadata, "apollo": "{"})


def test_nothing_is_written_if_one_update_is_not_finite() -> None:
    model = Layers(torch.bfloat16)
    optimizer = Apollo(model, settings())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    bad = gradients(model, 0)
    bad["table.weight"][5, 5] = math.nan
    with pytest.raises(NonFinite, match=r"update of table\.weight"):
        optimizer.step(bad)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert optimizer.state_dict()[0] == {}
    assert optimizer.steps == 0


@pytest.mark.parametrize("rank", [4, 1])
def test_converges(rank: int) -> None:
    """Least squares with a known solution, in bf16, at a step far below bf16's spacing."""
    generator = torch.Generator().manual_seed(0)
    truth, x = torch.randn(SHAPE_WIDE, generator=generator) * 0.3, torch.randn(200, 40, generator=generator)
    model = Layers(torch.bfloat16)
    optimizer = Apollo(model, settings(rank=rank, lr=3e-3, norm_growth_limit=1.05))

    def loss_and_gradient() -> tuple[float, Tensor]:
        error = x @ (model.wide.detach().float() - truth).T
        return error.square().mean().item(), 2 * error.T @ x / error.numel()

    first, _ = loss_and_gradient()
    for _ in range(600):
        optimizer.step({"wide": loss_and_gradient()[1]})
    assert loss_and_gradient()[0] < 0.02 * first


def test_weight_decay_shrinks_matrices_only() -> None:
    plain, decayed = Layers(), Layers()
    for model, decay in ((plain, 0.0), (decayed, 0.5)):
        Apollo(model, settings(weight_decay=decay)).step(gradients(model, 0))
    for (name, a), b, start in zip(
        plain.named_parameters(), decayed.parameters(), Layers().parameters(), strict=True
    ):
        shrunk = 1e-2 * 0.5 * start if start.ndim >= 2 else torch.zeros_like(start)
        torch.testing.assert_close(b, a - shrunk, rtol=0, atol=2e-7, msg=name)


def test_what_moved_is_what_was_meant(tmp_path: Path) -> None:
    directory = save_tiny(dense_config(), tmp_path)
    weights = read_weights(directory)
    before = {n: t.clone() for n, t in weights.items()}
    model = build(directory, weights)
    optimizer = Apollo(model, settings(rank=8, lr=1e-4))
    for step in range(5):
        optimizer.step(gradients(model, step))
    assert optimizer.task_vector is not None
    moved = {m.name: m for m in optimizer.moved()}
    assert set(moved) == set(before)
    name = "model.layers.1.mlp.up_proj.weight"
    assert moved[name].layer == 1
    assert moved["model.norm.weight"].layer is None
    really = (weights[name].double() - before[name].double()).norm().item()
    assert moved[name].written == pytest.approx(really, rel=0.05)
    assert moved[name].intended == pytest.approx(optimizer.task_vector[name].norm().item())
    assert moved[name].intended < really, "at this learning rate most of the written change is rounding noise"
    assert moved[name].relative == pytest.approx(
        moved[name].intended / before[name].double().norm().item(), 1e-5
    )
