"""Whether an answer's beginning settles its check, so that nothing more need be generated (server).

A check is a regular expression, searched in the answer. From the pattern's own parts it follows when a longer
answer is judged as the shorter one was. A match without an end anchor stays a match, whatever comes after it (with
a word boundary: once a character stands behind it). A pattern that begins at the start and has a greatest width
looks at no more than that. Lookarounds, references and atomic groups are not reasoned about: such answers are
generated whole, and so are those of patterns that could take long, for this runs between two tokens, in no sandbox.

The parts are those that Python's own parser finds (`re._parser`), as the standard library's tests use it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from secondnature.records import Check

__all__ = ["decider"]

MAX_PATHS = 256
"""Ways through the branches and optional parts of a pattern."""
MAX_WIDTH = 10_000
"""Characters: a pattern that may be wider has no greatest width."""

_PARSER: Any = re._parser  # pyright: ignore[reportAttributeAccessIssue]
_NAMES = (
    {"AT_END", "AT_END_STRING"},
    {"AT_BOUNDARY", "AT_NON_BOUNDARY"},
    {"AT_BEGINNING", "AT_BEGINNING_STRING"},
)
_ENDS, _BOUNDARIES, _STARTS = _NAMES
_CHARACTERS = {"LITERAL", "NOT_LITERAL", "ANY", "IN"}


@dataclass
class _Parts:
    """What a pattern consists of, as far as it matters here."""

    ends: bool = False
    boundaries: bool = False
    paths: int = 1
    stretches: int = 0
    """Repeats of any length."""

    def read(self, sequence: Any) -> bool:
        """Take the parts of a parsed pattern in; False: there is one that is not reasoned about."""
        return all(self._read(str(op), about) for op, about in sequence)

    def _read(self, op: str, about: Any) -> bool:
        if op in _CHARACTERS:
            return True
        if op == "AT":
            self.ends |= str(about) in _ENDS
            self.boundaries |= str(about) in _BOUNDARIES
            return str(about) in _ENDS | _BOUNDARIES | _STARTS
        if op == "BRANCH":
            self.paths *= len(about[1])
            return all(self.read(branch) for branch in about[1])
        if op == "SUBPATTERN":
            _, add, drop, inner = about
            return not (add | drop) & re.MULTILINE and self.read(inner)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = about
            if most == 1:
                self.paths *= 2
                return self.read(inner)
            self.stretches += least != most
            return len(inner) == 1 and str(inner[0][0]) in _CHARACTERS
        return False


def decider(check: Check) -> Callable[[str], bool] | None:
    """A function that says of an answer's beginning whether every longer answer passes or fails as it does.

    None: the check cannot be decided early.
    """
    pattern = check.matches if check.matches is not None else check.not_matches
    if pattern is None:
        return None
    parsed, parts = _PARSER.parse(pattern), _Parts()
    if not parts.read(parsed) or parts.paths > MAX_PATHS or parts.stretches > 1:
        return None
    many_lines = bool(parsed.state.flags & re.MULTILINE)
    if many_lines and parts.ends:
        return None
    begins = len(parsed) > 0 and str(parsed[0][0]) == "AT" and str(parsed[0][1]) in _STARTS
    width = int(parsed.getwidth()[1])
    limit = width + 1 if begins and not many_lines and width < MAX_WIDTH else None
    compiled = re.compile(pattern)

    def decided(text: str) -> bool:
        if limit is not None and len(text) > limit:
            return True
        found = None if parts.ends else compiled.search(text)
        return found is not None and (not parts.boundaries or found.end() < len(text))

    return decided
