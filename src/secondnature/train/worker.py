"""The trainer's process: takes one message at a time over ZMQ, and lives on whatever becomes of a job (trainer).

    python -m secondnature.train.worker ipc://PRIVATE/trainer.sock PARENT_PID

It speaks first: `Hello` goes out before anything heavy is imported, so that the server need not send into nothing.
It has no truth of its own: weights live in the arena, optimizer states in files of the home. A job that fails or is
cancelled just ends; making the weights whole again is the engine's side's business, since this process may be dead
by then. It ends when its parent does, in whatever it is doing, and when the parent takes no messages any more.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from secondnature import wire
from secondnature.errors import Cancelled, SecondnatureError, TrainingError

if TYPE_CHECKING:
    from secondnature.train.run import TrainingRun

LOG = logging.getLogger("secondnature.trainer")
NICE = 5
"""The trainer gives way to the engine where they share a core."""
POLL_MS = 500
PARENT_POLL_S = 0.2
SEND_TIMEOUT_S = 60.0
"""A server that takes no message for so long is stuck: nobody is left to work for."""


class Worker:
    """The loop around the socket."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._training: Callable[[wire.Train], TrainingRun] | None = None
        self._ended = False

    def serve(self) -> None:
        """Say hello, then take messages until told to end."""
        self._send(wire.Hello(os.getpid()))
        while not self._ended:
            self._answered("", self._take_next)

    def _take_next(self) -> wire.ToServer | None:
        message = self._next(POLL_MS)
        if isinstance(message, wire.Attach):
            return self._attached(message)
        if isinstance(message, wire.Train):
            self._answered(message.job, lambda: self._trained(message))
            self._ended = self._ended or _device_is_lost()  # a new process can do what this one no longer can
            _give_back()
        elif isinstance(message, wire.Shutdown):
            self._ended = True
        return None

    def _next(self, wait_ms: int) -> wire.ToTrainer | None:
        """The next message, if one comes in time. Raises BadInput: it is none of ours."""
        return wire.decode_for_trainer(self._socket.recv()) if self._socket.poll(wait_ms) else None

    def _send(self, message: wire.ToServer) -> None:
        """Raises SystemExit: the server takes no messages."""
        try:
            self._socket.send(wire.encode(message))
        except zmq.Again:
            LOG.error("the server has taken no message for %s s: the trainer ends", SEND_TIMEOUT_S)
            raise SystemExit(1) from None

    def _answered(self, job: str, act: Callable[[], wire.ToServer | None]) -> None:
        """Act and send what comes of it; every error is an answer, and ends nothing but this."""
        try:
            answer = act()
        except SecondnatureError as e:
            answer = wire.Failed(job, e.to_wire())
        except Exception as e:
            LOG.exception("job %s", job or "(none)")
            said = f"{type(e).__name__}: {e}"[:2000].encode(errors="replace").decode()
            answer = wire.Failed(job, TrainingError(said, "please report it, with trainer.log").to_wire())
        if answer is not None:
            self._send(answer)

    def _attached(self, message: wire.Attach) -> wire.Ready:
        """Map the weights, put the model around them, see that it can be trained."""
        self._tell("", {"kind": "phase", "phase": "mapping the weights", "done": 0, "total": 1})
        import torch  # from here on the process is heavy
        import transformers

        from secondnature.train.delta_rule import choose
        from secondnature.train.device import prepare
        from secondnature.train.prefix import self_test
        from secondnature.train.run import TrainingRun, model_in
        from secondnature.weights.attach import attach

        transformers.logging.set_verbosity_error()  # it warns of kernels that no CPU has
        torch.set_num_threads(message.threads)
        prepare()
        arena = attach(message.manifest)
        model = model_in(arena, Path(message.model_dir), message.layout)
        self._tell("", {"kind": "phase", "phase": "checking the model", "done": 0, "total": 1})
        if next(model.parameters()).is_cuda:
            choose(model)
        self_test(model)
        self._training = partial(TrainingRun, model, arena, share=message.share)
        return wire.Ready(os.getpid(), len(arena.tensors))

    def _trained(self, job: wire.Train) -> wire.Done:
        """One job, to its end."""
        if self._training is None:
            raise TrainingError("no weights are mapped", "restart the server")
        name = job.job
        return self._training(job).run(
            partial(self._tell, name), partial(self._check, name), partial(self._ask, name)
        )

    def _tell(self, job: str, metric: dict[str, object]) -> None:
        self._send(wire.Progress(job, metric))

    def _check(self, job: str) -> None:
        """Raises Cancelled if the server asked for the end of this job, or of everything."""
        self._heed(job, self._next(0))

    def _ask(self, job: str, step: int) -> list[bool]:
        """Which spoken development probes pass now. Waits, and writes nothing, until the server says it or ends.

        Raises:
            Cancelled: it asked for the end instead.
        """
        self._send(wire.Asking(job, step))
        while True:
            message = self._next(POLL_MS)
            if isinstance(message, wire.Judged) and (message.job, message.step) == (job, step):
                return message.passed
            self._heed(job, message)

    def _heed(self, job: str, message: wire.ToTrainer | None) -> None:
        if isinstance(message, wire.Cancel) and message.job == job:
            raise Cancelled("cancelled")
        if isinstance(message, wire.Shutdown):
            self._ended = True
            raise Cancelled("the server is shutting down")


def _device_is_lost() -> bool:
    from secondnature.train.device import is_lost

    return is_lost()


def _give_back() -> None:
    """What a job held."""
    from secondnature.train.memory import give_back

    give_back(collect=True)


def end_with(parent: int, endpoint: str) -> None:
    """End this process as soon as its parent is gone, also in the midst of loading or of a step.

    A thread that looks: the kernel's own signal (PR_SET_PDEATHSIG) comes when the *thread* that started this
    process ends, which may be any of the server's, and would leave the socket's directory behind.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        directory = Path(endpoint.removeprefix("ipc://")).parent  # nobody else is left to clean up
        shutil.rmtree(directory, ignore_errors=True)
        os._exit(0)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main(endpoint: str, parent: int) -> None:
    """Connect and serve."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it: nothing is downloaded
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    end_with(parent, endpoint)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.setsockopt(zmq.SNDTIMEO, int(SEND_TIMEOUT_S * 1000))
    socket.connect(endpoint)
    try:
        Worker(socket).serve()
    finally:
        socket.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
