"""The trainer's process: speaks first, survives whatever a job does, and does not outlive its parent."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
import zmq
from safetensors import SafetensorError
from tiny_models import hybrid_config, in_arena, save_tiny

from secondnature import wire
from secondnature.errors import BadInput
from secondnature.train.run import TrainingRun
from secondnature.train.worker import Worker

WAIT_MS = 120_000


def job(tmp_path: Path, name: str = "j1", **fields: object) -> wire.Train:
    given: dict[str, object] = {
        "lesson": "l1",
        "objective": "sft",
        "steps": 2,
        "batch_size": 1,
        "seed": 5,
        "examples": [wire.TokenExample(list(range(2, 12)), [30, 31, 32])],
        "replay": [],
        "replay_share": 0.0,
        "replay_weight": 1.0,
        "learned_loss": 0.0,
        "optimizer": {"lr": 1e-3, "rank": 4},
        "optimizer_in": None,
        "optimizer_out": str(tmp_path / "optimizer.safetensors"),
        "development": [],
        "until_margin": None,
        "until_passed": None,
        "look_every": 1,
        "kl": {},
    }
    return wire.Train(job=name, **{**given, **fields})  # pyright: ignore[reportArgumentType]


def heard(socket: zmq.Socket[bytes]) -> wire.ToServer:
    """The next message but progress."""
    while True:
        assert socket.poll(WAIT_MS), "the trainer says nothing"
        message = wire.decode_for_server(socket.recv())
        if not isinstance(message, wire.Progress):
            return message


@pytest.fixture
def near() -> Generator[zmq.Socket[bytes]]:
    """The server's end of a worker that runs in a thread of this process; it has ended when the test is over."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    ours, theirs = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    ours.bind("inproc://trainer")
    theirs.connect("inproc://trainer")
    thread = threading.Thread(target=Worker(theirs).serve)
    thread.start()
    yield ours
    ours.send(wire.encode(wire.Shutdown()))
    thread.join(60)
    assert not thread.is_alive()
    ours.close()
    theirs.close()
    context.term()


ERRORS = [
    AssertionError("an invariant"),
    AttributeError("no such thing"),
    OSError(5, "Input/output error", "optimizer\udcff.safetensors"),
    SafetensorError("incomplete"),
    MemoryError(),
    RuntimeError("shapes"),
    StopIteration(),
    RecursionError("too deep"),
    zmq.ZMQError(),
    BadInput("what was sent", "send something else"),
]


