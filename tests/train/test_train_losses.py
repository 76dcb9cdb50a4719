"""The objectives against their closed forms, written out with the standard library's fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from secondnature.train.losses import (
    Reference,
    divergence,
    dpo,
    dpop,
    example_loss,
    log_odds,
    orpo,
    sdft,
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
    for objective in ("sft", "orpo", "dpo", "dpop", "sdft"):
        assert example_loss(objective, tensor(CHOSEN), None, None).item() == sft(tensor(CHOSEN)).item()
    pair = (tensor(CHOSEN), tensor(REJECTED))
    assert example_loss("orpo", *pair, None).item() == orpo(*pair).item()
    assert example_loss("dpo", *pair, REFERENCE).item() == dpo(*pair, REFERENCE).item()
    assert example_loss("dpop", *pair, REFERENCE).item() == dpop(*pair, REFERENCE).item()


TEACHER = [[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]
STUDENT = [[0.1, 0.6, 0.3], [0.25, 0.5, 0.25]]


def kl(p: list[list[float]], q: list[list[float]]) -> float:
    rows = [sum(a * math.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    return sum(rows) / len(rows)


def test_self_distillation_is_the_reverse_kl_and_replay_the_forward_one() -> None:
    """Logits may be shifted per position: only the distributions count."""
    logits = torch.tensor(STUDENT).log() + torch.tensor([[3.0], [-2.0]])
    teacher = torch.tensor(TEACHER).log()
    assert sdft(teacher, logits).item() == pytest.approx(kl(STUDENT, TEACHER), rel=1e-5)
    now = logits.log_softmax(dim=-1)
    assert divergence(teacher, now, whole=True).item() == pytest.approx(kl(TEACHER, STUDENT), rel=1e-5)
    assert sdft(teacher, teacher + 1.0).item() == pytest.approx(0.0, abs=1e-6)


def test_what_a_few_tokens_leave_out_of_a_kl_is_the_kl_within_the_others() -> None:
    """The chain rule: KL = that over some tokens and the rest as one + mass of the rest * KL within the rest."""
    generator = torch.Generator().manual_seed(3)
    before, after = (4 * torch.randn(20, 500, generator=generator) for _ in range(2))
    p, q = before.double().softmax(-1), after.double().softmax(-1)
    kept = p.topk(60, dim=-1).indices
    others = torch.ones_like(p, dtype=torch.bool).scatter(1, kept, value=False)
    p_rest, q_rest = p[others].view(20, -1), q[others].view(20, -1)
    mass, mass_now = p_rest.sum(1, keepdim=True), q_rest.sum(1, keepdim=True)
    within = (p_rest / mass * (p_rest / mass / (q_rest / mass_now)).log()).sum(1)
    left_out = (mass.squeeze(1) * within).mean().item()
    whole = (p * (p / q).log()).sum(-1).mean().item()
    found = divergence(p.gather(1, kept).log().float(), q.gather(1, kept).log().float(), whole=False).item()
    assert found == pytest.approx(whole - left_out, rel=1e-3)
    assert 0 < left_out < 0.2 * whole, "there is something to leave out"


def test_the_gradient_of_a_few_tokens_is_that_of_the_two_sums() -> None:
    """By a logit: q - p for a token that is kept, q (1 - rest before / rest now) for another."""
    before, after = torch.randn(3, 40).log_softmax(-1), torch.randn(3, 40).requires_grad_()
    kept = before.topk(10, dim=-1).indices
    divergence(before.gather(1, kept), after.log_softmax(-1).gather(1, kept), whole=False).backward()
    p, q = before.exp(), after.detach().softmax(-1)
    rest, rest_now = (1 - x.gather(1, kept).sum(-1, keepdim=True) for x in (p, q))
    wanted = (q * (1 - rest / rest_now)).scatter(1, kept, (q - p).gather(1, kept)) / 3
    assert after.grad is not None
    torch.testing.assert_close(after.grad, wanted, rtol=1e-3, atol=1e-5)


def test_self_distillation_moves_an_answer_that_is_wrong_towards_the_teacher() -> None:
    """Nearly certain of the wrong token, the student still learns which one stands there instead.

    The gradient by a logit is s (log(s / t) - KL): below 0 for the teacher's token, above 0 for the student's own.
    """
    student = torch.tensor([[1 - 2e-3, 1e-3, 1e-3]])
    teacher = torch.tensor([[1e-3, 1 - 2e-3, 1e-3]]).log()
    logits = student.log().requires_grad_()
    sdft(teacher, logits).backward()
    gradient = logits.grad
    assert gradient is not None
    wanted = student * (student.log() - teacher - kl(student.tolist(), teacher.exp().tolist()))
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6)
    own, taught, other = gradient[0].tolist()
    assert taught < other < own
    assert taught < 0 < own
