"""The trainer's near side: starts the process, talks to it over ZMQ, notices its death (server).

The child speaks first, and nothing is sent to a process that has not spoken: a trainer that dies before it has said
a word is noticed like any other. No call here waits for it without a limit. A PAIR socket in a private directory of
its own for each life of the process: a late message of a dead trainer can never reach its successor's job. The
trainer gets its thread budget by environment, so that OpenMP never takes the engine's cores, and dies with the
server (it also watches its parent).
"""

from __future__ import annotations

import contextlib
import logging
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
from secondnature.errors import Cancelled, SecondnatureError, TrainerDied, TrainingError, from_wire
from secondnature.lessons.leftovers import rotate
from secondnature.weights.arena import Arena

LOG = logging.getLogger(__name__)
START_TIMEOUT_S = 180.0
CANCEL_TIMEOUT_S = 30.0
"""A trainer that does not stop within this time after a cancel is killed."""
SEND_TIMEOUT_MS = 5_000
"""A message that is not taken within this time is not waited for: the process hangs."""
END_TIMEOUT_S = 5.0
"""A killed process that is not gone by then (it hangs in the kernel) is left to it."""
MAX_PAUSE_S = 60.0
"""Between two starts of a trainer that does not come up; doubled from one to the next."""
STEADY_S = 10.0
"""A trainer that ends sooner after it was ready counts as one that did not come up."""
Ask = Callable[[int, Callable[[], None]], list[bool]]
"""Given a step, and what to call meanwhile: that raises TrainerDied where nobody waits for the answer any more."""
_MAX_SOCKET_PATH = 100
"""Bytes; the kernel takes 107."""


