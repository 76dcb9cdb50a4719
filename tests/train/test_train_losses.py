"""The objectives against their closed forms, written out with the standard library's fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from secondnature.train.losses import (
    Reference,
    dpo,
    dpop,
    example_loss,
    log_odds,
    orpo,
    sequence_logprob,
    sft,
)

CHOSEN = [-0.5, -1.25, -0.125]
REJECTED = [-2.0, -0.75]
REFERENCE = Reference(-2.5, -3.0)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_sums_and_means() -> None:
    assert sequence_logprob(tensor(CHOSEN)).item() == sum(CHOSEN)
    assert sft(tensor(CHOSEN)).item() == pytest.approx(-sum(CHOSEN) / 3)


def test_orpo_is_the_papers() -> None:
    """Odds of the geometric mean probability per token, equations 3 to 7."""
    p, q = math.exp(sum(CHOSEN) / 3), math.exp(sum(REJECTED) / 2)
    ratio = (p / (1 - p)) / (q / (1 - q))
    wanted = -sum(CHOSEN) / 3 - 0.25 * math.log(sigmoid(math.log(ratio)))
    assert orpo(tensor(CHOSEN), tensor(REJECTED), weight=0.25).item() == pytest.approx(wanted)


def test_orpo_gradient_is_finite_where_the_answer_is_certain() -> None:
    certain = torch.zeros(4, requires_grad=True)
    loss = orpo(certain, torch.full((2,), -30.0))
    loss.backward()
    assert math.isfinite(loss.item())
    assert certain.grad is not None
    assert bool(torch.isfinite(certain.grad).all())
    assert log_odds(torch.tensor(-math.log(2), dtype=torch.float64)).item() == pytest.approx(0)


def test_dpo_is_the_papers() -> None:
    gain = (sum(CHOSEN) + 2.5) - (sum(REJECTED) + 3.0)
    found = dpo(tensor(CHOSEN), tensor(REJECTED), REFERENCE, beta=0.3).item()
    assert found == pytest.approx(-math.log(sigmoid(0.3 * gain)))


@pytest.mark.parametrize("reference", [Reference(-2.5, -3.0), Reference(-1.0, -3.0)])
def test_dpop_punishes_a_falling_chosen_answer_only(reference: Reference) -> None:
    chosen_gain = sum(CHOSEN) - reference.chosen
    rejected_gain = sum(REJECTED) - reference.rejected
    inner = chosen_gain - rejected_gain - 5.0 * max(0.0, -chosen_gain)
    found = dpop(tensor(CHOSEN), tensor(REJECTED), reference, beta=0.3, weight=5.0).item()
    assert found == pytest.approx(-math.log(sigmoid(0.3 * inner)))


def test_an_example_without_a_rejected_answer_is_sft() -> None:
    """Replay among pairs."""
    for objective in ("sft", "orpo", "dpo", "dpop"):
        assert example_loss(objective, tensor(CHOSEN), None, None).item() == sft(tensor(CHOSEN)).item()
    pair = (tensor(CHOSEN), tensor(REJECTED))
    assert example_loss("orpo", *pair, None).item() == orpo(*pair).item()
    assert example_loss("dpo", *pair, REFERENCE).item() == dpo(*pair, REFERENCE).item()
    assert example_loss("dpop", *pair, REFERENCE).item() == dpop(*pair, REFERENCE).item()
