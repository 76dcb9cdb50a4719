"""A real server for the benchmarks: a process of its own on a throwaway home, as users start it (client side)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common import THREADS

from secondnature.lessons.home import running_server
from secondnature.wire import Client

START_S = 180.0
ARENA = "memfd:secondnature-weights"
"""What the arena's file is called among a process's mappings."""


@dataclass(frozen=True)
class Server:
    """One that answers, with the trainer ready."""

    client: Client
    url: str
    pid: int

    def trainer_pid(self) -> int:
        """The trainer: the child that runs the worker."""
        for task in Path(f"/proc/{self.pid}/task").glob("*/children"):
            for pid in task.read_text().split():
                if b"secondnature.train.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)
        raise RuntimeError("the server has no trainer")


@contextmanager
def serving(model: Path) -> Generator[Server]:
    """The server, until the end of the `with` block; its home is thrown away."""
    with tempfile.TemporaryDirectory(prefix="secondnature-bench-") as folder:
        home = Path(folder) / "home"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SECONDNATURE_")}
        environment |= {
            "OMP_NUM_THREADS": str(THREADS),
            "SECONDNATURE_HOME": str(home),
            "SECONDNATURE_MODEL": str(model),
            "SECONDNATURE_PORT": "0",
            "SECONDNATURE_REQUESTS_PER_MINUTE": "1000000",
        }
        log_path = Path(folder) / "server.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "secondnature.serve.local"],
                env=environment,
                cwd=folder,
                stdout=log,
                stderr=log,
            )
        try:
            url = _await(process, home, log_path)
            with Client(url, (home / "key").read_text().strip(), timeout_s=120) as client:
                _until_ready(client, log_path)
                yield Server(client, url, process.pid)
        finally:
            process.terminate()
            process.wait(60)


def _until_ready(client: Client, log: Path) -> None:
    """Wait for the trainer, which has mapped the weights and tested itself when it says that it is ready."""
    deadline = time.monotonic() + START_S
    while (health := client.health()).trainer != "ready":
        if time.monotonic() > deadline:
            raise RuntimeError(f"the trainer is {health.trainer}: {health.detail}\n{log.read_text()}")
        time.sleep(0.05)


def _await(process: subprocess.Popen[bytes], home: Path, log: Path) -> str:
    deadline = time.monotonic() + START_S
    while True:
        found = running_server(home)
        if found is not None and int(found["pid"]) == process.pid:
            return found["url"]
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start:\n{log.read_text()}")
        time.sleep(0.05)
