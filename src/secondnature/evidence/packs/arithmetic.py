"""Sums of small numbers, 330 of them, drawn with a fixed seed; no result is one of the numbers asked (data)."""

from __future__ import annotations

import random

from secondnature.evidence.packs.made import Made

__all__ = ["arithmetic"]

SEED = 20_261_128
_EACH = 55


def arithmetic() -> list[Made]:
    """Six kinds, 55 of each."""
    rng = random.Random(SEED)
    kinds = (_add_small, _add_large, _subtract, _multiply, _divide, _sequence)
    found: dict[str, Made] = {}
    for kind in kinds:
        num = 0
        while num < _EACH:
            prompt, result, numbers = kind(rng)
            if result in numbers or prompt in found:
                continue
            tag = kind.__name__.removeprefix("_").replace("_", "-")
            found[prompt] = Made(
                prompt=prompt,
                tag=tag,
                check={"matches": rf"(?<![\d.,]){result}(?![\d]|[.,]\d)"},
                right=f"The answer is {result}.",
                wrong=f"The answer is {result + 1}.",
                max_tokens=48,
            )
            num += 1
    return list(found.values())


def _add_small(rng: random.Random) -> tuple[str, int, list[int]]:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return f"What is {a} + {b}?", a + b, [a, b]


def _add_large(rng: random.Random) -> tuple[str, int, list[int]]:
    a, b = rng.randint(11, 89), rng.randint(11, 89)
    return f"What is {a} + {b}?", a + b, [a, b]


def _subtract(rng: random.Random) -> tuple[str, int, list[int]]:
    a = rng.randint(5, 40)
    b = rng.randint(1, a - 1)
    return f"What is {a} - {b}?", a - b, [a, b]


def _multiply(rng: random.Random) -> tuple[str, int, list[int]]:
    a, b = rng.randint(2, 10), rng.randint(2, 10)
    return f"What is {a} times {b}?", a * b, [a, b]


def _divide(rng: random.Random) -> tuple[str, int, list[int]]:
    a, b = rng.randint(2, 12), rng.randint(2, 10)
    return f"What is {a * b} divided by {b}?", a, [a * b, b]


def _sequence(rng: random.Random) -> tuple[str, int, list[int]]:
    start, step = rng.randint(1, 30), rng.choice([1, 2, 3, 5, 10])
    shown = [start + step * i for i in range(4)]
    return f"Which number comes next: {', '.join(map(str, shown))}?", start + 4 * step, shown
