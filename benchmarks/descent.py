"""A model in fp32 under ordinary autograd, for questions about optimizers (no measurement here).

What the product does besides (frozen contexts, bf16 with rounding, factors) is left out, so that a difference
between two optimizers is the optimizers'. The loss is the mean over the answers' tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from secondnature.model.chat import encode_answer, read_tokenizer
from secondnature.model.load import build
from secondnature.records import Correction, Message, Probe, read_jsonl
from secondnature.weights import checkpoint

LISTENING = Path(__file__).parents[1] / "examples" / "listening"
MAX_TOKENS = 48
"""Longer rows are left out: they would be padding for all the others."""

Row = tuple[list[int], list[int]]
"""(context ids, answer ids)."""
Vector = dict[str, Tensor]
"""One tensor per parameter."""


class Rows:
    """Conversations as one padded batch; the loss counts the answers' tokens."""

    def __init__(self, rows: Sequence[Row]) -> None:
        longest = max(len(c) + len(a) for c, a in rows)
        self.ids = torch.zeros(len(rows), longest, dtype=torch.long)
        self.targets = torch.full_like(self.ids, -100)
        for i, (context, answer) in enumerate(rows):
            self.ids[i, : len(context) + len(answer)] = torch.tensor(context + answer)
            self.targets[i, len(context) : len(context) + len(answer)] = torch.tensor(answer)

    def part(self, chosen: Sequence[int]) -> Rows:
        """Some of the rows."""
        some = object.__new__(Rows)
        some.ids, some.targets = self.ids[list(chosen)], self.targets[list(chosen)]
        return some


class Subject:
    """The model, its weights by name, and where they started."""

    def __init__(self, directory: Path) -> None:
        self.start: Vector = {n: t.float() for n, t in checkpoint.read(directory).items()}
        self.weights: Vector = {n: t.clone() for n, t in self.start.items()}
        self.model = build(directory, self.weights)
        self.tokenizer = read_tokenizer(directory)

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Put other weights in place."""
        for name, tensor in self.weights.items():
            tensor.copy_(values[name])

    def copy(self) -> Vector:
        """The weights as they are."""
        return {n: t.clone() for n, t in self.weights.items()}

    def logits(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(N, V) before each answer's token, and the tokens (N)."""
        logits = self.model(input_ids=rows.ids[:, :-1], use_cache=False).logits
        answers = rows.targets[:, 1:] != -100
        return logits[answers].float(), rows.targets[:, 1:][answers]

    @torch.no_grad()
    def loss(self, rows: Rows) -> float:
        """Mean cross-entropy of the answers, nats per token."""
        return float(F.cross_entropy(*self.logits(rows)))

    def gradients(self, rows: Rows) -> Vector:
        """Of that loss, by parameter."""
        parameters = dict(self.model.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            found = torch.autograd.grad(F.cross_entropy(*self.logits(rows)), list(parameters.values()))
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        return dict(zip(parameters, found, strict=True))

    def encode(self, prompt: Sequence[Message], answer: str) -> Row:
        """A conversation in token ids."""
        return encode_answer(self.tokenizer, prompt, Message(role="assistant", content=answer))

    def directions(self) -> list[Row]:
        """The corrections of the listening example and as many directions again as its probes hold."""
        found: list[Row] = []
        for c in read_jsonl(LISTENING / "corrections.jsonl", Correction):
            assert c.chosen is not None
            found.append(self.encode(c.prompt, c.chosen[0].content))
        for p in read_jsonl(LISTENING / "probes.jsonl", Probe):
            if (p.behaviour, p.side) == ("listening", "right") and p.margin is not None:
                found.append(self.encode(p.prompt, p.margin[0]))
        return _short(found)

    def others(self) -> list[Row]:
        """Requests of other kinds with the answers that the model should go on giving."""
        found: list[Row] = []
        for c in read_jsonl(LISTENING / "replay.jsonl", Correction):
            assert c.chosen is not None
            found.append(self.encode(c.prompt, c.chosen[0].content))
        return _short(found)


def _short(rows: list[Row]) -> list[Row]:
    """The rows that are short enough; at least the shortest 48, where the tokenizer makes all of them long."""
    lengths = [len(context) + len(answer) for context, answer in rows]
    limit = max(MAX_TOKENS, sorted(lengths)[:48][-1])
    return [row for row, length in zip(rows, lengths, strict=True) if length <= limit]


def mini_batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Shuffled passes in batches of `size`, without end."""
    order = random.Random(seed)
    while True:
        shuffled = order.sample(range(count), count)
        yield from (shuffled[i : i + size] for i in range(0, count - size + 1, size))


def descend_to(
    subject: Subject,
    rows: Rows,
    step: Callable[[Vector], object],
    target: float,
    *,
    seed: int,
    max_steps: int,
) -> int:
    """Train from the start until the loss on all rows is `target`; how many steps it took.

    The last step is cut where its straight line crosses the target, so that all optimizers end at the same loss.

    Raises:
        RuntimeError: it was not reached.
    """
    subject.set(subject.start)
    batches = mini_batches(len(rows.ids), max(1, len(rows.ids) // 2), seed)
    for number in range(1, max_steps + 1):
        before = subject.copy()
        step(subject.gradients(rows.part(next(batches))))
        if subject.loss(rows) > target:
            continue
        after, low, high = subject.copy(), 0.0, 1.0
        for _ in range(10):
            middle = (low + high) / 2
            subject.set({n: torch.lerp(before[n], after[n], middle) for n in before})
            low, high = (middle, high) if subject.loss(rows) > target else (low, middle)
        return number
    raise RuntimeError(f"the loss is {subject.loss(rows):.3g} after {max_steps} steps; expected {target:.3g}")
