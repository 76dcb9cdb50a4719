"""Instructions whose form can be checked: one word, capitals, a list, an ending: 330 of eleven forms (data)."""

from __future__ import annotations

import re
from collections.abc import Callable

from secondnature.evidence.packs.made import Made

__all__ = ["instructions"]

_WORDS = """river lantern garden winter copper bridge candle forest window harbour basket meadow pencil mirror
ladder blanket pocket thunder island market feather kitchen orchard saddle tunnel velvet whistle anchor compass
helmet""".split()  # noqa: SIM905 (read at a glance)
_QUESTIONS = """Is ice cold? | Is the sun hot? | Do fish swim? | Can stones fly? | Is snow black? | Do birds have
wings? | Is water dry? | Do cats bark? | Is fire hot? | Is an elephant small? | Do trees have leaves? | Is the
night bright? | Can dogs read? | Is sugar sweet? | Do cars have wheels? | Is a lemon sour? | Is the sea salty? |
Do horses fly? | Is grass green? | Is coal white? | Can babies drive? | Do books have pages? | Is a feather heavy?
| Is a stone soft? | Do bees make honey? | Is the moon made of cheese? | Can a whale swim? | Is winter warm? | Do
snails run fast? | Is glass hard?"""
_THINGS = """fruits animals colours countries cities vegetables tools sports birds flowers trees drinks rivers
planets metals insects fish instruments games desserts languages professions vehicles clothes shapes toys spices
seasons furniture pets""".split()  # noqa: SIM905


def instructions() -> list[Made]:
    """Every form with each of its words."""
    questions = [q.strip() for q in _QUESTIONS.replace("\n", " ").split("|")]
    numbers = [2 + i % 4 for i in range(30)]
    made = [make(word) for make in _FORMS for word in _WORDS]
    made += [_yes_or_no(q) for q in questions]
    made += [_list(n, things) for n, things in zip(numbers, _THINGS, strict=True)]
    return made


def _made(tag: str, prompt: str, pattern: str, right: str, wrong: str, max_tokens: int = 64) -> Made:
    return Made(prompt, tag, {"matches": pattern}, right, wrong, max_tokens)


def _upper(word: str) -> Made:
    return _made(
        "upper", f"Write the word “{word}” in capital letters.", rf"\b{word.upper()}\b", word.upper(), word
    )


def _contains(word: str) -> Made:
    asked = f"Write one sentence that contains the word “{word}”."
    return _made("contains", asked, rf"(?i)\b{word}s?\b.*\w", f"The {word} is old.", "It is old.")


def _ends(word: str) -> Made:
    asked = f"Write one sentence that ends with the word “{word}”."
    pattern = rf"(?i)\b{word}\W*\Z"
    return _made("ends", asked, pattern, f"I like the {word}.", f"The {word} is what I like.")


def _starts(word: str) -> Made:
    asked = f"Write one sentence that begins with the word “{word.capitalize()}”."
    return _made(
        "starts", asked, rf"(?i)\A\W*{word}\b.*\w", f"{word.capitalize()} by night.", f"The {word} is old."
    )


def _repeat(word: str) -> Made:
    sentence = f"The old {word} is still here."
    asked = f"Repeat this sentence exactly: {sentence}"
    return _made("repeat", asked, re.escape(sentence), sentence, f"The {word} is still here.")


def _quotes(word: str) -> Made:
    asked = f"Put this word in square brackets and write nothing else: {word}"
    return _made("brackets", asked, rf"\A\s*\[{word}\]\s*\Z", f"[{word}]", word)


def _hyphens(word: str) -> Made:
    spelt = "-".join(word)
    asked = f"Spell the word “{word}” with a hyphen between the letters, like c-a-t."
    return _made("spell", asked, rf"(?i)\b{spelt}\b", spelt, word)


def _json(word: str) -> Made:
    asked = f"Write a JSON object with the one key “name” and the value “{word}”."
    pattern = rf'(?i)\{{\s*"name"\s*:\s*"{word}"\s*\}}'
    return _made("json", asked, pattern, f'{{"name": "{word}"}}', f"name: {word}")


def _one_word(word: str) -> Made:
    asked = f"Answer with one word only: what do you think of first when you hear “{word}”?"
    return _made("one-word", asked, r"\A\W*[\w'’-]+\W*\Z", "Water.", f"I think of a {word} in the sun.", 24)


_FORMS: list[Callable[[str], Made]] = [
    _upper,
    _contains,
    _ends,
    _starts,
    _repeat,
    _quotes,
    _hyphens,
    _json,
    _one_word,
]


def _yes_or_no(question: str) -> Made:
    asked = f"Answer only yes or no: {question}"
    return _made("yes-no", asked, r"(?i)\A\W*(?:yes|no)\W*\Z", "Yes.", "Yes, it is, of course.", 24)


def _list(num: int, things: str) -> Made:
    """As many lines with a dash as asked for, and no more."""
    asked = f"List {num} {things}, one on each line, each line beginning with a dash."
    pattern = rf"\A(?:(?![ \t]*[-*•–]).*\n)*(?:[ \t]*[-*•–][^\n]*\S[^\n]*(?:\n\s*|\Z)){{{num}}}(?!\s*[-*•–])"
    right = "\n".join(f"- thing {i}" for i in range(num))
    return _made("list", asked, pattern, right, right + "\n- one more", 96)
