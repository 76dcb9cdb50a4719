"""Words of a text as lint, style and losses count them: lower case, without signs but apostrophes and hyphens."""

from __future__ import annotations

import re

__all__ = ["opening", "words"]

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def words(text: str) -> list[str]:
    """All words of a text, in order."""
    return [w.lower() for w in _WORD.findall(text)]


def opening(text: str) -> str:
    """The first two words of a text."""
    return " ".join(words(text)[:2])
