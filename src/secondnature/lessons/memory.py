"""The latest completions, remembered for whoever wants to correct one of them (server; in memory only)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from secondnature.errors import NotFound
from secondnature.records import Message

__all__ = ["MAX_REMEMBERED", "MAX_REMEMBERED_BYTES", "Memory", "Said"]

MAX_REMEMBERED = 10_000
MAX_REMEMBERED_BYTES = 64_000_000


@dataclass(frozen=True)
class Said:
    """A completion that somebody may want to correct."""

    prompt: list[Message] | None
    """None: it was no chat."""
    answer: str
    weights_version: str


class Memory:
    """The latest completions, by id, so that feedback needs no more than the id. Kept in memory only."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._said: OrderedDict[str, tuple[Said | Callable[[], Said], int]] = OrderedDict()
        self._nbytes = 0

    def remember(self, completion_id: str, said: Said | Callable[[], Said], nbytes: int = 0) -> None:
        """Add one, or what makes it when it is asked for and the bytes it holds; the oldest make room for it."""
        with self._lock:
            self._said[completion_id] = (said, nbytes)
            self._nbytes += nbytes
            while len(self._said) > MAX_REMEMBERED or self._nbytes > MAX_REMEMBERED_BYTES:
                _, (_, freed) = self._said.popitem(last=False)
                self._nbytes -= freed

    def recall(self, completion_id: str) -> Said:
        """One of them. Raises NotFound."""
        with self._lock:
            said, _ = self._said.get(completion_id, (None, 0))
        if said is None:
            raise NotFound(
                f"no completion {completion_id!r} is remembered (the last {MAX_REMEMBERED:,} since the start are)",
                "POST /v1/corrections takes the whole conversation",
            )
        return said if isinstance(said, Said) else said()
