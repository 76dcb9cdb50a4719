"""From logits to tokens (process A).

Sampling inverts the cumulative distribution with one uniform number per token, drawn from the request's own
generator: so a seed gives the same text whatever else is in the batch, as far as the logits are the same.
The distribution is shaped in vLLM's order: bias, penalties (repetition, then frequency and presence), temperature,
min_p, top_k, top_p; each by the definition that transformers has, too.
Log-probabilities are those of the model (temperature 1, before top_p), as OpenAI and vLLM report them.

Shapes: B rows of the batch, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secondnature.engines.generation import Sampling

MAX_TOP = 20
"""At most so many alternatives are reported per token."""
_BLOCK = 128


class Sampler:
    """Draws the tokens of one answer."""

    def __init__(self, how: Sampling, prompt_ids: Sequence[int] = (), token_ids: Sequence[int] = ()) -> None:
        """`token_ids`: the answer so far; whoever draws lets it grow."""
        self.how = how
        self._token_ids = token_ids
        self._random = random.Random(how.seed)
        self._in_prompt = torch.tensor(
            sorted(set(prompt_ids)) if how.repetition_penalty != 1 else [], dtype=torch.long
        )

    @property
    def moves_logits(self) -> bool:
        """Whether a bias or a penalty changes the logits themselves."""
        penalties = (self.how.presence_penalty, self.how.frequency_penalty, self.how.repetition_penalty - 1)
        return bool(self.how.logit_bias) or any(penalties)

    @property
    def cuts(self) -> bool:
        """Whether improbable tokens are left out."""
        return self.how.top_p < 1 or self.how.top_k > 0 or self.how.min_p > 0

    def move(self, logits: Tensor) -> None:
        """Bias and penalties, in place; logits: [V], in fp32 or wider."""
        how, device = self.how, logits.device
        if how.logit_bias:
            ids = torch.tensor(list(how.logit_bias), device=device)
            logits[ids] += torch.tensor(list(how.logit_bias.values()), dtype=logits.dtype, device=device)
        said, times = torch.tensor(self._token_ids, dtype=torch.long, device=device).unique(
            return_counts=True
        )
        if how.repetition_penalty != 1:
            seen = torch.cat([self._in_prompt.to(device), said]).unique()
            found = logits[seen]
            scaled = torch.where(found > 0, found / how.repetition_penalty, found * how.repetition_penalty)
            logits[seen] = scaled
        logits[said] -= how.frequency_penalty * times + how.presence_penalty

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.how.temperature == 0

    def uniform(self) -> float:
        """The next number of this request's generator, in [0, 1)."""
        return self._random.random()


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token per row.

    Args:
        logits: [B, V], finite.
        samplers: one per row; each that is not greedy is advanced by one number.
    """
    moved = [i for i, s in enumerate(samplers) if s.moves_logits]
    if moved:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        for i in moved:
            samplers[i].move(logits[i])
    tokens = likeliest(logits)
    drawn = [i for i, s in enumerate(samplers) if not s.greedy]
    for cut in (False, True):
        rows = [i for i in drawn if samplers[i].cuts == cut]
        if rows:
            picked = _draw(logits[rows], [samplers[i] for i in rows], cut=cut)
            for i, token in zip(rows, picked, strict=True):
                tokens[i] = token
    return tokens


def likeliest(logits: Tensor) -> list[int]:
    """The most probable token of each row of [B, V], the first of equals; logits are finite.

    The largest of each block is found by vector instructions, which looking for its place is not.
    """
    rows, width = logits.shape
    if width % _BLOCK or width < 64 * _BLOCK:
        return logits.max(dim=-1).indices.tolist()  # argmax of bf16 takes six times as long
    blocks = logits.view(rows, -1, _BLOCK)
    block = blocks.amax(-1).max(dim=-1).indices
    within = blocks[torch.arange(rows, device=logits.device), block].max(dim=-1).indices
    return (block * _BLOCK + within).tolist()


def _draw(logits: Tensor, samplers: Sequence[Sampler], *, cut: bool) -> list[int]:
    """Tokens by inverse CDF; with `cut`, from those that min_p, top_k and top_p leave."""
    wide = logits.double()
    temperature = torch.tensor(
        [s.how.temperature for s in samplers], dtype=torch.float64, device=logits.device
    )
    # the maximum goes first: a tiny temperature then gives 0 and -inf, never inf - inf
    probs = ((wide - wide.amax(-1, keepdim=True)) / temperature[:, None]).softmax(-1)
    order: Tensor | None = None
    if cut:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        probs = likely(probs, samplers)
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


def likely(probs: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Probabilities with those set to 0 that min_p, then top_k, then top_p leave out.

    top_p leaves the smallest set of tokens whose mass reaches it, of the mass that the others left; tokens as
    probable as the k-th stay.

    Args:
        probs: [B, V], each row from the largest down.
    """
    columns = torch.tensor(
        [[s.how.min_p, s.how.top_p] for s in samplers], dtype=probs.dtype, device=probs.device
    ).unbind(-1)
    min_p, top_p = (c[:, None] for c in columns)
    probs = probs.masked_fill(probs < min_p * probs[:, :1], 0.0)
    width = probs.shape[-1]
    kth = [min(s.how.top_k, width) - 1 if s.how.top_k > 0 else width - 1 for s in samplers]
    probs = probs.masked_fill(probs < probs.gather(-1, torch.tensor(kth, device=probs.device)[:, None]), 0.0)
    mass = probs.cumsum(-1)
    return probs.masked_fill((mass - probs >= top_p * mass[:, -1:]) & (top_p < 1), 0.0)


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
    low, high = logits.amin(-1), logits.amax(-1)  # NaN where any logit is; far faster than aminmax
    return [math.isfinite(a) and math.isfinite(b) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
