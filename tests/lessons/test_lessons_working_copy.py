"""The working copy is folded by the length of its chain and by age, whatever waits; states out of reach go."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from served_home import serve
from tiny_server import Running, running, teach

from secondnature.errors import StorageError
from secondnature.lessons.log import OPTIMIZER_FILE, Log


def until(done: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_it_is_folded_at_a_start_and_between_lessons_that_wait(talker: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    before = serve(home, talker)
    try:
        for i in range(4):
            before.kept(0.1 * (i + 1))
        kept = before.clock.version
        assert len(before.log.chain()) == 4
    finally:
        before.home.close()
    with running(home, talker, max_chain=2, keep_states=1, checkpoint_after_s=86_400) as server:
        until(lambda: server.client.request("GET", "/v1/checkpoint")["current"], "a working copy")
        assert server.parts.runner.log.chain() == []
        assert server.weights == server.parts.clock.version == kept

        request = teach(max_steps=1, keep=True)
        jobs = [server.client.train(request.model_copy(update={"seed": i})).job for i in range(5)]
        longest = 0
        while any(server.client.status(job).phase != "done" for job in jobs):
            longest = max(longest, len(server.parts.runner.log.chain()))
            time.sleep(0.02)
        assert [server.client.status(job).state for job in jobs] == ["kept"] * 5
        until(lambda: len(server.parts.runner.log.chain()) <= 2, "a short chain")
        assert 2 <= longest <= 3
        left(server, 2)


def left(server: Running, count: int) -> None:
    """Only the states that an undo within reach needs are there: that of now and that of before the newest."""
    lessons = server.parts.home.lessons
    assert len(list(lessons.glob(f"*/{OPTIMIZER_FILE}"))) == count
    newest = server.client.lessons().lessons[-1]
    assert server.client.revert(newest.id).optimizer_after == newest.optimizer_before
    assert server.parts.runner.log.optimizer_file() is not None


def test_it_is_folded_some_time_after_a_start_that_found_it_old(talker: Path, tmp_path: Path) -> None:
    """A command that starts a server of its own ends it too soon: the next one does it."""
    home = tmp_path / "home"
    before = serve(home, talker)
    before.kept()
    before.home.close()
    with running(home, talker, checkpoint_after_s=0.5) as server:
        until(lambda: server.client.request("GET", "/v1/checkpoint")["current"], "a working copy")


def test_one_that_cannot_be_written_is_told_until_it_is(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    before = serve(home, talker)
    before.kept()
    before.home.close()
    refuses = True
    save = Log.save_checkpoint

    def saved(log: Log, *given: Any) -> None:
        if refuses:
            raise StorageError(f"{home}: no space left", "make room")
        save(log, *given)

    monkeypatch.setattr(Log, "save_checkpoint", saved)
    with running(home, talker, checkpoint_after_s=0.2) as server:
        until(lambda: server.client.health().status == "degraded", "it is told")
        assert "the working copy: " in server.client.health().detail
        assert "no space left" in server.client.health().detail
        refuses = False
        until(lambda: server.client.health().status == "ok", "it is written")
        assert server.parts.runner.log.chain() == []
