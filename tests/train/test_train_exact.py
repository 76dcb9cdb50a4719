"""Law 3: loss and gradients equal the fp64 reference, on the arena's bf16 values, through the product's path."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import reference_logps
from tiny_models import CONFIGS, VOCAB_SIZE, in_arena, save_tiny
from torch import Tensor

from secondnature.model.gradients import Gradient, dense
from secondnature.model.head import token_logps
from secondnature.records import Example, OptimizerSettings
from secondnature.train import forest, prefix
from secondnature.train.apollo import Apollo
from secondnature.train.step import StepResult, log_probs, train_step

LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5


class Recording(Apollo):
    """The product's optimizer, which also keeps the gradients that it was given; factors are multiplied out."""

    seen: dict[str, Tensor]

    def step(self, gradients: Mapping[str, Gradient], **options: Any) -> None:
        self.seen = {n: dense(g).clone() for n, g in gradients.items()}
        super().step(gradients, **options)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: save_tiny(make(), root / name) for name, make in CONFIGS.items()}


def run(
    directory: Path, batch: list[Example], objective: Any
) -> tuple[StepResult, dict[str, Tensor], Any, Any]:
    """One real step in an arena: result, gradients, fp64 leaves of the weights before it, config."""
    arena, model = in_arena(directory)
    exact = {n: t.double().requires_grad_() for n, t in arena.tensors.items()}
    optimizer = Recording(model, OptimizerSettings(rank=8))
    result = train_step(model, optimizer, batch, objective, writing=arena.writing)
    return result, optimizer.seen, exact, model.config


def gradient_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """|found - exact| / |exact| over all tensors together."""
    wrong = sum(
        float((found[n].double() - e.grad).square().sum()) for n, e in exact.items() if e.grad is not None
    )
    right = sum(float(e.grad.square().sum()) for e in exact.values() if e.grad is not None)
    return (wrong / right) ** 0.5


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=count)


@pytest.mark.parametrize(("num_context", "num_answer"), [(130, 40), (64, 64), (2, 40), (130, 1), (1, 5)])
@pytest.mark.parametrize("kind", ["hybrid", "dense", "gpt2"])
def test_loss_and_gradient_equal_the_reference(
    directories: dict[str, Path], kind: str, num_context: int, num_answer: int
) -> None:
    example = Example(context_ids=tokens(num_context, 1), continuation_ids=tokens(num_answer, 2))
    result, found, exact, config = run(directories[kind], [example], "sft")

    (logps,) = reference_logps(config, exact, example.context_ids, [example.continuation_ids])
    loss = -logps.mean()
    loss.backward()

    assert result.loss == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)
    assert {n for n, e in exact.items() if e.grad is not None} == set(found)
    assert gradient_error(found, exact) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("kind", ["hybrid", "dense", "gpt2"])
def test_pairs_of_different_lengths_equal_the_reference(directories: dict[str, Path], kind: str) -> None:
    """A weighted batch of ORPO pairs: chosen and rejected in one padded batch on one prefix, two examples."""
    batch = [
        Example(context_ids=tokens(33, 3), continuation_ids=tokens(17, 4), rejected_ids=tokens(30, 5)),
        Example(
            context_ids=tokens(70, 6), continuation_ids=tokens(9, 7), rejected_ids=tokens(3, 8), weight=2.5
        ),
    ]
    result, found, exact, config = run(directories[kind], batch, "orpo")

    total = torch.zeros((), dtype=torch.float64)
    for example in batch:
        assert example.rejected_ids is not None
        answers = [example.continuation_ids, example.rejected_ids]
        chosen, rejected = reference_logps(config, exact, example.context_ids, answers)
        odds = [p / (1 - p) for p in (chosen.mean().exp(), rejected.mean().exp())]
        loss = -chosen.mean() - 0.1 * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))
        total = total + example.weight / 3.5 * loss
    total.backward()

    assert result.loss == pytest.approx(total.item(), rel=LOSS_TOLERANCE)
    assert gradient_error(found, exact) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize(
    ("num_context", "num_answer"), [(130, 40), (128, 64), (64, 64), (37, 100), (2, 40), (130, 1)]
)
@pytest.mark.parametrize("kind", ["hybrid", "dense"])
def test_a_batch_over_a_tree_of_contexts_equals_the_reference(
    directories: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    num_context: int,
    num_answer: int,
) -> None:
    """Weighted SFT: two answers to one context, one to a context that parts from it half-way, one to that half."""
    context = tokens(num_context, 1)
    half = context[: num_context // 2]
    other = [*half, (context[len(half)] + 1) % VOCAB_SIZE, *tokens(num_context - len(half), 2)]
    short = max(1, num_answer // 3)
    rows = [
        (context, tokens(num_answer, 3), 1.0),
        (other, tokens(num_answer, 4), 0.5),
        (context, tokens(short, 5), 2.0),
        (half, tokens(short, 6), 1.0),
    ]
    batch = [Example(context_ids=c, continuation_ids=t, weight=w) for c, t, w in rows]
    ran: list[tuple[int, int]] = []
    real = forest.prefixes

    def noted(*args: Any, **kwargs: Any) -> Any:
        for frozen, members in real(*args, **kwargs):
            ran.append((frozen.num_tokens + 1, len(members)))
            yield frozen, members

    monkeypatch.setattr(forest, "prefixes", noted)
    result, found, exact, config = run(directories[kind], batch, "sft")
    assert ran == [(len(half), 1), (num_context, 2), (len(other), 1)]

    losses = []
    for c in (context, other, half):
        mine = [i for i, e in enumerate(batch) if e.context_ids == c]
        logps = reference_logps(config, exact, c, [batch[i].continuation_ids for i in mine])
        losses += [(i, -x.mean()) for i, x in zip(mine, logps, strict=True)]
    total = torch.stack([batch[i].weight / 4.5 * loss for i, loss in losses]).sum()
    total.backward()

    assert result.losses == pytest.approx([loss.item() for _, loss in sorted(losses)], rel=LOSS_TOLERANCE)
    assert result.loss == pytest.approx(total.item(), rel=LOSS_TOLERANCE)
    assert gradient_error(found, exact) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("kind", ["hybrid", "dense", "gpt2"])
def test_a_head_in_slices_equals_the_reference(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Ten tokens of the vocabulary at a time, tied and untied."""
    monkeypatch.setattr(prefix, "token_logps", partial(token_logps, max_logits=400))
    example = Example(context_ids=tokens(37, 1), continuation_ids=tokens(40, 2))
    result, found, exact, config = run(directories[kind], [example], "sft")

    (logps,) = reference_logps(config, exact, example.context_ids, [example.continuation_ids])
    loss = -logps.mean()
    loss.backward()

    assert result.loss == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)
    assert gradient_error(found, exact) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("kind", ["hybrid", "dense", "gpt2"])
def test_log_probs_equal_the_reference(directories: dict[str, Path], kind: str) -> None:
    arena, model = in_arena(directories[kind])
    answers = [tokens(n, 20 + n) for n in (1, 12, 5)]
    found = log_probs(model, tokens(20, 9), answers)
    exact = {n: t.double() for n, t in arena.tensors.items()}
    wanted = [float(x.sum()) for x in reference_logps(model.config, exact, tokens(20, 9), answers)]
    assert found == pytest.approx(wanted, rel=LOSS_TOLERANCE)
