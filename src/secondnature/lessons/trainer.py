"""The trainer's near side: starts the process, talks to it over ZMQ, notices its death (server).

A PAIR socket in a private directory of its own for each life of the process: a late message of a dead trainer can
never reach its successor's job. The trainer gets its thread budget by environment, so that OpenMP never takes the
engine's cores, and dies with the server (it also watches its parent).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import zmq

from secondnature import wire
from secondnature.errors import Cancelled, TrainerDied, from_wire
from secondnature.weights.arena import Arena

START_TIMEOUT_S = 180.0
CANCEL_TIMEOUT_S = 30.0
"""A trainer that does not stop within this time after a cancel is killed."""


class Trainer:
    """One trainer process at a time, restarted on demand. Use from one thread."""

    def __init__(
        self,
        arena: Arena,
        model_dir: Path,
        *,
        threads: int,
        log_path: Path,
        layout: wire.Layout = "transformers",
        share: float = 1.0,
    ) -> None:
        self._arena = arena
        self._model_dir = model_dir
        self._layout: wire.Layout = layout
        self._threads = threads
        self._share = share
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._directory: Path | None = None
        self._busy = False
        self._ready = False

    @property
    def state(self) -> Literal["ready", "starting", "busy", "down"]:
        """What `/health` says."""
        if self._process is None or self._process.poll() is not None:
            return "down"
        if not self._ready:
            return "starting"
        return "busy" if self._busy else "ready"

    @property
    def pid(self) -> int | None:
        """The process id, while it lives."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def launch(self) -> None:
        """Start the process if none lives; returns at once (`ensure` waits until it is ready)."""
        if self.pid is not None:
            return
        self.stop()
        self._directory = Path(tempfile.mkdtemp(prefix="secondnature-"))  # 0700
        endpoint = f"ipc://{self._directory / 'trainer.sock'}"
        socket = zmq.Context.instance().socket(zmq.PAIR)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(endpoint)
        self._socket = socket
        threads = str(self._threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._log_path.touch(mode=0o600)
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "secondnature.train.worker", endpoint, str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # a ctrl-C on the terminal is the server's business
            )
        attach = wire.Attach(
            self._arena.manifest(), str(self._model_dir), self._threads, self._layout, self._share
        )
        self._send(attach)

    def notice(self) -> None:
        """Take note, without waiting, that a new process is ready. Raises what it found wrong with the model."""
        if not self._ready and self.pid is not None and self._socket is not None and self._socket.poll(0):
            message = wire.decode_for_server(self._socket.recv())
            if isinstance(message, wire.Failed):
                self.stop()
                raise from_wire(message.error)
            self._ready = isinstance(message, wire.Ready)

    def ensure(self) -> None:
        """A trainer that is ready. Raises TrainerDied (it did not start) or what it found wrong with the model."""
        self.launch()
        if self._ready:
            return
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            message = self._receive(deadline)
            if isinstance(message, wire.Ready):
                self._ready = True
                return
            if isinstance(message, wire.Failed):
                self.stop()
                raise from_wire(message.error)

    def run(
        self, job: wire.Train, on_progress: Callable[[dict[str, object]], None], cancelled: Callable[[], bool]
    ) -> wire.Done:
        """One job, to its end. However it ends, the trainer no longer writes when this returns or raises.

        Raises:
            Cancelled: `cancelled` said so.
            TrainerDied: the process ended, or had to be killed.
            SecondnatureError: what the trainer reported.
        """
        self.ensure()
        self._busy = True
        ended = False
        try:
            self._send(job)
            asked_at: float | None = None
            while True:
                if asked_at is None and cancelled():
                    asked_at = time.monotonic()
                    self._send(wire.Cancel(job.job))
                if asked_at is not None and time.monotonic() - asked_at > CANCEL_TIMEOUT_S:
                    self.kill()
                    raise Cancelled("the job was cancelled; the trainer did not answer and was killed")
                message = self._receive(time.monotonic() + 0.1)
                if isinstance(message, wire.Progress) and message.job == job.job:
                    on_progress(message.metric)
                elif isinstance(message, wire.Done | wire.Failed) and message.job == job.job:
                    ended = True
                    if isinstance(message, wire.Done):
                        return message
                    raise from_wire(message.error)
        finally:
            self._busy = False
            if not ended:  # whatever went wrong here, e.g. the metrics' disk: it must not go on writing
                self.kill()

    def _send(self, message: wire.ToTrainer) -> None:
        assert self._socket is not None
        self._socket.send(wire.encode(message))

    def _receive(self, deadline: float) -> wire.ToServer | None:
        """The next message, or None at the deadline. Raises TrainerDied."""
        assert self._socket is not None
        assert self._process is not None
        while True:
            if self._socket.poll(100):
                return wire.decode_for_server(self._socket.recv())
            code = self._process.poll()
            if code is not None and not self._socket.poll(0):
                self._ready = False
                how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                raise TrainerDied(
                    f"the trainer process ended ({how})", f"it is restarted; see {self._log_path}"
                )
            if time.monotonic() > deadline:
                if not self._ready:
                    self.kill()
                    raise TrainerDied("the trainer was not ready in time", f"see {self._log_path}")
                return None

    def kill(self) -> None:
        """End the process now, wherever it is."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._ready = False

    def stop(self) -> None:
        """End the process and clean up after it."""
        if self._process is not None:
            if self._process.poll() is None and self._ready and not self._busy:
                self._send(wire.Shutdown())
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=5)
            self.kill()
            self._process = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
