"""Small Python functions: a prompt that asks for one, an answer that is plain Python, and assertions that run it.

The whole answer is the code (no fence, no prose), so executing the answer and then the assertions is the check.
Bodies come from one or two operations with a constant, names from a verb and a noun: held out are combinations of
name, operation and constant, by hash. No torch here.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from secondnature.embedded.directions import Split, split_of
from secondnature.embedded.words import NAME_NOUNS, NAME_VERBS

Value = int | str | list[int]


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that a function does."""

    text: str
    """What the prompt says; {n} is the constant."""
    code: str
    """The expression over `x`, `text` or `items`."""
    run: Callable[[Any, int], Value]
    """Reference: (argument, n) -> result."""
    inputs: tuple[Value, ...]

    @property
    def argument(self) -> str:
        """The name of the parameter."""
        first = self.inputs[0]
        return "text" if isinstance(first, str) else "items" if isinstance(first, list) else "x"


_INTS: tuple[Value, ...] = (0, 1, 5, -3, 12)
_TEXTS: tuple[Value, ...] = ("abc", "Hello", "x y z")
_LISTS: tuple[Value, ...] = ([3, 1, 2], [7], [4, 4, -1, 9])

OPERATIONS: tuple[Operation, ...] = (
    Operation("adds {n} to x", "x + {n}", lambda x, n: x + n, _INTS),
    Operation("takes {n} from x", "x - {n}", lambda x, n: x - n, _INTS),
    Operation("multiplies x by {n}", "x * {n}", lambda x, n: x * n, _INTS),
    Operation("returns the square of x plus {n}", "x * x + {n}", lambda x, n: x * x + n, _INTS),
    Operation("tells if x is more than {n}", "x > {n}", lambda x, n: x > n, _INTS),
    Operation("tells if x is less than {n}", "x < {n}", lambda x, n: x < n, _INTS),
    Operation("tells if x is {n}", "x == {n}", lambda x, n: x == n, _INTS),
    Operation("returns the larger of x and {n}", "max(x, {n})", max, _INTS),
    Operation("returns the smaller of x and {n}", "min(x, {n})", min, _INTS),
    Operation("repeats text {n} times", "text * {n}", lambda t, n: t * n, _TEXTS),
    Operation("returns the first {n} letters of text", "text[:{n}]", lambda t, n: t[:n], _TEXTS),
    Operation("returns the length of text plus {n}", "len(text) + {n}", lambda t, n: len(t) + n, _TEXTS),
    Operation("turns text around", "text[::-1]", lambda t, _: t[::-1], _TEXTS),
    Operation("writes text in capitals", "text.upper()", lambda t, _: t.upper(), _TEXTS),
    Operation("returns the sum of items plus {n}", "sum(items) + {n}", lambda a, n: sum(a) + n, _LISTS),
    Operation("returns the largest of items plus {n}", "max(items) + {n}", lambda a, n: max(a) + n, _LISTS),
    Operation("returns the first {n} items", "items[:{n}]", lambda a, n: a[:n], _LISTS),
    Operation("returns the number of items plus {n}", "len(items) + {n}", lambda a, n: len(a) + n, _LISTS),
    Operation("sorts the items", "sorted(items)", lambda a, _: sorted(a), _LISTS),
    Operation("returns the last of items", "items[-1]", lambda a, _: a[-1], _LISTS),
)

CODE_FRAMES: tuple[str, ...] = (
    "Write a function {name} that {what}.",
    "I need a function {name} that {what}.",
    "Please write a function {name} that {what}.",
    "Python: a function {name} that {what}.",
    "Write {name}, a function that {what}.",
)


@dataclass(frozen=True, slots=True)
class Function:
    """One small function: prompt, answer and assertions."""

    prompt: str
    answer: str
    tests: str
    name: str
    operation: int
    """Index into `OPERATIONS`."""


def make_function(name: str, operation: int, n: int, frame: str) -> Function:
    """The function `name` with the operation and the constant `n`."""
    op = OPERATIONS[operation]
    what, code = op.text.format(n=n), op.code.format(n=n)
    cases = [(x, op.run(x, n)) for x in op.inputs]
    return Function(
        prompt=frame.format(name=name, what=what),
        answer=f"def {name}({op.argument}):\n    return {code}",
        tests="\n".join(f"assert {name}({x!r}) == {y!r}" for x, y in cases),
        name=name,
        operation=operation,
    )


def small_function(rng: random.Random, split: Split = "train") -> Function:
    """A random function of the split."""
    while True:
        name = f"{rng.choice(NAME_VERBS)}_{rng.choice(NAME_NOUNS)}"
        operation, n = rng.randrange(len(OPERATIONS)), rng.randrange(1, 13)
        constant = n if "{n}" in OPERATIONS[operation].code else 0
        if split_of("code", name, OPERATIONS[operation].code, str(constant)) == split:
            return make_function(name, operation, n, rng.choice(CODE_FRAMES))
