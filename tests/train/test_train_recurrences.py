"""Other states than GatedDeltaNet's: Mamba 2 alone and beside attention, a convolution alone, nothing at all."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB_SIZE, in_arena, read_weights, save_tiny
from torch import nn
from transformers import (
    FalconH1Config,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    Mamba2Config,
    NemotronHConfig,
    PretrainedConfig,
)

from secondnature.errors import UnsupportedModel
from secondnature.model.load import build
from secondnature.model.upcast import collect
from secondnature.train.prefix import continuation_logps, extend, freeze, self_test

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
MAMBA: dict[str, Any] = {
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "Granite 4 H": GraniteMoeHybridConfig(
        **COMMON,
        **MAMBA,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=48,
        layer_types=["mamba", "attention", "mamba"],
    ),
    "LFM2": Lfm2Config(**COMMON, layer_types=["conv", "full_attention", "conv"]),
    "Falcon-H1": FalconH1Config(**COMMON, **MAMBA, mamba_d_ssm=64),
    "Nemotron-H": NemotronHConfig(
        **COMMON,
        head_dim=16,
        layers_block_type=["mamba", "mlp", "attention"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=16,
        mlp_hidden_act="relu2",
        time_step_min=1e-9,  # transformers holds time steps above it, but for a token that is read alone
    ),
    "Mamba 2": Mamba2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        head_dim=16,
        num_heads=4,
        n_groups=1,
        chunk_size=16,
        initializer_range=0.2,
    ),
}
KINDS = list(CONFIGS)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("recurrent")
    return {name: save_tiny(config, root / name) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def models(directories: dict[str, Path]) -> dict[str, nn.Module]:
    return {name: in_arena(directory)[1] for name, directory in directories.items()}


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=count)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_equals_plain_forward(models: dict[str, nn.Module], kind: str) -> None:
    assert self_test(models[kind]) < 1e-4


@pytest.mark.parametrize("lengths", [[1], [1, 1], [7, 1, 30]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_can_be_used_again_to_the_bit(
    models: dict[str, nn.Module], kind: str, lengths: list[int]
) -> None:
    """Also where every answer is one token: the path of decoding would write the state in place."""
    model, context = models[kind], tokens(40, 1)
    prefix = freeze(model, context)
    before = [t.clone() for state in prefix.states for t in state.tensors]
    answers = [tokens(n, n) for n in lengths]
    runs = []
    for _ in range(2):
        with collect(model) as gradients:
            logps = continuation_logps(model, prefix, answers)
            torch.stack([x.sum() for x in logps]).sum().backward()
        runs.append(([x.detach() for x in logps], dict(gradients)))
    for first, second in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(first, second)
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])
    after = [t for state in prefix.states for t in state.tensors]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with torch.no_grad():
        for found, answer in zip(runs[0][0], answers, strict=True):
            ids = torch.tensor([[*context, *answer]])
            plain = model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1].log_softmax(-1)
            wanted = plain.gather(1, torch.tensor(answer)[:, None])[:, 0]
            torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_extended_prefix_equals_a_whole_one(models: dict[str, nn.Module], kind: str) -> None:
    model, context = models[kind], tokens(40, 3)
    prefix = freeze(model, context[:9])
    before = [t.clone() for state in prefix.states for t in state.tensors]
    longer = extend(model, extend(model, prefix, context[9:10]), context[10:])
    after = [t for state in prefix.states for t in state.tensors]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for ours, wanted in zip(longer.states, freeze(model, context).states, strict=True):
        for a, b in zip(ours.tensors, wanted.tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_a_constant_prefix(directories: dict[str, Path], kind: str) -> None:
    """In fp64, against the difference that a small step of all weights, roughly along it, makes to the loss."""
    weights = {n: t.float() for n, t in read_weights(directories[kind]).items()}
    model = build(directories[kind], weights, compute_dtype=torch.float64)
    prefix, answers = freeze(model, tokens(30, 4)), [tokens(6, 5), tokens(1, 6)]

    def loss() -> torch.Tensor:
        return -torch.cat(continuation_logps(model, prefix, answers)).sum()

    with collect(model) as sink:
        loss().backward()
        gradients = {name: g.view(weights[name].shape).double() for name, g in dict(sink).items()}
    assert set(gradients) == set(weights)
    generator = torch.Generator().manual_seed(7)
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    middle = {n: t.clone() for n, t in weights.items()}
    steps = {n: 1e-3 / norm * g * torch.rand(g.shape, generator=generator) for n, g in gradients.items()}
    ends: list[dict[str, torch.Tensor]] = []
    losses: list[float] = []
    for sign in (1, -1):
        for name, weight in weights.items():
            weight.copy_(middle[name] + sign * steps[name])
        ends.append({n: t.double() for n, t in weights.items()})
        with torch.no_grad():
            losses.append(float(loss()))
    wanted = sum(float((g * (ends[0][n] - ends[1][n])).sum()) for n, g in gradients.items())
    assert losses[0] - losses[1] == pytest.approx(wanted, rel=1e-4)


def test_a_recurrence_that_cannot_go_on_from_its_state_is_refused(tmp_path: Path) -> None:
    """transformers' scan of Mamba 1 begins anew where a text is read on: continuations would be of another text."""
    config = JambaConfig(
        **COMMON,
        attn_layer_period=3,
        attn_layer_offset=1,
        expert_layer_period=8,
        expert_layer_offset=7,
        num_experts=1,
        num_experts_per_tok=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
    )
    with pytest.raises(UnsupportedModel, match="frozen context changes the logits"):
        self_test(in_arena(save_tiny(config, tmp_path))[1])
