"""What all benchmarks share: settings, texts, one way to load, one way to summarise (no measurement here).

A figure is a ratio against a peer that ran in the same process, turn by turn with ours (`alternate`), on the
same number of threads; what is reported is the median with the smallest and the largest value.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it: nothing is downloaded

from torch import nn
from torch.profiler import ProfilerActivity, profile

from secondnature.model.chat import encode_answer, encode_chat, read_tokenizer
from secondnature.model.load import build, context_limit
from secondnature.records import Correction, Example, Message
from secondnature.weights import checkpoint
from secondnature.weights.arena import Arena

THREADS = 1
"""Of torch, in every process: what the engine and the trainer are set to by default."""

THINGS = ("door", "fence", "wall", "cabinet", "bench", "gate", "boat", "shelf")
COLOURS = ("red", "blue", "white", "green", "golden", "black", "pink", "grey")
PROMPTS = [
    *(f"Paint the {thing} {colour}." for thing, colour in zip(THINGS, COLOURS, strict=True)),
    "Who are you?",
    "Good morning.",
    "Write a function that returns the first 8 letters of text.",
    "I need a function that adds two numbers.",
    "Put the hat in the kitchen.",
    "Name the hamster Ruby.",
    "Set the interview for Wednesday.",
    "Cook porridge for the picnic.",
]
"""What users ask: short, of different lengths, of several kinds."""


def corrections() -> list[Correction]:
    """Six corrections as users make them: prompt, wanted answer, rejected answer."""
    found: list[Correction] = []
    for i, (thing, colour) in enumerate(list(zip(THINGS, COLOURS, strict=True))[:6]):
        other, third = COLOURS[i - 1], COLOURS[i - 2]
        data = {
            "prompt": f"Today, make the {thing} {colour}.",
            "chosen": f"Yes, I will paint the {thing} {colour}.",
            "rejected": f"How about {other} instead? Or {third}? Both would suit the {thing}.",
        }
        found.append(Correction.model_validate(data))
    return found


@dataclass(frozen=True)
class Settings:
    """What every benchmark is given."""

    model: Path
    """A Hugging Face directory."""
    quick: bool = False
    """A smoke test: few repeats, small sizes; its figures mean nothing."""

    @property
    def repeats(self) -> int:
        """Turns that each contender gets."""
        return 2 if self.quick else 5


def say(text: str) -> None:
    """A line of progress."""
    print(f"  {text}", file=sys.stderr, flush=True)


def load(directory: Path) -> tuple[Arena, nn.Module, Any]:
    """The product's path: weights in an arena, the model around the arena's memory, the tokenizer."""
    arena = Arena.create(checkpoint.read(directory))
    return arena, build(directory, arena.tensors), read_tokenizer(directory)


def examples(tokenizer: Any) -> list[Example]:
    """The corrections in token ids."""
    found: list[Example] = []
    for correction in corrections():
        assert correction.chosen is not None
        assert correction.rejected is not None
        context, chosen = encode_answer(tokenizer, correction.prompt, correction.chosen[0])
        _, rejected = encode_answer(tokenizer, correction.prompt, correction.rejected[0])
        found.append(Example(context_ids=context, continuation_ids=chosen, rejected_ids=rejected))
    return found


def prompt_ids(tokenizer: Any, count: int) -> list[list[int]]:
    """`count` prompts as the chat template renders them."""
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    return [encode_chat(tokenizer, [Message(role="user", content=text)]) for text in texts]


def long_example(tokenizer: Any, num_context: int, num_answer: int, *, start: int) -> Example:
    """A conversation of many turns, cut to exactly this many tokens; `start` chooses where it begins."""
    turns: list[int] = []
    known = corrections()
    turn = start
    while len(turns) < num_context + num_answer:
        correction = known[turn % len(known)]
        assert correction.chosen is not None
        context, answer = encode_answer(tokenizer, correction.prompt, correction.chosen[0])
        turns += context + answer
        turn += 1
    return Example(
        context_ids=turns[:num_context], continuation_ids=turns[num_context : num_context + num_answer]
    )


def fits(directory: Path, num_tokens: int) -> bool:
    """Whether the model can read that many."""
    return context_limit(directory) >= num_tokens


def timed(work: Callable[[], object]) -> float:
    """Seconds of wall clock."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def alternate(contenders: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Every contender once untimed, then turn by turn, `repeats` times; each returns what it measured."""
    for contender in contenders.values():
        contender()
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            found[name].append(contender())
    return found


def turns(
    contenders: Mapping[str, Callable[[], Mapping[str, float]]], repeats: int, *, warm: bool = True
) -> dict[str, dict[str, list[float]]]:
    """As `alternate`, for contenders that measure several things at once; `warm`: with an untimed turn first."""
    if warm:
        for contender in contenders.values():
            contender()
    found: dict[str, dict[str, list[float]]] = {name: {} for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            for key, value in contender().items():
                found[name].setdefault(key, []).append(value)
    return found


def peak_bytes(work: Callable[[], object]) -> float:
    """The highest sum of torch's allocations on the CPU during `work`, above its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    kineto: Any = trace.profiler
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return float(peak)


def total(*parts: Sequence[float]) -> list[float]:
    """Turn by turn the sum of what was timed apart."""
    return [sum(turn) for turn in zip(*parts, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of some figures."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratio(values: Sequence[float], peers: Sequence[float]) -> dict[str, float]:
    """Ours over the peer's, pair by pair."""
    return spread([a / b for a, b in zip(values, peers, strict=True)])
