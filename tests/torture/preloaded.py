"""Servers as fast as forks: a process that has imported everything, for 300 kills in minutes (see `kills`).

Importing torch and transformers takes ten times as long as all the rest of a start. So one process imports
them once and forks a server for each line on stdin; what runs then is `serve.local.main`, settings from the
environment, in a process group of its own. The server's trainers are forked the same way, from a sibling that
shares its memory pages and runs the real `train.worker.main`. Nothing else is changed: real weights,
gradients, routes, sockets and signals.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import far_side
import torch  # noqa: F401  (so that the forked have it)
import transformers  # noqa: F401

from secondnature import config
from secondnature.lessons import trainer
from secondnature.serve import local
from secondnature.train import run as _run  # noqa: F401
from secondnature.train import worker

PR_SET_PDEATHSIG = 1


def _trainer(endpoint: str, parent: int, _behaviour: str) -> None:
    far_side.wait_for_parent(parent)
    worker.main(endpoint, parent)


def _with_trainers() -> None:
    """The product's trainer asks the sibling instead of starting an interpreter."""
    forker, child = far_side.sibling(_trainer)
    trainer.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=forker.launch, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )
    Path(os.environ["TORTURE_SIBLING"]).write_text(str(child))


def _serve(asked: dict[str, str]) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    log = os.open(asked.pop("LOG"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for number, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(number, target)
    os.environ.update(asked)
    _with_trainers()
    return local.main(config.load())


def main() -> None:
    """Fork until the other side is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the killed
    print("ready", flush=True)
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = _serve(json.loads(line))
            except BaseException as e:  # noqa: BLE001  (a forked process must never come back)
                print(f"the server ended: {e!r}", file=sys.stderr, flush=True)
            os._exit(status)
        print(child, flush=True)


if __name__ == "__main__":
    main()
