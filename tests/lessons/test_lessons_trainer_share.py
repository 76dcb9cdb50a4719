"""The trainer gives way to requests that are being answered, and leaves nothing when its server is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import hybrid_config, in_arena, save_tiny

from secondnature import wire
from secondnature.errors import Cancelled
from secondnature.lessons.trainer import Trainer
from secondnature.train import run
from secondnature.weights.content import content_id


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(hybrid_config(), tmp_path_factory.mktemp("share"))


def job(tmp_path: Path, steps: int = 3) -> wire.Train:
    return wire.Train(
        job="j1",
        lesson="l1",
        objective="sft",
        steps=steps,
        batch_size=1,
        seed=5,
        examples=[wire.TokenExample(list(range(2, 22)), [30, 31, 32])],
        replay=[],
        replay_share=0.0,
        replay_weight=1.0,
        learned_loss=0.0,
        optimizer={"lr": 1e-3, "rank": 4},
        optimizer_in=None,
        optimizer_out=str(tmp_path / "optimizer.safetensors"),
        development=[],
        until_margin=None,
        until_passed=None,
        look_every=1,
        kl={},
    )


@pytest.mark.parametrize(
    ("share", "load", "paused_s"), [(0.25, 1, 6.0), (0.5, 3, 2.0), (1.0, 3, 0.0), (0.25, 0, 0.0)]
)
def test_after_a_step_it_pauses_for_the_rest_of_the_time(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, load: int, paused_s: float
) -> None:
    now = 100.0

    def sleep(seconds: float) -> None:
        nonlocal now
        assert 0 < seconds <= run.PAUSE_S
        now += seconds

    arena, model = in_arena(directory)
    lesson = run.TrainingRun(model, arena, job(tmp_path), share)
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    arena.load = load
    lesson._give_way(2.0, lambda: None)
    assert now == pytest.approx(100.0 + paused_s)


def test_a_pause_ends_with_the_requests_and_with_a_cancel(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena, model = in_arena(directory)
    lesson = run.TrainingRun(model, arena, job(tmp_path), 0.01)
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            arena.load = 0

    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=sleep))
    arena.load = 1
    lesson._give_way(60.0, lambda: None)
    assert len(naps) == 3

    def cancelled() -> None:
        raise Cancelled("cancelled")

    arena.load = 1
    with pytest.raises(Cancelled):
        lesson._give_way(60.0, cancelled)


def test_giving_way_changes_no_bit(directory: Path, tmp_path: Path) -> None:
    found: list[str] = []
    torch.set_num_threads(1)
    for share, load in ((1.0, 0), (0.5, 2)):
        arena, _ = in_arena(directory)
        arena.load = load
        trainer = Trainer(arena, directory, threads=1, log_path=tmp_path / "trainer.log", share=share)
        try:
            trainer.ensure(lambda: None)
            assert trainer.run(job(tmp_path), lambda _: None, lambda: False).steps == 3
        finally:
            trainer.stop()
        found.append(content_id(arena.tensors))
    assert found[0] == found[1]


def test_a_trainer_whose_server_is_killed_removes_its_socket(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir()
    script = (
        "import os, subprocess, sys, time\n"
        f"endpoint = 'ipc://{private}/trainer.sock'\n"
        "import zmq\n"
        "socket = zmq.Context.instance().socket(zmq.PAIR); socket.bind(endpoint)\n"
        "command = [sys.executable, '-m', 'secondnature.train.worker', endpoint, str(os.getpid())]\n"
        "print(subprocess.Popen(command, start_new_session=True).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert int(server.stdout.readline()) > 0
        assert (private / "trainer.sock").exists()
        server.kill()
    deadline = time.monotonic() + 120
    while private.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
