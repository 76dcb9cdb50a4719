"""The counters beside the weights: who writes, what is torn, and the order in which others see it."""

from __future__ import annotations

import platform

import numpy as np
import pytest

from secondnature.errors import WeightsError
from secondnature.weights import counters
from secondnature.weights.counters import HEADER_BYTES, Counters


def some_counters() -> Counters:
    return Counters(memoryview(bytearray(HEADER_BYTES)))


def test_a_write_begins_ends_and_is_counted_also_when_it_raises() -> None:
    mine = some_counters()
    assert not mine.is_arena
    mine.format()
    assert mine.is_arena
    with mine.writing():
        assert mine.writes == (1, 0)
    with pytest.raises(KeyError), mine.writing():
        raise KeyError
    assert mine.writes == (2, 2)
    mine.load = -1
    assert (mine.load, mine.writes) == (0, (2, 2))


def test_a_torn_write_is_closed_and_the_next_one_has_a_number_of_its_own() -> None:
    mine = some_counters()
    mine._words[1] = 5
    mine.close_torn_write()
    assert mine.writes == (5, 5)
    with mine.writing():
        assert mine.writes == (6, 5)


def test_the_kernels_barrier_works_here() -> None:
    """x86-64 needs none, but has the call: what other machines rely on is run on this one."""
    barrier = counters.membarrier(platform.machine())
    assert barrier is not None, "this kernel, or its sandbox, has no membarrier(2)"
    for _ in range(1000):
        barrier()


def test_the_barrier_stands_between_counters_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun, barrier, weights, barrier, done; and a barrier on both sides of a look."""
    seen: list[tuple[int, int]] = []
    raw = bytearray(HEADER_BYTES)
    memory = np.frombuffer(raw, np.uint64)
    monkeypatch.setattr(counters, "_barrier", lambda: seen.append((int(memory[1]), int(memory[2]))))
    mine = Counters(memoryview(raw))
    with mine.writing():
        seen.append((-1, -1))
    assert seen == [(1, 0), (-1, -1), (1, 0)]
    seen.clear()
    assert mine.writes == (1, 1)
    assert len(seen) == 2


def test_machines_without_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert counters.barrier("x86_64") is counters.barrier("AMD64")
    with pytest.raises(WeightsError, match=r"no membarrier\(2\).*Linux 4\.16"):
        counters.barrier("armv7l")
    monkeypatch.setattr(counters, "_barrier", WeightsError("this armv7l kernel has no membarrier(2)"))
    with pytest.raises(WeightsError, match="no membarrier"):
        some_counters()
