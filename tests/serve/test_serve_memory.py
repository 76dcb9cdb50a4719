"""Memory that a thread has freed goes back to the system, once there is enough of it, and not before."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from secondnature.serve.memory import Growth, anonymous_bytes
from secondnature.train.memory import give_back

PIECE = 16 * 1024
"""Numbers in a tensor: 64 KB, which glibc takes from the thread's arena."""
COUNT = 3000


def in_a_thread(work: Callable[[], None]) -> None:
    """As the engine's: its memory is in an arena of its own."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as e:  # noqa: BLE001  (raised again below)
            failed.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def test_what_lies_between_things_that_live_on_goes_back() -> None:
    def work() -> None:
        give_back()  # of what earlier tests have freed, nothing is to be taken
        growth = Growth(min_bytes=64 * 2**20, look_s=0)
        before = anonymous_bytes()
        pieces: list[torch.Tensor | None] = [torch.ones(PIECE) for _ in range(COUNT)]
        assert growth.look(busy=True), "it has grown by 190 MB, all of it in use"
        assert anonymous_bytes() - before > 160e6, "what is in use stays"
        again = Growth(min_bytes=64 * 2**20, look_s=0)
        again._least = before  # pyright: ignore[reportPrivateUsage]
        for i in range(COUNT):
            if i % 50:
                pieces[i] = None
        held = anonymous_bytes() - before
        assert held > 150e6, "freed, and kept by glibc"
        assert again.look(busy=True)
        assert anonymous_bytes() - before < held / 3
        assert sum(float(p.sum()) for p in pieces if p is not None) == PIECE * COUNT / 50

    in_a_thread(work)


def test_it_looks_seldom_and_only_growth_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def held() -> int:
        looks.append(1)
        return anonymous_bytes()

    monkeypatch.setattr("secondnature.serve.memory.anonymous_bytes", held)
    growth = Growth(look_s=3600)
    assert not growth.look(busy=True)
    assert len(looks) == 1, "when it was made"
    assert not growth.look(busy=False), "nothing has grown"
    assert len(looks) == 2
