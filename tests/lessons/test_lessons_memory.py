"""Remembered completions take bounded memory, whatever their length."""

from __future__ import annotations

import sys

import pytest

from secondnature.errors import NotFound
from secondnature.lessons import memory as room
from secondnature.lessons.memory import MAX_REMEMBERED_BYTES, Memory, Said, Unread
from secondnature.records import Message


def said(prompt: str, answer: str = "answer", turns: int = 1) -> Said:
    return Said([Message(role="user", content=prompt + str(i)) for i in range(turns)], answer, "w0")


def real_bytes(it: Said) -> int:
    """What Python says that its strings and objects take."""
    messages = it.prompt or []
    found = sys.getsizeof(it) + sys.getsizeof(it.answer) + sys.getsizeof(messages)
    return found + sum(
        sys.getsizeof(m) + sys.getsizeof(m.__dict__) + sys.getsizeof(m.content) for m in messages
    )


@pytest.mark.parametrize("text", ["a" * 150_000, "\u65e5" * 50_000, "\U0001f642" * 40_000, "\xe9" * 90_000])
def test_the_whole_memory_is_bounded_in_bytes(text: str) -> None:
    memory = Memory()
    for i in range(1000):
        memory.remember(f"x{i}", said(text, answer=text[:20_000]))
        assert memory.nbytes <= MAX_REMEMBERED_BYTES
    left = [it for it, _ in memory._said.values()]  # pyright: ignore[reportPrivateUsage]
    assert 10 < len(left) < 1000
    assert sum(real_bytes(it) for it in left if isinstance(it, Said)) <= memory.nbytes
    assert memory.recall("x999").answer == text[:20_000]
    with pytest.raises(NotFound, match=r"latest 10,000 since the start are, and of those no more than 64 MB"):
        memory.recall("x0")


def test_many_short_turns_count_too() -> None:
    it = said("a", turns=1000)
    assert it.nbytes >= real_bytes(it)


def test_one_that_is_larger_than_all_the_room_pushes_nothing_else_out_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "MAX_REMEMBERED_BYTES", 50_000)
    memory = Memory()
    memory.remember("huge", said("a" * 100_000))
    assert memory.nbytes == 0
    memory.remember("small", said("a"))
    memory.remember("small", said("b"))  # the same again counts once
    assert memory.recall("small").prompt == [Message(role="user", content="b0")]
    assert memory.nbytes == said("b").nbytes + room.OVERHEAD_BYTES


def test_what_is_read_later_counts_by_its_bytes() -> None:
    memory = Memory()
    for i in range(500):
        memory.remember(
            f"x{i}", Unread(b"a" * 200_000, b"b", lambda asked, said: Said(None, said.decode(), "w"))
        )
        assert memory.nbytes <= MAX_REMEMBERED_BYTES
    assert memory.recall("x499").answer == "b"
    with pytest.raises(NotFound):
        memory.recall("x0")


def test_the_number_is_bounded_too() -> None:
    memory = Memory()
    for i in range(room.MAX_REMEMBERED + 5):
        memory.remember(f"x{i}", Said(None, "", ""))
    assert len(memory._said) == room.MAX_REMEMBERED  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(NotFound):
        memory.recall("x4")
