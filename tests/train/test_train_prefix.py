"""The frozen context: reusable to the bit, batched as one by one, refused where it cannot be frozen."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from reference import reference_logps
from tiny_models import CONFIGS, VOCAB_SIZE, dense_config, in_arena, save_tiny
from torch import nn

from secondnature.errors import BadExample, StalePrefix, UnsupportedModel
from secondnature.model.upcast import collect
from secondnature.train.prefix import continuation_logps, extend, freeze, self_test

KINDS = list(CONFIGS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: in_arena(save_tiny(make(), root / name))[1] for name, make in CONFIGS.items()}


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=count)


@pytest.mark.parametrize("lengths", [[1], [1, 1], [7, 12, 1, 30]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_can_be_used_again_to_the_bit(
    models: dict[str, nn.Module], kind: str, lengths: list[int]
) -> None:
    """Forward and backward leave no trace in it, also where single tokens take the decoding path."""
    model = models[kind]
    prefix = freeze(model, tokens(40, 1))
    before = [t.clone() for s in prefix.states for t in s.tensors]
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
    after = [t for s in prefix.states for t in s.tensors]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("num_context", [1, 5, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_batched_equals_one_by_one(models: dict[str, nn.Module], kind: str, num_context: int) -> None:
    model = models[kind]
    answers = [tokens(n, n) for n in (3, 70, 1, 18)]
    prefix = freeze(model, tokens(num_context, 2))
    with torch.no_grad():
        together = continuation_logps(model, prefix, answers)
        alone = [continuation_logps(model, prefix, [a])[0] for a in answers]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_equals_plain_forward(models: dict[str, nn.Module], kind: str) -> None:
    assert self_test(models[kind]) < 1e-4


CUTS = [(1,), (69,), (5, 40), (64, 65, 66), (3, 3)]
"""Where a context of 70 tokens is cut: single tokens, both sides of a chunk of the delta rule, nothing new."""


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_extended_prefix_equals_a_whole_one(
    models: dict[str, nn.Module], kind: str, cuts: tuple[int, ...]
) -> None:
    """In fp32 to 3e-5 of a log-probability and of every state (another split into chunks), and to the reference."""
    model, context = models[kind], tokens(70, 3)
    answers = [tokens(n, n) for n in (9, 1)]
    prefix = freeze(model, context[: cuts[0]])
    for start, end in itertools.pairwise([*cuts, len(context)]):
        prefix = extend(model, prefix, context[start:end])
    whole = freeze(model, context)
    assert (prefix.num_tokens, prefix.last_id) == (whole.num_tokens, whole.last_id) == (69, context[-1])
    assert prefix.num_bytes == whole.num_bytes
    for ours, wanted in zip(prefix.states, whole.states, strict=True):
        for a, b in zip(ours.tensors, wanted.tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=3e-5)
    exact = {n: p.detach().double() for n, p in model.named_parameters()}
    wanted = reference_logps(model.config, exact, context, answers)
    with torch.no_grad():
        for found in (continuation_logps(model, p, answers) for p in (prefix, whole)):
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_extending_leaves_the_base_as_it_was(models: dict[str, nn.Module], kind: str) -> None:
    """Also by a single token, where the recurrence takes the decoding path, which writes in place."""
    model = models[kind]
    base = freeze(model, tokens(20, 5))
    before = [t.clone() for s in base.states for t in s.tensors]
    for more in ([7], tokens(30, 6), [8]):
        extend(model, base, more)
    after = [t for s in base.states for t in s.tensors]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    first, again = (extend(model, base, tokens(9, 7)).states for _ in range(2))
    assert all(
        torch.equal(a, b)
        for x, y in zip(first, again, strict=True)
        for a, b in zip(x.tensors, y.tensors, strict=True)
    )


def test_a_prefix_of_other_weights_is_refused(models: dict[str, nn.Module]) -> None:
    model = models["dense"]
    prefix = freeze(model, [1, 2, 3], version="abc")
    assert extend(model, prefix, [4], version="abc").version == "abc"
    for version in ("abd", None):
        with pytest.raises(StalePrefix, match="'abc'; expected"):
            extend(model, prefix, [4], version=version)
        with pytest.raises(StalePrefix, match="'abc'; expected"):
            continuation_logps(model, prefix, [[4]], version=version)
    assert len(continuation_logps(model, prefix, [[4]], version="abc")) == 1


def test_nothing_to_score_is_refused(models: dict[str, nn.Module]) -> None:
    with pytest.raises(BadExample, match="context is empty"):
        freeze(models["dense"], [])
    with pytest.raises(BadExample, match="continuation is empty"):
        continuation_logps(models["dense"], freeze(models["dense"], [1]), [[1], []])


def test_self_test_sees_a_broken_attention(tmp_path: Path) -> None:
    """A model whose logits depend on how the text is cut is refused, whatever the reason."""
    _, model = in_arena(save_tiny(dense_config(), tmp_path))
    attention = model.get_submodule("model.layers.1.self_attn")
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "past_key_values": None}), with_kwargs=True
    )
    with pytest.raises(UnsupportedModel, match="frozen context"):
        self_test(model)
