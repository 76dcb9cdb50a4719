"""A trainer that does not come up, in whatever way: nobody waits for it without a limit, and it is told."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from tiny_server import running, teach

from secondnature.errors import Cancelled, TrainerDied, TrainingError
from secondnature.lessons import leftovers
from secondnature.lessons import trainer as trainer_module
from secondnature.lessons.trainer import Trainer
from secondnature.weights import checkpoint
from secondnature.weights.arena import Arena

ENDS = {"is killed": "exit 137", "ends": "exit 0", "talks": "echo garbage; echo more >&2; exit 3"}
HANGS = "exec sleep 600"


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replaces the trainer's program by a line of shell; an empty one puts it back."""
    real = sys.executable

    def replace(line: str) -> None:
        if not line:
            monkeypatch.setattr(sys, "executable", real)
            return
        fake = tmp_path / "python"
        fake.write_text(
            f'#!/bin/sh\ncase "$*" in *secondnature.train.worker*) {line};; esac\nexec {real} "$@"\n'
        )
        fake.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(fake))

    return replace


@pytest.fixture
def trainer(tmp_path: Path) -> Generator[Trainer]:
    arena = Arena.create({"w": torch.zeros(4, 4, dtype=torch.bfloat16)})
    found = Trainer(arena, tmp_path, threads=1, log_path=tmp_path / "trainer.log")
    yield found
    found.stop()


def nothing() -> None:
    """Nobody wants to give up."""


@pytest.mark.parametrize("line", ENDS.values(), ids=ENDS)
def test_one_that_ends_before_it_speaks_is_told_and_started_again_with_pauses(
    trainer: Trainer, broken: Callable[[str], None], line: str
) -> None:
    broken(line)
    assert trainer.state == "starting"  # who asks before the first start is not told that there is none
    began, starts = time.monotonic(), set[float]()
    while time.monotonic() - began < 6:
        before = time.monotonic()
        trainer.tend()
        assert time.monotonic() - before < 2  # it waits for nobody
        starts.add(trainer._started_at)
        time.sleep(0.02)
    assert "the trainer process ended (exit code" in trainer.trouble
    assert 2 <= len(starts) <= 4  # after 1 s, 2 s, 4 s
    with pytest.raises(TrainerDied, match="exit code"):
        trainer.ensure(nothing)


def test_one_that_never_speaks_is_waited_for_up_to_a_limit(
    trainer: Trainer, broken: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(HANGS)
    monkeypatch.setattr(trainer_module, "START_TIMEOUT_S", 0.5)
    began = time.monotonic()
    with pytest.raises(TrainerDied, match="not ready in time"):
        trainer.ensure(nothing)
    assert trainer.pid is None
    trainer.tend()
    assert "not ready in time" in trainer.trouble
    monkeypatch.setattr(trainer_module, "START_TIMEOUT_S", 600)

    def give_up() -> None:
        raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        trainer.ensure(give_up)
    assert trainer.state == "starting"
    trainer.stop()
    assert trainer.pid is None
    assert time.monotonic() - began < 15


def test_a_program_that_is_not_there_is_an_error_with_its_name(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    trainer.tend()
    assert "/no/such/python" in trainer.trouble
    with pytest.raises(TrainingError, match="/no/such/python"):
        trainer.ensure(nothing)


def test_one_that_ends_soon_after_it_was_ready_is_started_again_with_pauses(
    talker: Path, tmp_path: Path
) -> None:
    arena = Arena.create(checkpoint.read(talker))
    trainer = Trainer(arena, talker, threads=1, log_path=tmp_path / "trainer.log")
    try:
        for told in ("", "SIGKILL"):  # once may happen to anybody
            trainer.ensure(nothing)
            assert trainer.pid is not None
            os.kill(trainer.pid, signal.SIGKILL)
            while trainer.pid is not None:
                time.sleep(0.01)
            trainer.tend()
            assert trainer.state == "down"  # not at once
            assert told in trainer.trouble
            assert bool(told) == bool(trainer.trouble)
        trainer.ensure(nothing)
        assert trainer.trouble == ""
    finally:
        trainer.stop()


def test_its_log_is_bounded_however_often_it_is_started(
    trainer: Trainer, tmp_path: Path, broken: Callable[[str], None]
) -> None:
    broken("exit 1")
    with (tmp_path / "trainer.log").open("wb") as file:
        file.truncate(leftovers.MAX_LOG_BYTES + 1)
    with pytest.raises(TrainerDied):
        trainer.ensure(nothing)
    assert (tmp_path / "trainer.log").stat().st_size < 10_000
    assert (tmp_path / "trainer.log.1").exists()


def test_the_server_says_so_takes_requests_and_teaches_when_it_works_again(
    talker: Path, tmp_path: Path, broken: Callable[[str], None]
) -> None:
    broken(ENDS["is killed"])
    with running(tmp_path / "home", talker) as server:
        deadline = time.monotonic() + 30
        while "exit code 137" not in server.client.health().detail:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        health = server.client.health()
        assert (health.status, health.trainer) == ("degraded", "down")
        assert server.say("Say tea.") == "tea!"
        began = time.monotonic()
        job = server.client.train(teach(max_steps=1)).job
        assert time.monotonic() - began < 10
        failed = server.until(job, lambda s: s.phase == "done")
        assert failed.error is not None
        assert (failed.state, failed.error.type) == ("failed", "TrainerDied")
        broken("")
        kept = server.lesson(teach(max_steps=1, keep=True))
        assert (kept.state, server.weights) == ("kept", kept.version)
        assert server.client.health().status == "ok"
        broken(HANGS)  # and a stop while one hangs ends within a limit
        pid = server.parts.runner.trainer.pid
        assert pid is not None
        server.parts.runner.trainer.kill()
        server.client.train(teach(max_steps=1))
        while server.parts.runner.trainer.state != "starting":
            time.sleep(0.05)
        began = time.monotonic()
        server.parts.runner.stop()
        assert time.monotonic() - began < 20
        assert not server.parts.runner._thread.is_alive()
        assert server.weights == kept.version
