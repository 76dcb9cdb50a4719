"""The latest completions, remembered for whoever wants to correct one of them (server; in memory only).

Bounded by bytes as well as by their number: a conversation may be one word or a book. What is counted is an upper
estimate of what the strings take in memory, for both engines.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from secondnature.errors import NotFound
from secondnature.records import Message

__all__ = ["MAX_REMEMBERED", "MAX_REMEMBERED_BYTES", "Memory", "Said", "Unread"]

MAX_REMEMBERED = 10_000
MAX_REMEMBERED_BYTES = 64_000_000
OVERHEAD_BYTES = 1000
"""Of an entry, and of each message: the objects around the text."""


@dataclass(frozen=True)
class Said:
    """A completion that somebody may want to correct."""

    prompt: list[Message] | None
    """None: it was no chat."""
    answer: str
    weights_version: str

    @property
    def nbytes(self) -> int:
        """What it takes in memory, at most."""
        texts = [m.content for m in self.prompt or ()]
        return _bytes_of(self.answer) + sum(_bytes_of(text) + OVERHEAD_BYTES for text in texts)


@dataclass(frozen=True)
class Unread:
    """A completion as it went over the wire: taken apart only when somebody asks for it."""

    asked: bytes
    said: bytes
    read: Callable[[bytes, bytes], Said]

    @property
    def nbytes(self) -> int:
        """What it takes in memory, at most."""
        return len(self.asked) + len(self.said)


def _bytes_of(text: str) -> int:
    """What Python takes for a text: 1, 2 or 4 bytes a character, by the widest of them."""
    return len(text) * (1 if text.isascii() else 4)


class Memory:
    """The latest completions, by id, so that feedback needs no more than the id. Kept in memory only."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._said: OrderedDict[str, tuple[Said | Unread, int]] = OrderedDict()
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """What all of it takes, at most; never more than `MAX_REMEMBERED_BYTES`."""
        return self._nbytes

    def remember(self, completion_id: str, said: Said | Unread) -> None:
        """Add one; the oldest make room for it. One that is larger than all the room is not remembered."""
        nbytes = said.nbytes + OVERHEAD_BYTES
        with self._lock:
            self._forget(completion_id)
            self._said[completion_id] = (said, nbytes)
            self._nbytes += nbytes
            while len(self._said) > MAX_REMEMBERED or self._nbytes > MAX_REMEMBERED_BYTES:
                self._forget(next(iter(self._said)))

    def _forget(self, completion_id: str) -> None:
        _, nbytes = self._said.pop(completion_id, (None, 0))
        self._nbytes -= nbytes

    def recall(self, completion_id: str) -> Said:
        """One of them. Raises NotFound."""
        with self._lock:
            said, _ = self._said.get(completion_id, (None, 0))
        if said is None:
            raise NotFound(
                f"no completion {completion_id[:200]!r} is remembered: the latest {MAX_REMEMBERED:,} since the "
                f"start are, and of those no more than {MAX_REMEMBERED_BYTES // 1_000_000} MB",
                "POST /v1/corrections takes the whole conversation",
            )
        return said if isinstance(said, Said) else said.read(said.asked, said.said)
