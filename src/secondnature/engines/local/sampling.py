"""From logits to tokens (process A).

Sampling inverts the cumulative distribution with one uniform number per token, drawn from the request's own
generator: so a seed gives the same text whatever else is in the batch, as far as the logits are the same.
Log-probabilities are those of the model (temperature 1, before top_p), as OpenAI and vLLM report them.

Shapes: B rows of the batch, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MAX_TOP = 20
"""At most so many alternatives are reported per token."""


@dataclass
class Sampler:
    """How one request draws its tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    _random: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0

    def uniform(self) -> float:
        """The next number of this request's generator, in [0, 1)."""
        return self._random.random()


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token per row.

    Args:
        logits: [B, V], finite.
        samplers: one per row; each that is not greedy is advanced by one number.
    """
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    drawn = [i for i, s in enumerate(samplers) if not s.greedy]
    for nucleus in (False, True):
        rows = [i for i in drawn if (samplers[i].top_p < 1) == nucleus]
        if rows:
            picked = _draw(logits[rows], [samplers[i] for i in rows], nucleus=nucleus)
            for i, token in zip(rows, picked, strict=True):
                tokens[i] = token
    return tokens


def _draw(logits: Tensor, samplers: Sequence[Sampler], *, nucleus: bool) -> list[int]:
    """Tokens by inverse CDF; with `nucleus`, from the smallest set of tokens whose mass reaches top_p."""
    wide = logits.double()
    temperature = torch.tensor([s.temperature for s in samplers], dtype=torch.float64, device=logits.device)
    # the maximum goes first: a tiny temperature then gives 0 and -inf, never inf - inf
    probs = ((wide - wide.amax(-1, keepdim=True)) / temperature[:, None]).softmax(-1)
    order: Tensor | None = None
    if nucleus:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        top_p = torch.tensor([s.top_p for s in samplers], dtype=torch.float64, device=logits.device)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p[:, None], 0.0)
    mass = probs.cumsum(-1)
    uniform = torch.tensor([s.uniform() for s in samplers], dtype=torch.float64, device=logits.device)
    # right=True: the first token whose cumulated mass exceeds the number, so none of probability 0 is drawn
    picked = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True)
    last = (probs > 0).to(torch.int64).mul(torch.arange(1, probs.shape[-1] + 1, device=probs.device)).amax(
        -1
    ) - 1
    picked = torch.minimum(picked, last[:, None])
    if order is not None:
        picked = order.gather(-1, picked)
    return picked[:, 0].tolist()


@dataclass(frozen=True)
class Scored:
    """A token's log-probability in nats, and the most probable alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def score(logits: Tensor, tokens: Sequence[int], top: int) -> list[Scored]:
    """Log-probabilities of given tokens.

    Args:
        logits: [B, V].
        tokens: one id per row.
        top: number of alternatives to report (0 to 20).
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    if not top:
        return [Scored(t, p) for t, p in zip(tokens, chosen, strict=True)]
    best = logprobs.topk(min(top, logprobs.shape[-1], MAX_TOP), dim=-1)
    values, ids = best.values.tolist(), best.indices.tolist()
    return [
        Scored(t, p, tuple(zip(ids[i], values[i], strict=True)))
        for i, (t, p) in enumerate(zip(tokens, chosen, strict=True))
    ]


def finite_rows(logits: Tensor) -> list[bool]:
    """Per row of [B, V], whether every logit is a number."""
    low, high = torch.aminmax(logits, dim=-1)  # both are NaN where any logit is
    return [math.isfinite(a) and math.isfinite(b) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
