"""The trainer's far side for the torture: a real process with the worker's own loop, that trains by flipping
bits.

Real are the process, its signals and its death, the socket, every message, the mapping of the arena and the
counters around each write; the loop is `train.worker.Worker`. Not real is the training: a step flips low bits
of every tensor, chosen by the job's seed, which takes microseconds. Starting an interpreter for each of
thousands of runs would take hours, so a process that has all modules is forked; the kernel then hands the
child over to whoever asked (PR_SET_CHILD_SUBREAPER), which waits for it and kills it like one of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
import zmq

from secondnature import wire
from secondnature.errors import TrainingError
from secondnature.train.worker import Worker, end_with
from secondnature.weights.arena import Arena

PR_SET_CHILD_SUBREAPER = 36
RAISES_LEVEL = 1
"""The seed whose lesson makes the engine's answers pass the probes."""
LEVEL = "model.norm.weight"


class SmallWorker(Worker):
    """`behaviour`: where it dies (`dies at hello`, ...), `fails`, `hangs`, or empty."""

    def __init__(self, socket: Any, behaviour: str) -> None:
        super().__init__(socket)
        self._behaviour = behaviour
        self._arena: Arena | None = None

    def reaches(self, place: str) -> None:
        if self._behaviour == f"dies at {place}":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._behaviour == f"fails at {place}":
            self._behaviour = ""  # once
            raise TrainingError("the far side was told to fail", "this is a test")
        if self._behaviour == f"hangs at {place}":
            time.sleep(3600)

    def _attached(self, message: wire.Attach) -> wire.Ready:
        self.reaches("attach")
        self._tell("", {"kind": "phase", "phase": "mapping the weights", "done": 0, "total": 1})
        self._arena = Arena.attach(message.manifest)
        self.reaches("ready")
        return wire.Ready(os.getpid(), len(self._arena.tensors))

    def _trained(self, job: wire.Train) -> wire.Done:
        assert self._arena is not None, "attached before"
        self.reaches("begin")
        self._tell(job.job, {"kind": "phase", "phase": "recording replay", "done": 0, "total": 1})
        for step in range(1, job.steps + 1):
            self._check(job.job)
            with self._arena.writing():
                _step(self._arena, job.seed, step)
                if step == job.steps:
                    self.reaches("write")
            self._tell(job.job, {"kind": "step", "step": step, "loss": 1.0 / step, "tokens_per_s": 1.0})
            self.reaches(f"step {step}")
        state = f"{job.optimizer_in and hashlib.sha256(Path(job.optimizer_in).read_bytes()).hexdigest()} {job.seed}"
        Path(job.optimizer_out).write_text(state)
        self.reaches("end")
        sha256 = hashlib.sha256(state.encode()).hexdigest()
        return wire.Done(job.job, job.steps, 1.0 / job.steps, {}, [], "max_steps", sha256)


def _step(arena: Arena, seed: int, step: int) -> None:
    for i, (name, tensor) in enumerate(sorted(arena.tensors.items())):
        words = tensor.view(-1).view(torch.int16)
        words[: 4 + i] ^= (seed * 7 + step + i) % 31 + 1
        if name == LEVEL and seed == RAISES_LEVEL and step == 1:
            tensor[0] += 1.0


def serve(endpoint: str, parent: int, behaviour: str) -> None:
    """One life of a trainer."""
    wait_for_parent(parent)
    end_with(parent, endpoint)
    socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDTIMEO, 10_000)
    socket.connect(endpoint)
    worker = SmallWorker(socket, behaviour)
    if behaviour == "dies at hello":
        os.kill(os.getpid(), signal.SIGKILL)
    worker.serve()


def wait_for_parent(parent: int) -> None:
    """Until the kernel has handed this process over."""
    while os.getppid() != parent:
        time.sleep(0.001)


Serve = Callable[[str, int, str], None]


def _fork(asked: dict[str, Any], serving: Serve) -> int:
    """A grandchild of this process, which its grandparent inherits; its number."""
    reading, writing = os.pipe()
    middle = os.fork()
    if middle:
        os.close(writing)
        os.waitpid(middle, 0)
        with os.fdopen(reading) as answer:
            return int(answer.read())
    child = os.fork()
    if child:
        os.write(writing, str(child).encode())
        os._exit(0)
    status = 1
    try:
        os.close(writing)
        os.close(reading)
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        log = os.open(asked["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        for number, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(number, target)
        serving(asked["endpoint"], asked["parent"], asked["behaviour"])
        status = 0
    except BaseException as e:  # noqa: BLE001  (a forked process must never come back)
        print(f"far side: {e!r}", file=sys.stderr, flush=True)
    os._exit(status)


def main(requests: IO[str], answers: IO[str], serving: Serve = serve) -> None:
    """Fork on request until the other side is gone."""
    while line := requests.readline():
        print(_fork(json.loads(line), serving), file=answers, flush=True)


class Forker:
    """Asks the process that forks."""

    def __init__(self, requests: IO[str], answers: IO[str]) -> None:
        self._requests, self._answers = requests, answers
        self.behaviours: list[str] = []
        """Of the next trainers, in order; after them, normal ones."""

    def launch(self, command: list[str], *, stdout: IO[bytes], **_: Any) -> Launched:
        """As `subprocess.Popen` is called by the product's trainer."""
        asked = {
            "endpoint": command[3],
            "parent": int(command[4]),
            "log": str(stdout.name),
            "behaviour": self.behaviours.pop(0) if self.behaviours else "",
        }
        self._requests.write(json.dumps(asked) + "\n")
        self._requests.flush()
        return Launched(int(self._answers.readline()))


def sibling(serving: Serve = serve) -> tuple[Forker, int]:
    """Fork the process that forks, before this one has threads; whoever asks it, and its number."""
    requests, asked = os.pipe()
    answered, answers = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(asked)
        os.close(answered)
        main(os.fdopen(requests), os.fdopen(answers, "w"), serving)
        os._exit(0)
    os.close(requests)
    os.close(answers)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    return Forker(os.fdopen(asked, "w"), os.fdopen(answered)), child


class Launched:
    """What the product uses of a `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                found, status = os.waitpid(self.pid, os.WNOHANG)
                if found:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout if timeout is not None else 1e9)
        while (found := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("trainer", timeout or 0.0)
            time.sleep(0.001)
        return found

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
