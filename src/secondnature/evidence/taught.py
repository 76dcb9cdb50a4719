"""Whether a correction's own prompt is answered as was wanted, told from the texts (any process).

Where no probe asks for what a lesson taught, the prompts of its corrections are asked again. Equality with the
whole wanted text is too much to ask of a real model: one word more or fewer, and what was learned counts as not
learned. So what an answer adds to its question is compared: the words that the question has not, in order. An
answer is as wanted if at least half of them are the wanted ones (the F measure of the longest common subsequence,
ROUGE-L: Lin, 2004), and it is nearer to the wanted answer than to the one before the lesson. An echo of the
question shows nothing, and an answer that stays as it was is not learned, however near to the wanted one it was.
"""

from __future__ import annotations

from collections.abc import Sequence

from secondnature.evidence.texts import words

__all__ = ["AS_WANTED", "as_wanted"]

AS_WANTED = 0.5
"""Share of the words from which on an answer is as wanted."""
MAX_WORDS = 400
"""Of a text; later ones are not looked at."""


def as_wanted(asked: str, wanted: str, answer: str, before: str) -> bool:
    """Whether an answer to `asked` is the wanted one, or near it and nearer than to the one before the lesson."""
    if answer.strip() == wanted.strip():
        return True
    near = _nearness(asked, answer, wanted)
    return near >= AS_WANTED and near > _nearness(asked, answer, before)


def _nearness(asked: str, answer: str, other: str) -> float:
    """F measure, 0 to 1, of two answers' longest common subsequence of words that the question has not."""
    known = set(words(asked))
    a, b = ([w for w in words(x)[:MAX_WORDS] if w not in known] for x in (answer, other))
    if not b:  # it adds nothing to the question: then all words count
        a, b = words(answer)[:MAX_WORDS], words(other)[:MAX_WORDS]
    return 2 * _common(a, b) / max(1, len(a) + len(b))


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