class Trainer:
    """One trainer process at a time, restarted on demand. Use from one thread; `state` and `pid` from any."""

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
        self._attached = self._ready = self._was_ready = self._busy = False
        self._started_at = self._ready_at = 0.0
        self._failures = 0
        self._next_start = 0.0
        self._unended: list[subprocess.Popen[bytes]] = []
        self.trouble = ""
        """Why there is no trainer; empty: one is there, or on its way."""

    @property
    def state(self) -> Literal["ready", "starting", "busy", "down"]:
        """What `/health` says."""
        if self.pid is None:
            return "down" if self._started_at else "starting"  # before the first `tend`, it is on its way
        if not self._ready:
            return "starting"
        return "busy" if self._busy else "ready"

    @property
    def pid(self) -> int | None:
        """The process id, while it lives."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def may_write(self) -> bool:
        """Whether a process that was killed is still there: then nobody can say that it does not write."""
        self._unended = [p for p in self._unended if p.poll() is None]
        return bool(self._unended)

    def tend(self) -> None:
        """See to it, without waiting, that a trainer is there or on its way; call it often.

        One that ended, or could not be started, is started again after a pause that grows. Never raises anything
        of ours: what was wrong is told by `trouble`, and by `ensure` to whoever needs a trainer.
        """
        try:
            if self.pid is None:
                if self._process is not None:
                    self._failed(self._death())
                if time.monotonic() >= self._next_start:
                    self._launch()
            elif not self._ready:
                self._advance()
                if not self._ready and time.monotonic() - self._started_at > START_TIMEOUT_S:
                    raise TrainerDied("the trainer was not ready in time", f"see {self._log_path}")
        except (SecondnatureError, OSError, zmq.ZMQError) as e:
            self._failed(e)
        except BaseException as e:
            self._failed(e)  # whatever it was, a life that was not begun whole is not waited for
            raise

    def _failed(self, error: BaseException) -> None:
        """Take note of an end. One that did not come up, or not for long, is not started again at once.

        The first is a trouble; the second becomes one when it happens again.
        """
        if self._was_ready and time.monotonic() - self._ready_at >= STEADY_S:
            self._failures = 0
        else:
            self._failures += 1
            self._next_start = time.monotonic() + min(MAX_PAUSE_S, 0.5 * 2 ** min(self._failures, 10))
            if not self._was_ready or self._failures > 1:
                self.trouble = str(error)
        LOG.warning("no trainer: %s", error)
        self._end()

    def _launch(self) -> None:
        """Start the process; returns at once. Raises OSError, ZMQError: it cannot be started."""
        self._end()
        self._started_at = time.monotonic()
        self._directory = _private_directory()
        endpoint = f"ipc://{self._directory / 'trainer.sock'}"
        socket = zmq.Context.instance().socket(zmq.PAIR)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDTIMEO, SEND_TIMEOUT_MS)
        self._socket = socket
        socket.bind(endpoint)
        threads = str(self._threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        rotate(self._log_path)
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

    def _advance(self) -> None:
        """Answer what a starting trainer has said, without waiting. Raises what it found wrong with the model."""
        assert self._socket is not None, "a process has a socket"
        while not self._ready and self._socket.poll(0):
            message = wire.decode_for_server(self._socket.recv())
            if isinstance(message, wire.Failed):
                raise from_wire(message.error)
            if isinstance(message, wire.Hello) and not self._attached:
                self._attached = True
                self._send(
                    wire.Attach(
                        self._arena.manifest(), str(self._model_dir), self._threads, self._layout, self._share
                    )
                )
            elif isinstance(message, wire.Ready):
                self._ready, self._was_ready, self._ready_at, self.trouble = True, True, time.monotonic(), ""

    def ensure(self, waiting: Callable[[], None]) -> None:
        """A trainer that is ready, after at most `START_TIMEOUT_S`.

        Args:
            waiting: called again and again meanwhile; may raise to give up.

        Raises:
            TrainerDied, TrainingError: it could not be started, or ended.
            SecondnatureError: what it found wrong with the model.
        """
        if self.pid is None:
            try:
                self._launch()
            except (OSError, zmq.ZMQError) as e:
                self._failed(e)
                raise TrainingError(f"the trainer cannot be started: {e}", "see the server's log") from None
            except BaseException as e:
                self._failed(e)
                raise
        while not self._ready:
            waiting()
            if self.pid is None:
                death = self._death()
                self._failed(death)
                raise death
            if time.monotonic() - self._started_at > START_TIMEOUT_S:
                late = TrainerDied("the trainer was not ready in time", f"see {self._log_path}")
                self._failed(late)
                raise late
            assert self._socket is not None, "a process has a socket"
            try:
                self._socket.poll(50)
                self._advance()
            except BaseException as e:
                self._failed(e)
                raise

    def run(
        self,
        job: wire.Train,
        on_progress: Callable[[dict[str, object]], None],
        cancelled: Callable[[], bool],
        ask: Ask | None = None,
    ) -> wire.Done:
        """One job of a trainer that is ready, to its end. However it ends, the trainer no longer writes then.

        Args:
            ask: asks the spoken development probes after a step, while the trainer waits; which of them passed.

        Raises:
            Cancelled: `cancelled` said so.
            TrainerDied: the process ended, or had to be killed.
            SecondnatureError: what the trainer reported.
        """
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
                    raise Cancelled("the job was cancelled; the trainer did not answer and was killed")
                message = self._receive(0.1)
                if isinstance(message, wire.Progress) and message.job == job.job:
                    on_progress(message.metric)
                elif isinstance(message, wire.Asking) and message.job == job.job and asked_at is None:
                    assert ask is not None, "whoever sends probes to be asked can ask them"
                    with contextlib.suppress(Cancelled):  # the next turn of this loop tells it
                        self._send(wire.Judged(job.job, message.step, ask(message.step, self._check_alive)))
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
        """Raises TrainerDied: it does not take messages."""
        assert self._socket is not None, "a process has a socket"
        try:
            self._socket.send(wire.encode(message))
        except zmq.ZMQError as e:
            raise TrainerDied(f"the trainer takes no message: {e}", f"see {self._log_path}") from None

    def _receive(self, wait_s: float) -> wire.ToServer | None:
        """The next message, or None after a while. Raises TrainerDied."""
        assert self._socket is not None, "a process has a socket"
        if self._socket.poll(round(1000 * wait_s)):
            return wire.decode_for_server(self._socket.recv())
        if self.pid is None and not self._socket.poll(0):
            raise self._death()
        return None

    def _check_alive(self) -> None:
        """Raises TrainerDied."""
        if self.pid is None:
            raise self._death()

    def _death(self) -> TrainerDied:
        """How the process ended."""
        assert self._process is not None, "there was one"
        code = self._process.poll()
        how = "exit code ?" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            how = (
                f"signal {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"signal {-code}"
            )
        self._ready = False
        return TrainerDied(f"the trainer process ended ({how})", f"it is restarted; see {self._log_path}")

    def kill(self) -> None:
        """End the process now, wherever it is."""
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._unended.append(process)
        self._ready = False

    def stop(self) -> None:
        """End the process and clean up after it, within seconds."""
        process = self._process
        if process is not None and process.poll() is None and self._ready and not self._busy:
            with contextlib.suppress(SecondnatureError, subprocess.TimeoutExpired):
                self._send(wire.Shutdown())
                process.wait(timeout=END_TIMEOUT_S)
        self._end()

    def _end(self) -> None:
        """No process, no socket, no directory."""
        self.kill()
        self._process = None
        self._attached = self._ready = self._was_ready = False
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


def _private_directory() -> Path:
    """A new directory (0700) whose path leaves room for a socket's name; says whose it is.

    Raises:
        OSError: none could be made.
    """
    found = Path(tempfile.mkdtemp(prefix="secondnature-"))
    if len(os.fsencode(found)) > _MAX_SOCKET_PATH - len("/trainer.sock"):  # a long TMPDIR
        found.rmdir()
        found = Path(tempfile.mkdtemp(prefix="secondnature-", dir="/tmp"))
    (found / "pid").write_text(f"{os.getpid()}\n")
    return found
