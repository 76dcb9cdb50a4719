"""An answer whose beginning settles its check is judged as the whole one would be."""

from __future__ import annotations

import random
import re

import pytest

from secondnature.evidence.decided import decider
from secondnature.records import Check

LETTERS = "ab \n"


def pattern(draw: random.Random, depth: int = 0) -> str:
    """Any pattern, of parts that can and parts that cannot be decided early."""
    kinds = ["a", "b", ".", "[ab]", r"\s", "[^a]", "^", "$", r"\Z", r"\A", r"\b", r"\B"]
    deep = ["({})", "(?:{})?", "(?:{}|{})", "(?={})", "(?!{})", "(?<=a){}", "(?>{})", "(a?){}\\1"]
    if depth < 2 and draw.random() < 0.3:
        made = draw.choice(deep)
        return made.format(*(pattern(draw, depth + 1) for _ in range(made.count("{}"))))
    parts = [draw.choice(kinds) for _ in range(draw.randint(1, 4))]
    repeats = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "*?", "++"]
    return "".join(p + (draw.choice(repeats) if p[0] not in "^$\\" else "") for p in parts)


def test_what_is_decided_stays_so() -> None:
    """Of thousands of patterns and texts: whatever follows a beginning that was decided, the verdict is its own."""
    draw = random.Random(0)
    early = early_yes = late = 0
    for _ in range(4000):
        given = draw.choice(["", "", "", "(?m)", "(?i)", "(?s)"]) + draw.choice(["", "^"]) + pattern(draw)
        try:
            compiled = re.compile(given)
        except re.error:
            continue
        decided = decider(Check(matches=given))
        assert (decided is None) == (decider(Check(not_matches=given)) is None)
        if decided is None:
            late += 1
            continue
        for _ in range(12):
            text = "".join(draw.choices(LETTERS, k=draw.randint(0, 14)))
            first = next((i for i in range(len(text) + 1) if decided(text[:i])), None)
            if first is None:
                continue
            verdict = compiled.search(text[:first]) is not None
            early, early_yes = early + 1, early_yes + verdict
            for end in range(first, len(text) + 1):
                assert (compiled.search(text[:end]) is not None) == verdict, (given, text, first, end)
    assert min(early, early_yes, early - early_yes, late) > 300, (early, early_yes, late)


@pytest.mark.parametrize(
    ("given", "text", "at"),
    [
        ("Paris", "It is Paris, of course", "It is Paris"),
        (r"\bParis\b", "It is Paris, of course", "It is Paris,"),
        ("^Will do", "Will do: all of it", "Will do"),
        ("^Will do", "I am sorry, but as an AI", "I am sorr"),
        (r"^Ankara\.?$", "The capital of Turkey is Ankara.", "The capit"),
        ("(?i)yes|sure", "Sure, I will", "Sure"),
    ],
)
def test_checks_as_people_write_them_are_decided_soon(given: str, text: str, at: str) -> None:
    for check in (Check(matches=given), Check(not_matches=given)):
        decided = decider(check)
        assert decided is not None
        assert next(text[:i] for i in range(len(text) + 1) if decided(text[:i])) == at


@pytest.mark.parametrize(
    "given", [r"42\s*$", "(?!.*sorry)", "(a|b)+c", r"(.)\1", "(?m)^a$", ".*a.*b", "(?:a|b)" * 9, "(?m:^a)"]
)
def test_what_depends_on_the_rest_or_may_take_long_is_not(given: str) -> None:
    decided = decider(Check(matches=given))
    assert decided is None or not any(decided("aab 42\nsorry" * n) for n in range(20))


def test_other_checks_need_the_whole_answer() -> None:
    assert decider(Check(python="assert f(1) == 2")) is None
    assert decider(Check(prefers=("a", "b"))) is None
