"""The objectives, as pure functions of log-probabilities (trainer).

Each takes the per-token log-probabilities of one chosen (and one rejected) continuation and returns a scalar to
minimise. Lengths may differ; nothing here knows of models, prefixes or batches. Nats throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Objective",
    "Reference",
    "divergence",
    "dpo",
    "dpop",
    "example_loss",
    "log_odds",
    "orpo",
    "sdft",
    "sequence_logprob",
    "sft",
]

Objective = Literal["sft", "orpo", "dpo", "dpop", "sdft"]

ORPO_LAMBDA = 0.1
"""Weight of the odds-ratio term; the paper's value for Mistral 7B."""
DPO_BETA = 0.1
DPOP_LAMBDA = 50.0
"""Weight of DPOP's penalty; the paper's value."""


@dataclass(frozen=True)
class Reference:
    """Total log-probabilities of the two answers before the first write of a job (DPO, DPOP)."""

    chosen: float
    rejected: float


def sequence_logprob(logps_T: Tensor) -> Tensor:
    """log p(continuation | context): the sum over its tokens."""
    return logps_T.sum()


def sft(logps_T: Tensor) -> Tensor:
    """Mean negative log-probability per token."""
    return -logps_T.mean()


def log_odds(mean_logp: Tensor) -> Tensor:
    """log(p / (1 - p)) for p = exp(mean_logp); finite also where p rounds to 1."""
    logp = mean_logp.clamp(max=-1e-7)
    return logp - torch.log(-torch.expm1(logp))


def orpo(chosen_T: Tensor, rejected_T: Tensor, *, weight: float = ORPO_LAMBDA) -> Tensor:
    """SFT on the chosen answer plus the odds ratio against the rejected one; needs no reference.

    L = L_SFT - lambda * log sigmoid(log odds(chosen) - log odds(rejected)), odds of the per-token mean
    probability. Hong et al. 2024, arXiv 2403.07691, equations 4, 6 and 7.
    """
    ratio = log_odds(chosen_T.mean()) - log_odds(rejected_T.mean())
    return sft(chosen_T) - weight * F.logsigmoid(ratio)


def dpo(chosen_T: Tensor, rejected_T: Tensor, reference: Reference, *, beta: float = DPO_BETA) -> Tensor:
    """-log sigmoid(beta * (gain of the chosen - gain of the rejected)).

    A gain is the change of a total log-probability since the job began.
    Rafailov et al. 2023, arXiv 2305.18290, eq. 7.
    """
    gain = (chosen_T.sum() - reference.chosen) - (rejected_T.sum() - reference.rejected)
    return -F.logsigmoid(beta * gain)


def dpop(
    chosen_T: Tensor,
    rejected_T: Tensor,
    reference: Reference,
    *,
    beta: float = DPO_BETA,
    weight: float = DPOP_LAMBDA,
) -> Tensor:
    """DPO that also punishes a falling likelihood of the chosen answer. Pal et al. 2024, arXiv 2402.13228."""
    chosen_gain = chosen_T.sum() - reference.chosen
    rejected_gain = rejected_T.sum() - reference.rejected
    fallen = torch.clamp(-chosen_gain, min=0)
    return -F.logsigmoid(beta * (chosen_gain - rejected_gain - weight * fallen))


def divergence(reference_TK: Tensor, now_TK: Tensor, *, whole: bool) -> Tensor:
    """KL(reference || model), mean over the T positions, nats per token; the gradient is the model's alone.

    Both are log-probabilities of the same K tokens of each position. `whole`: these are all tokens. Otherwise all
    others together are one more outcome. That is a lower bound: what it leaves out is, by the chain rule, the
    others' mass under the reference times the KL within them.
    """
    reference = reference_TK.to(now_TK.device)
    found = (reference.exp() * (reference - now_TK)).sum(dim=-1)
    if not whole:
        before, now = (_rest(logps) for logps in (reference, now_TK))
        found = found + before * (before / now).log()
    return found.mean()


REST_FLOOR = 1e-6
"""Added to the mass of the others, before and now: as a difference of near numbers it is known no better."""


def _rest(logps_TK: Tensor) -> Tensor:
    """The mass (T) that the K tokens leave to all others."""
    return (1 - logps_TK.exp().sum(dim=-1)).clamp_min(0.0) + REST_FLOOR


def sdft(teacher_TV: Tensor, logits_TV: Tensor) -> Tensor:
    """KL(model || teacher), mean over the T positions of an answer, nats per token: self-distillation.

    `teacher_TV`: log-probabilities of the same weights with the user's comment in their context, from before the
    first write. `logits_TV`: the model's, without the comment. Whole distributions are compared, so that an answer
    which is wrong from its first token still says what stands there instead. Reverse, as on-policy distillation
    has it: the model settles on one thing the teacher would say, where the forward KL asks for all of them, the
    teacher's slips too. Shenfeld et al. 2026, arXiv 2601.19897; comments as context: Hübotter et al. 2026,
    arXiv 2601.20802.
    """
    now = torch.log_softmax(logits_TV.float(), dim=-1)
    return (now.exp() * (now - teacher_TV.to(now.device))).sum(dim=-1).mean()


def example_loss(
    objective: Objective, chosen_T: Tensor, rejected_T: Tensor | None, reference: Reference | None
) -> Tensor:
    """The loss of one example. An example without a rejected answer (replay among pairs) is always SFT."""
    if objective == "sft" or rejected_T is None:
        return sft(chosen_T)
    if objective == "orpo":
        return orpo(chosen_T, rejected_T)
    assert reference is not None, "DPO and DPOP need the log-probabilities before the first write"
    return (dpo if objective == "dpo" else dpop)(chosen_T, rejected_T, reference)
