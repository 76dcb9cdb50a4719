"""What every arm of the experiment on a real model is measured by: the same probes, plain greedy decoding in fp32.

Weights of any arm are put into the same transformers model (ours are bf16, the others' fp32, each as it was
trained). All prompts begin with the same system prompt, which is read once. An answer is generated as far as its
check needs it. Beside what passed: perplexity of a text, KL(before || now) on what the model said before, and whole
answers, whose length and opening words are their style.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from secondnature.evidence.checks import judge_probes
from secondnature.evidence.decided import decider
from secondnature.model.chat import encode_chat, read_tokenizer
from secondnature.model.turns import end_ids
from secondnature.records import Message, Probe

__all__ = ["KL_TOKENS", "Measured", "Told"]

Told = Callable[[str], list[Message]]
KL_TOKENS = 32
"""Of each answer before, from its first token on."""
WINDOW = 512
"""Tokens of the text that are read at a time."""
AT_ONCE = 48
"""Answers that are generated together."""


class Measured:
    """The model that all are measured in; it starts with the weights of before."""

    def __init__(self, directory: Path, text: str) -> None:
        torch.set_num_threads(1)
        self.tokenizer = read_tokenizer(directory)
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self._ends = end_ids(self.tokenizer, self.model.generation_config)
        self._text: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self._before: dict[str, list[tuple[list[int], int, Tensor]]] = {}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Other weights, by the names of the transformers model."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[name])

    def start(self, prompts: Mapping[str, Sequence[str]]) -> None:
        """Note what these weights say to some prompts, by set: the KL is measured against it."""
        for name, texts in prompts.items():
            contexts = [self._context(text) for text in texts]
            answers = self._generate(contexts, [KL_TOKENS] * len(contexts), [None] * len(contexts))
            self._before[name] = [
                (ids + said, len(ids), self._logps(ids + said, len(ids)))
                for ids, said in zip(contexts, answers, strict=True)
            ]

    def ask(self, probes: Sequence[Probe], told: Told | None = None) -> list[bool]:
        """Which pass; `told` makes the conversation that is asked of each question."""
        contexts = [self._context(p.prompt[-1].content, told) for p in probes]
        enough = [decider(p.check) for p in probes]
        said = self._generate(contexts, [p.max_tokens or 48 for p in probes], enough)
        answers = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
        return [o.passed for o in judge_probes(probes, answers)]

    def answers(self, prompts: Sequence[str], num_tokens: int, told: Told | None = None) -> list[str]:
        """Whole answers, so long at most."""
        contexts = [self._context(t, told) for t in prompts]
        said = self._generate(contexts, [num_tokens] * len(contexts), [None] * len(contexts))
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]

    def kl(self) -> dict[str, float]:
        """KL(before || now) of the next token along the answers of before, nats per token, mean of the prompts."""
        return {
            name: fmean(
                float((before.exp() * (before - self._logps(ids, start))).sum(-1).mean())
                for ids, start, before in rows
            )
            for name, rows in self._before.items()
        }

    def perplexity(self, num_tokens: int) -> float:
        """Of the first tokens of the text, in windows of 512."""
        total, count = 0.0, 0
        for start in range(0, num_tokens, WINDOW):
            ids = self._text[start : start + WINDOW]
            logps = self._logps(ids, 1)
            total -= float(logps.gather(-1, torch.tensor(ids[1:])[:, None]).sum())
            count += len(ids) - 1
        return math.exp(total / count)

    # ------------------------------------------------------------------------------------------------

    def _context(self, text: str, told: Told | None = None) -> list[int]:
        asked = [Message(role="user", content=text)] if told is None else told(text)
        return encode_chat(self.tokenizer, asked)

    @torch.no_grad()
    def _logps(self, ids: list[int], start: int) -> Tensor:
        """Log-probabilities that predict ids[start:], [positions, vocabulary]."""
        logits = self.model(torch.tensor([ids]), logits_to_keep=len(ids) - start + 1).logits[0]
        return torch.log_softmax(logits[:-1], -1)

    @torch.no_grad()
    def _generate(self, contexts: list[list[int]], bounds: list[int], enough: list[Any]) -> list[list[int]]:
        """Greedy answers, token ids without the one that ends them; the shortest contexts are read first."""
        shared = min(_shared(contexts), min(map(len, contexts)) - 1)
        read = self.model(torch.tensor([contexts[0][:shared]]), logits_to_keep=1).past_key_values
        prefix = [(layer.keys, layer.values) for layer in read.layers]
        order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
        said: list[list[int]] = [[] for _ in contexts]
        for first in range(0, len(order), AT_ONCE):
            rows = order[first : first + AT_ONCE]
            width = max(len(contexts[i]) for i in rows)
            mask = torch.tensor(
                [
                    [1] * shared + [0] * (width - len(contexts[i])) + [1] * (len(contexts[i]) - shared)
                    for i in rows
                ]
            )
            ids = torch.tensor([[0] * (width - len(contexts[i])) + contexts[i][shared:] for i in rows])
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(prefix):
                cache.update(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), layer)
            while rows:
                places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                logits = self.model(
                    ids,
                    attention_mask=mask,
                    position_ids=places,
                    past_key_values=cache,
                    logits_to_keep=1,
                ).logits[:, -1]
                kept: list[int] = []
                for row, (i, token) in enumerate(zip(rows, logits.argmax(-1).tolist(), strict=True)):
                    if token in self._ends:
                        continue
                    said[i].append(token)
                    text = self.tokenizer.decode(said[i], skip_special_tokens=True) if enough[i] else ""
                    if len(said[i]) < bounds[i] and not (enough[i] and enough[i](text)):
                        kept.append(row)
                if len(kept) < len(rows):
                    cache.batch_select_indices(torch.tensor(kept, dtype=torch.long))
                rows, mask = [rows[r] for r in kept], mask[kept]
                mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], 1)
                ids = torch.tensor([[said[i][-1]] for i in rows])
        return said


def _shared(contexts: Sequence[list[int]]) -> int:
    """Tokens with which all of them begin."""
    first, last = min(contexts), max(contexts)
    return next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(map(len, (first, last)))
    )
