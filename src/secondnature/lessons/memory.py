"""The latest completions, remembered for whoever wants to correct one of them (server; in memory only).

Bounded by bytes as well as by their number: a conversation may be one word or a book. What is counted is an upper
estimate of what the strings take in memory, for both engines.

A completion is known from its first chunk on, with the text so far: who stops a bad answer says so next.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

from secondnature.errors import BadInput, NotFound
from secondnature.records import CalledFunction, Message, ToolCall

__all__ = ["MAX_REMEMBERED", "MAX_REMEMBERED_BYTES", "Memory", "Said", "Telling", "Unread"]

MAX_REMEMBERED = 10_000
MAX_REMEMBERED_BYTES = 64_000_000
OVERHEAD_BYTES = 1000
"""Of an entry, and of each message: the objects around the text."""
OVERHEAD_BYTES_OF_A_PIECE = 100


@dataclass(frozen=True)
class Said:
    """A completion that somebody may want to correct."""

    prompt: list[Message] | None
    """None: it was no chat."""
    answer: str
    weights_version: str
    finish_reason: str | None = None
    """Why it ended; `unfinished`: it has not, or nobody waited for it."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the chat template was told besides (`chat_template_kwargs`)."""
    calls: Sequence[ToolCall] = ()
    """Of tools, besides the text."""
    tools: list[dict[str, Any]] | None = None
    """That the model was shown."""

    @property
    def nbytes(self) -> int:
        """What it takes in memory, at most."""
        texts = [m.content for m in self.prompt or ()] + ([json.dumps(self.options)] if self.options else [])
        calls = [c.function.arguments for m in self.prompt or () for c in m.tool_calls or ()]
        texts += [*calls, *(c.function.arguments for c in self.calls)]
        texts += map(json.dumps, self.tools or ())
        return _bytes_of(self.answer) + sum(_bytes_of(text) + OVERHEAD_BYTES for text in texts)


class Telling:
    """A completion that is being told: what of it went out so far. `Memory.tell` makes it."""

    def __init__(self, first: Said, grown: Callable[[int], None]) -> None:
        self._first = first
        self._pieces: list[str] = []
        self._grown = grown

    @property
    def nbytes(self) -> int:
        """What it takes in memory, at most."""
        return self._first.nbytes + sum(_bytes_of(x) + OVERHEAD_BYTES_OF_A_PIECE for x in self._pieces)

    def add(self, text: str) -> None:
        """The next piece went out."""
        self._pieces.append(text)
        self._grown(_bytes_of(text) + OVERHEAD_BYTES_OF_A_PIECE)

    def so_far(self) -> Said:
        """What was said until now."""
        return replace(self._first, answer="".join(self._pieces))


@dataclass(frozen=True)
class Unread:
    """A completion as it went over the wire: taken apart only when somebody asks for it."""

    asked: bytes | bytearray
    said: bytes | bytearray
    read: Callable[[bytes | bytearray, bytes | bytearray], Said]

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
        self._said: OrderedDict[str, tuple[Said | Telling | Unread, int]] = OrderedDict()
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """What all of it takes, at most; never more than `MAX_REMEMBERED_BYTES`."""
        return self._nbytes

    def remember(self, completion_id: str, said: Said | Telling | Unread) -> None:
        """Add one; the oldest make room for it. One that is larger than all the room is not remembered."""
        nbytes = said.nbytes + OVERHEAD_BYTES
        with self._lock:
            self._forget(completion_id)
            self._said[completion_id] = (said, nbytes)
            self._nbytes += nbytes
            self._make_room()

    def tell(
        self,
        completion_id: str,
        prompt: list[Message] | None,
        weights_version: str,
        options: Mapping[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> Telling:
        """Remember one that begins; `remember` ends it. Left alone, it stays as far as it was told."""

        def grown(nbytes: int) -> None:
            with self._lock:
                it, before = self._said.get(completion_id, (None, 0))
                if it is telling:
                    self._said[completion_id] = (telling, before + nbytes)
                    self._nbytes += nbytes
                    self._make_room()

        first = Said(prompt, "", weights_version, "unfinished", options or {}, tools=tools)
        telling = Telling(first, grown)
        self.remember(completion_id, telling)
        return telling

    def _make_room(self) -> None:
        while len(self._said) > MAX_REMEMBERED or self._nbytes > MAX_REMEMBERED_BYTES:
            self._forget(next(iter(self._said)))

    def _forget(self, completion_id: str) -> None:
        _, nbytes = self._said.pop(completion_id, (None, 0))
        self._nbytes -= nbytes

    def forget(self, completion_id: str) -> None:
        """Remember one no longer; there may be none."""
        with self._lock:
            self._forget(completion_id)

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
        return _read(said)

    def answers_to(self, prompt: Sequence[Message]) -> list[tuple[str, Said]]:
        """(id, completion) of what was answered to a conversation, newest first.

        Those with the very same turns come first, then those that differ in system turns and in space around texts:
        clients add the one and lose the other.
        """
        asked = _turns(prompt)
        found = [(key, said) for key, said in self._chats() if _turns(said.prompt or ()) == asked]
        return sorted(found, key=lambda x: x[1].prompt != list(prompt))

    def answers_around(self, prompt: Sequence[Message]) -> list[tuple[str, Said]]:
        """(id, completion) of what was answered where a client had put more around the user's texts, newest first.

        Files and search results are shown to the model so, and not to the user. A short text may stand in many
        others: whoever asks must know the answer by more than this.
        """
        asked = _turns(prompt)
        return [(key, said) for key, said in self._chats() if _stands_in(asked, _turns(said.prompt or ()))]

    def _chats(self) -> Iterator[tuple[str, Said]]:
        """The chats that can be corrected, newest first."""
        with self._lock:
            known = [(key, said) for key, (said, _) in reversed(self._said.items())]
        for key, it in known:
            try:
                said = _read(it)
            except BadInput:  # it is none that can be corrected
                continue
            if said.prompt is not None:
                yield key, said


def _read(said: Said | Telling | Unread) -> Said:
    if isinstance(said, Telling):
        return said.so_far()
    return said if isinstance(said, Said) else said.read(said.asked, said.said)


_Turn = tuple[str, str, list[CalledFunction]]
"""(role, text, calls)"""


def _turns(messages: Sequence[Message]) -> list[_Turn]:
    return [
        (m.role, m.content.strip(), [c.function for c in m.tool_calls or ()])
        for m in messages
        if m.role != "system"
    ]


def _stands_in(asked: Sequence[_Turn], shown: Sequence[_Turn]) -> bool:
    """Whether the same turns were shown, with more around what the user wrote."""
    return [turn[0] for turn in asked] == [turn[0] for turn in shown] and all(
        text and text in whole if role == "user" else (text, calls) == (whole, made)
        for (role, text, calls), (_, whole, made) in zip(asked, shown, strict=True)
    )
