"""Commands on the null GPU, with the plug-in's entry points as pyproject.toml has them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from gpu_battery import entry_points

from secondnature.errors import SecondnatureError
from secondnature.wire import Client

ROOT = Path(__file__).parents[2]
NULL = ROOT / "tests" / "gpu" / "null"
"""What plays what kernels should have done, where `plays`."""
KEY = "the-key-of-the-tests"
START_TIMEOUT_S = 280.0


class NullGpu:
    """The kit, and where this test may write."""

    def __init__(self, kit: Path, folder: Path) -> None:
        self.kit = kit
        self.folder = folder
        self.home = folder / "home"
        self.dist = folder / "dist"
        entry_points(self.dist)

    def _start(
        self, words: tuple[str, ...], variables: dict[str, str], plays: bool, **options: Any
    ) -> subprocess.Popen[Any]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SECONDNATURE_", "VLLM_", "PYTHON"))}
        first = ":".join(map(str, (self.dist, *([NULL] if plays else []))))
        return subprocess.Popen(
            [
                str(self.kit / "on-null"),
                *("bash", "-c", f'PYTHONPATH={first}:$PYTHONPATH exec "$@"', "-", *words),
            ],
            cwd=ROOT,
            # requests of the V2 runner never end here: the kernel that counts their tokens does nothing
            env={**kept, "VLLM_USE_V2_MODEL_RUNNER": "0", "OMP_NUM_THREADS": "1", **variables},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **options,
        )

    def run(
        self, *words: str, timeout_s: float = 280, variables: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command to its end, whatever its status; nothing is played. What it writes is in `stdout`."""
        process = self._start(
            words, variables or {}, plays=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            output, _ = process.communicate(timeout=timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(words, process.returncode, output)

    @contextlib.contextmanager
    def server(self, port: int, *words: str, **variables: str) -> Generator[tuple[Client, Path]]:
        """A server, up, with its trainer ready: its client, and its log."""
        log = self.folder / "server.log"
        with log.open("wb") as output:
            process = self._start(
                words,
                {"SECONDNATURE_HOME": str(self.home), "SECONDNATURE_API_KEY": KEY, **variables},
                plays=True,
                stdout=output,
                stderr=output,
            )
        client = Client(f"http://127.0.0.1:{port}", KEY)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _ready(client):
                assert process.poll() is None, log.read_text()[-6000:]
                assert time.monotonic() < deadline, log.read_text()[-6000:]
                time.sleep(0.3)
            yield client, log
        finally:
            client.close()
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _ready(client: Client) -> bool:
    try:
        return client.health().trainer == "ready"
    except SecondnatureError:
        return False
