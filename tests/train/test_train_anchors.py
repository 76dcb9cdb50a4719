"""Replay by distribution: silent before a write, against the drift after one, to the gradient of a plain KL."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB_SIZE, gpt2_config, hybrid_config, in_arena, save_tiny
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from secondnature.errors import NonFinite
from secondnature.model.upcast import collect
from secondnature.records import Example, OptimizerSettings
from secondnature.train import anchors as anchors_module
from secondnature.train.anchors import Anchor, affordable, divergences, drifts, record
from secondnature.train.apollo import Apollo
from secondnature.train.step import train_step
from secondnature.weights.arena import Arena

CONFIGS = {"hybrid": hybrid_config, "gpt2": gpt2_config}


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(2, VOCAB_SIZE), k=count)


def replay() -> list[Example]:
    """Conversations of several lengths; all but the last begin with the same token."""
    rows = [(1, 5), (6, 3), (9, 7), (4, 1)]
    begin = [[5, *tokens(c - 1, c)] for c, _ in rows[:-1]] + [tokens(4, 4)]
    return [
        Example(context_ids=b, continuation_ids=tokens(t, t)) for b, (_, t) in zip(begin, rows, strict=True)
    ]


def lesson() -> list[Example]:
    return [Example(context_ids=tokens(8, 50 + i), continuation_ids=tokens(6, 60 + i)) for i in range(2)]


@pytest.fixture(params=list(CONFIGS))
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Arena, nn.Module, Path]:
    directory = save_tiny(CONFIGS[request.param](), tmp_path)
    return *in_arena(directory), directory


def mean_drift(model: nn.Module, anchors: list[Anchor]) -> float:
    with torch.no_grad():
        return sum(float(d) for found in drifts(model, anchors) for d in found) / len(anchors)


def test_anchors_are_silent_until_something_is_written(tiny: tuple[Arena, nn.Module, Path]) -> None:
    arena, model, _ = tiny
    before = {n: t.clone() for n, t in arena.tensors.items()}
    anchors = record(model, replay())
    optimizer = Apollo(model, OptimizerSettings(lr=1e-2, rank=8))
    result = train_step(model, optimizer, lesson(), learned_loss=1000.0, anchors=anchors, anchor_weight=1e4)
    assert not result.wrote
    assert result.drift is not None
    assert result.drift < 1e-6
    assert all(torch.equal(t, before[n]) for n, t in arena.tensors.items())


def test_the_gradient_is_that_of_a_plain_kl(tiny: tuple[Arena, nn.Module, Path]) -> None:
    """Against autograd on a whole, unbatched fp32 run of transformers' own model with the same moved weights."""
    arena, model, directory = tiny
    anchors = record(model, replay())
    generator = torch.Generator().manual_seed(0)
    for tensor in arena.tensors.values():
        tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
    with collect(model) as gradients:
        for found in drifts(model, anchors):
            torch.stack(found).sum().backward()
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    named = dict(plain.named_parameters())
    with torch.no_grad():
        for name, tensor in arena.tensors.items():
            if name in named:
                named[name].copy_(tensor.float())
    for anchor in anchors:
        logits: Tensor = plain(input_ids=torch.tensor([anchor.ids[:-1]]), use_cache=False).logits[0]
        now = torch.log_softmax(logits[-anchor.num_tokens :], dim=-1)
        F.kl_div(now, anchor.logps_TK, log_target=True, reduction="none").sum(-1).mean().backward()
    compared = 0
    for name, parameter in named.items():
        if name in gradients and parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=2e-3, atol=2e-5)
            compared += 1
    assert compared == len(named)


def test_anchors_hold_what_replayed_answers_do_not(tiny: tuple[Arena, nn.Module, Path]) -> None:
    arena, model, _ = tiny
    start = {n: t.clone() for n, t in arena.tensors.items()}
    anchors = record(model, replay())
    drift: dict[str, float] = {}
    loss: dict[str, float] = {}
    for name in ("alone", "held"):
        arena.write(start)
        optimizer = Apollo(model, OptimizerSettings(lr=2e-3, rank=8))
        held = anchors if name == "held" else []
        results = [
            train_step(model, optimizer, lesson(), anchors=held, anchor_weight=10.0) for _ in range(12)
        ]
        drift[name], loss[name] = mean_drift(model, anchors), results[-1].loss
    first = train_step(model, Apollo(model, OptimizerSettings(lr=2e-3, rank=8)), lesson(), learned_loss=1e3)
    assert drift["held"] < drift["alone"] / 3, drift
    assert loss["held"] < 4.5, "the lesson is learned all the same"
    assert first.drift is None


def test_a_broken_anchor_is_refused_before_the_write(tiny: tuple[Arena, nn.Module, Path]) -> None:
    arena, model, _ = tiny
    before = {n: t.clone() for n, t in arena.tensors.items()}
    broken = [Anchor(a.ids, a.tokens_TK, a.logps_TK * torch.nan) for a in record(model, replay())]
    with pytest.raises(NonFinite, match="replay"):
        train_step(model, Apollo(model, OptimizerSettings(rank=8)), lesson(), anchors=broken)
    assert all(torch.equal(t, before[n]) for n, t in arena.tensors.items())


def test_divergences_are_nothing_at_first_and_then_the_kl_of_each(
    tiny: tuple[Arena, nn.Module, Path],
) -> None:
    arena, model, _ = tiny
    anchors = record(model, replay())
    assert divergences(model, anchors) == [0.0] * 4
    for tensor in arena.tensors.values():
        tensor.mul_(1.05)
    found = divergences(model, anchors)
    after = record(model, replay())
    for value, was, now in zip(found, anchors, after, strict=True):
        wanted = F.kl_div(now.logps_TK, was.logps_TK, log_target=True, reduction="none").sum(-1).mean()
        assert value == pytest.approx(float(wanted), rel=1e-3, abs=1e-6)
        assert value > 1e-5
    for tensor in arena.tensors.values():
        tensor.fill_(torch.nan)
    with pytest.raises(NonFinite, match="KL"):
        divergences(model, anchors)


def test_few_tokens_are_kept_of_a_large_vocabulary(
    tiny: tuple[Arena, nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent at first, and then a lower bound of the whole KL, near it where the kept tokens have the mass."""
    arena, model, _ = tiny
    whole = record(model, replay())
    found: dict[int, float] = {}
    for kept in (4, VOCAB_SIZE - 8):
        monkeypatch.setattr(anchors_module, "KEPT_TOKENS", kept)
        few = record(model, replay())
        assert [a.logps_TK.shape[1] for a in few] == [kept] * 4
        for a, b in zip(few, whole, strict=True):
            assert torch.equal(a.logps_TK.amax(dim=1), b.logps_TK.amax(dim=1)), "the likeliest is among them"
        assert divergences(model, few) == [0.0] * 4
        start = {n: t.clone() for n, t in arena.tensors.items()}
        for tensor in arena.tensors.values():
            tensor.mul_(1.05)
        found[kept] = sum(divergences(model, few))
        monkeypatch.undo()
        everything = sum(divergences(model, whole))
        arena.write(start)
    few_found, nearly_all = found[4], found[VOCAB_SIZE - 8]
    assert 0 < few_found < nearly_all < everything * (1 + 1e-3)
    assert nearly_all > 0.8 * everything


def test_as_many_as_fit() -> None:
    examples = replay()
    assert affordable(examples, 10, 4 * 10 * 16) == 4
    assert affordable(examples, 10, 4 * 10 * 16 - 1) == 3
    assert affordable(examples, 10, 0) == 0