def test_the_process_lives_on_whatever_a_job_does(
    near: zmq.Socket[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    directory = save_tiny(hybrid_config(), tmp_path / "model")
    arena, _ = in_arena(directory)
    assert heard(near) == wire.Hello(os.getpid())
    near.send(wire.encode(job(tmp_path)))
    failed = heard(near)
    assert isinstance(failed, wire.Failed)
    assert failed.error["message"] == "no weights are mapped"
    near.send(b"no message of ours")
    failed = heard(near)
    assert isinstance(failed, wire.Failed)
    assert (failed.job, failed.error["type"]) == ("", "BadInput")
    for manifest, kind in (("{}", "WeightsError"), (arena.manifest(), "BadCheckpoint")):
        near.send(wire.encode(wire.Attach(manifest, str(tmp_path / "nowhere"), 1)))
        failed = heard(near)
        assert isinstance(failed, wire.Failed)
        assert (failed.job, failed.error["type"]) == ("", kind)
    near.send(wire.encode(wire.Attach(arena.manifest(), str(directory), 1)))
    assert heard(near) == wire.Ready(os.getpid(), len(arena.tensors))
    run = TrainingRun.run
    for i, error in enumerate(ERRORS):

        def fails(*_: object, error: Exception = error) -> wire.Done:
            raise error

        monkeypatch.setattr(TrainingRun, "run", fails)
        near.send(wire.encode(job(tmp_path, f"bad{i}")))
        failed = heard(near)
        assert isinstance(failed, wire.Failed)
        assert failed.job == f"bad{i}"
        if isinstance(error, BadInput):
            assert failed.error == error.to_wire()
        else:
            assert failed.error["type"] == "TrainingError"
            assert failed.error["message"].startswith(type(error).__name__)
        monkeypatch.setattr(TrainingRun, "run", run)
        near.send(wire.encode(job(tmp_path, f"good{i}")))
        done = heard(near)
        assert isinstance(done, wire.Done)
        assert (done.job, done.steps) == (f"good{i}", 2)


@pytest.mark.parametrize("stop", [wire.Cancel("j1"), wire.Shutdown()])
def test_a_cancel_is_heard_while_the_weights_before_are_recorded(
    near: zmq.Socket[bytes], tmp_path: Path, stop: wire.Cancel | wire.Shutdown
) -> None:
    """A thousand answers are to be recorded before the first step; the cancel comes with the job."""
    torch.set_num_threads(1)
    directory = save_tiny(hybrid_config(), tmp_path / "model")
    arena, _ = in_arena(directory)
    assert isinstance(heard(near), wire.Hello)
    near.send(wire.encode(wire.Attach(arena.manifest(), str(directory), 1)))
    assert isinstance(heard(near), wire.Ready)
    many = [wire.TokenExample([2, 3 + i % 90, 4], [5, 6, 7]) for i in range(1000)]
    near.send(wire.encode(job(tmp_path, kl={"new": many})))
    near.send(wire.encode(stop))
    told: list[dict[str, object]] = []
    while True:
        assert near.poll(WAIT_MS)
        message = wire.decode_for_server(near.recv())
        if not isinstance(message, wire.Progress):
            break
        told.append(message.metric)
    assert isinstance(message, wire.Failed)
    assert message.error["type"] == "Cancelled"
    assert all(m["phase"] == "recording answers for the KL" and int(str(m["done"])) < 1000 for m in told)
    assert arena.writes[0] == 0


@pytest.mark.parametrize("stop", [wire.Cancel("j1"), wire.Shutdown()])
def test_while_answers_are_generated_it_waits_and_writes_nothing(
    near: zmq.Socket[bytes], tmp_path: Path, stop: wire.Cancel | wire.Shutdown
) -> None:
    """For the answer to its own question: that of another step, or job, is none. A cancel is heard meanwhile."""
    torch.set_num_threads(1)
    directory = save_tiny(hybrid_config(), tmp_path / "model")
    arena, _ = in_arena(directory)
    assert isinstance(heard(near), wire.Hello)
    near.send(wire.encode(wire.Attach(arena.manifest(), str(directory), 1)))
    assert isinstance(heard(near), wire.Ready)
    looks = [wire.DevelopmentProbe([2, 3], [], [], side, spoken=True) for side in ("right", "other")]
    near.send(wire.encode(job(tmp_path, development=looks, until_passed=1.0)))
    assert heard(near) == wire.Asking("j1", 0)
    near.send(wire.encode(wire.Judged("j1", 0, [False, True])))
    assert heard(near) == wire.Asking("j1", 1)
    near.send(wire.encode(wire.Judged("j1", 0, [True, True])))
    near.send(wire.encode(wire.Judged("j0", 1, [True, True])))
    near.send(wire.encode(wire.Cancel("j0")))
    assert not near.poll(1500), "the trainer went on"
    assert arena.writes == (1, 1)
    near.send(wire.encode(stop))
    failed = heard(near)
    assert isinstance(failed, wire.Failed)
    assert (failed.job, failed.error["type"], arena.writes) == ("j1", "Cancelled", (1, 1))
    if isinstance(stop, wire.Cancel):
        near.send(wire.encode(job(tmp_path, "j2", development=looks, until_passed=1.0)))
        assert heard(near) == wire.Asking("j2", 0)
        near.send(wire.encode(wire.Judged("j2", 0, [False, True])))
        assert heard(near) == wire.Asking("j2", 1)
        near.send(wire.encode(wire.Judged("j2", 1, [True, True])))
        done = heard(near)
        assert isinstance(done, wire.Done)
        assert (done.steps, done.stopped_by) == (1, "until_passed")


def test_a_server_that_takes_no_messages_ends_it() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.SNDTIMEO, 50)
    socket.bind("inproc://nobody")
    with pytest.raises(SystemExit):
        Worker(socket).serve()
    socket.close()
    context.term()


def started(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )


def gone(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def until(condition: Callable[[], bool], within_s: float = 120) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_says_hello_before_it_imports_anything_heavy(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    endpoint = f"ipc://{tmp_path}/trainer.sock"
    socket.bind(endpoint)
    command = [sys.executable, "-m", "secondnature.train.worker", endpoint, str(os.getpid())]
    with subprocess.Popen(command) as process:
        assert heard(socket) == wire.Hello(process.pid)
        mapped = Path(f"/proc/{process.pid}/maps").read_text()
        assert "libzmq" in mapped
        assert "libtorch" not in mapped
        socket.send(wire.encode(wire.Shutdown()))
        assert process.wait(60) == 0
    socket.close()
    context.term()


PARENT = """
import os, subprocess, sys, time
from pathlib import Path
import zmq
from tiny_models import in_arena
from secondnature import wire
directory, private = Path(sys.argv[1]), Path(sys.argv[2])
arena, _ = in_arena(directory)
(directory / "config.json").unlink()
os.mkfifo(directory / "config.json")  # whoever reads it waits for ever
socket = zmq.Context.instance().socket(zmq.PAIR)
socket.bind(f"ipc://{private}/trainer.sock")
command = [sys.executable, "-m", "secondnature.train.worker", f"ipc://{private}/trainer.sock", str(os.getpid())]
child = subprocess.Popen(command, start_new_session=True)
wire.decode_for_server(socket.recv())
socket.send(wire.encode(wire.Attach(arena.manifest(), str(directory), 1)))
print(child.pid, flush=True)
time.sleep(600)
"""


def test_it_ends_with_its_parent_also_while_it_loads(tmp_path: Path) -> None:
    directory = save_tiny(hybrid_config(), tmp_path / "model")
    private = tmp_path / "private"
    private.mkdir()
    with started(PARENT, str(directory), str(private)) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        until(lambda: "secondnature-weights" in Path(f"/proc/{pid}/maps").read_text())  # it is loading
        parent.kill()
    assert gone(pid, within_s=20)
    until(lambda: not private.exists())
