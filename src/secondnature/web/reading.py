"""What a model wrote, read as what it thought, what it said and what it called (server).

The same for an answer that comes whole and for one that comes in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secondnature.model.thoughts import Thoughts
from secondnature.web.tool_calls import Call, CallScanner, Parameters

__all__ = ["Read", "Reader"]


@dataclass(frozen=True)
class Read:
    """An answer, or a piece of one, taken apart."""

    thoughts: str = ""
    text: str = ""
    calls: Sequence[Call] = ()


class Reader:
    """Reads one answer. Text goes on as it comes, unless it may be the beginning of something else.

    Args:
        offered: the schema of each tool that the model was shown; None: it calls none.
        thoughts: what the answer may begin with; None: all of it is said.
        single: at most one call is wanted.
    """

    def __init__(self, offered: Parameters | None, thoughts: Thoughts | None, *, single: bool) -> None:
        self._calls = None if offered is None else CallScanner(offered)
        self._thoughts = None if thoughts is None else _ThoughtScanner(thoughts)
        self._single = single

    def feed(self, text: str) -> Read:
        """What the next piece settles; calls come at the end."""
        thought, said = ("", text) if self._thoughts is None else self._thoughts.feed(text)
        return Read(thought, said if self._calls is None else self._calls.feed(said))

    def end(self) -> Read:
        """What was held back, and the calls."""
        thought, said = ("", "") if self._thoughts is None else self._thoughts.end()
        if self._calls is None:
            return Read(thought, said)
        passed = self._calls.feed(said)
        held, calls = self._calls.end()
        return Read(thought, passed + held, calls[:1] if self._single else calls)

    def whole(self, text: str) -> Read:
        """All of an answer; the reader is used up."""
        begun, rest = self.feed(text), self.end()
        return Read(begun.thoughts + rest.thoughts, begun.text + rest.text, rest.calls)


class _ThoughtScanner:
    """Takes the block of thoughts off the beginning of an answer."""

    def __init__(self, block: Thoughts) -> None:
        self._block = block
        self._held = ""
        self._thinking: bool | None = True if block.opened else None
        """None: it has not begun to say anything."""
        self._said = False

    def feed(self, text: str) -> tuple[str, str]:
        """(thoughts, text) that are settled."""
        self._held += text
        if self._thinking is None:
            begun = self._held.lstrip()
            if len(begun) < len(self._block.open) and self._block.open.startswith(begun):
                return "", ""
            self._thinking = begun.startswith(self._block.open)
            self._said = not self._thinking
            self._held = begun.removeprefix(self._block.open) if self._thinking else self._held
        thought = self._thought() if self._thinking else ""
        if self._thinking:
            return thought, ""
        if not self._said:  # the space between thoughts and text is neither
            self._held = self._held.lstrip()
            self._said = bool(self._held)
        said, self._held = self._held, ""
        return thought, said

    def _thought(self) -> str:
        """More of the thoughts; they may end in it."""
        close = self._block.close
        at = self._held.find(close)
        if at >= 0:
            self._thinking = False
            thought, self._held = self._held[:at], self._held[at + len(close) :]
            return thought
        kept = max((n for n in range(1, len(close)) if self._held.endswith(close[:n])), default=0)
        cut = len(self._held) - kept
        thought, self._held = self._held[:cut], self._held[cut:]
        return thought

    def end(self) -> tuple[str, str]:
        """(thoughts, text) that were held back."""
        held, self._held = self._held, ""
        return (held, "") if self._thinking else ("", held)
