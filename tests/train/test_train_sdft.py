"""Self-distillation in a training step: the loss of a plain run, the teacher reached, no write where it fails."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB_SIZE, gpt2_config, hybrid_config, in_arena, save_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from secondnature.errors import NonFinite
from secondnature.records import Example, OptimizerSettings
from secondnature.train.anchors import distributions
from secondnature.train.apollo import Apollo
from secondnature.train.losses import sdft, sft
from secondnature.train.step import train_step
from secondnature.weights.arena import Arena

CONFIGS = {"hybrid": hybrid_config, "gpt2": gpt2_config}


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(2, VOCAB_SIZE), k=count)


CONTEXTS = [tokens(6, 1), tokens(9, 2)]
TOLD = [c + tokens(5, 3 + i) for i, c in enumerate(CONTEXTS)]
"""The same with a comment after it: what the teacher reads."""
ANSWERS = [tokens(4, 10), tokens(7, 11)]
EXAMPLES = [Example(context_ids=c, continuation_ids=a) for c, a in zip(CONTEXTS, ANSWERS, strict=True)]


def teachers(model: nn.Module) -> list[Tensor | None]:
    read = [Example(context_ids=c, continuation_ids=a) for c, a in zip(TOLD, ANSWERS, strict=True)]
    return [*distributions(model, read)]


@pytest.fixture(params=list(CONFIGS))
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Arena, nn.Module, Path]:
    directory = save_tiny(CONFIGS[request.param](), tmp_path)
    return *in_arena(directory), directory


def test_the_losses_are_those_of_a_plain_run(tiny: tuple[Arena, nn.Module, Path]) -> None:
    """Against transformers' own model on the whole texts; an example without a teacher (replay) is SFT."""
    _, model, directory = tiny
    replay = Example(context_ids=tokens(5, 20), continuation_ids=tokens(3, 21))
    optimizer = Apollo(model, OptimizerSettings(lr=1e-3, rank=8))
    found = train_step(model, optimizer, [*EXAMPLES, replay], "sdft", teachers=[*teachers(model), None])
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def logits(context: list[int], answer: list[int]) -> Tensor:
        return plain(input_ids=torch.tensor([context + answer]), use_cache=False).logits[0][
            len(context) - 1 : -1
        ]

    with torch.no_grad():
        for i, answer in enumerate(ANSWERS):
            teacher = logits(TOLD[i], answer).log_softmax(-1)
            wanted = float(sdft(teacher, logits(CONTEXTS[i], answer)))
            assert wanted > 1e-3
            assert found.losses[i] == pytest.approx(wanted, rel=2e-3)
        logps = logits(replay.context_ids, replay.continuation_ids).log_softmax(-1)
        scored = logps.gather(1, torch.tensor(replay.continuation_ids).unsqueeze(1))
    assert found.losses[2] == pytest.approx(float(sft(scored)), rel=2e-3)
    assert found.margins == (None, None, None)


def test_the_student_reaches_its_teacher(tiny: tuple[Arena, nn.Module, Path]) -> None:
    arena, model, _ = tiny
    taught = teachers(model)
    optimizer = Apollo(model, OptimizerSettings(lr=1e-3, rank=8))
    losses = [
        train_step(model, optimizer, EXAMPLES, "sdft", teachers=taught, writing=arena.writing).loss
        for _ in range(8)
    ]
    assert losses[-1] < losses[0] / 2, losses


def test_a_student_that_is_its_teacher_learns_nothing(tiny: tuple[Arena, nn.Module, Path]) -> None:
    arena, model, _ = tiny
    before = {n: t.clone() for n, t in arena.tensors.items()}
    own = distributions(model, EXAMPLES)
    result = train_step(model, Apollo(model, OptimizerSettings(rank=8)), EXAMPLES, "sdft", teachers=own)
    assert not result.wrote
    assert result.num_learned == 2
    assert all(torch.equal(t, before[n]) for n, t in arena.tensors.items())


def test_a_broken_teacher_is_refused_before_the_write(tiny: tuple[Arena, nn.Module, Path]) -> None:
    arena, model, _ = tiny
    before = {n: t.clone() for n, t in arena.tensors.items()}
    broken = [None if t is None else t * torch.nan for t in teachers(model)]
    with pytest.raises(NonFinite, match="example 0"):
        train_step(model, Apollo(model, OptimizerSettings(rank=8)), EXAMPLES, "sdft", teachers=broken)
    assert all(torch.equal(t, before[n]) for n, t in arena.tensors.items())


def test_few_positions_at_a_time_change_nothing(
    tiny: tuple[Arena, nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary that allows one answer per forward only."""
    arena, model, _ = tiny
    start = {n: t.clone() for n, t in arena.tensors.items()}
    shared = [Example(context_ids=CONTEXTS[0], continuation_ids=a) for a in ANSWERS]
    read = [Example(context_ids=TOLD[0], continuation_ids=a) for a in ANSWERS]
    taught: list[Tensor | None] = [*distributions(model, read)]
    found: list[tuple[float, ...]] = []
    for most in (2**26, VOCAB_SIZE):
        monkeypatch.setattr("secondnature.train.step.MAX_SDFT_LOGITS", most)
        arena.write(start)
        result = train_step(model, Apollo(model, OptimizerSettings(rank=8)), shared, "sdft", teachers=taught)
        found.append((*result.losses, result.grad_norm))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
