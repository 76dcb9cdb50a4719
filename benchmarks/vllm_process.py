"""A real vLLM for the benchmarks, with the plug-in or without, and what the kernel says of it (client side).

Both ways have the same flags. Without the plug-in, vLLM gets one of its parts only: stand-ins for torchvision,
which its text models import; that is not a part of what is compared. What runs here is what users start, as
processes of their own; of our environment they get nothing that changes their speed.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from memory import mapping, rollup
from server import ARENA

from secondnature.weights.arena import HEADER_BYTES
from secondnature.wire import Client

START_S = 300.0
MAX_TOKENS = 2048
"""Prompt and answer together, of every server here."""
NAME = "model"
STAND_IN = "secondnature_stand_in"
OURS = ("SECONDNATURE_", "VLLM_", "OMP_", "MKL_", "TOKENIZERS_", "KINETO_", "TORCH_CPP_", "MALLOC_")
"""Variables of this program that no server inherits."""
ROLES = {
    b"VLLM::EngineCore": "engine core",
    b"VLLM::Worker": "worker",
    b"secondnature.train.worker": "trainer",
}


def descendants(pid: int) -> list[int]:
    """A process and all below it; none if it is gone."""
    found = [pid] if Path(f"/proc/{pid}").exists() else []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in task.read_text().split():
                found += descendants(int(child))
    return found


def lives(pid: int) -> bool:
    """Is it there, and no zombie?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Vllm:
    """One that answers."""

    url: str
    pid: int
    """Of the API server."""
    http: httpx2.Client
    start_s: float
    """From the start of the process to the first answer."""
    given: Client | None
    """To our routes; None without the plug-in."""

    @property
    def client(self) -> Client:
        """To our routes."""
        assert self.given is not None, "a server without the plug-in"
        return self.given

    def processes(self) -> dict[str, int]:
        """Role -> pid of all processes; what only helps is `helper`, one of them."""
        found: dict[str, int] = {}
        for pid in descendants(self.pid):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            role = next((role for mark, role in ROLES.items() if mark in line), "helper")
            found["api server" if pid == self.pid else role] = pid
        return found

    def post(self, path: str, body: dict[str, Any] | None = None, **params: str) -> Any:
        """One call to a route of vLLM's own: its JSON."""
        response = self.http.post(path, json=body, params=params)
        if response.is_error:
            raise RuntimeError(f"{path}: status {response.status_code}: {response.text[:500]}")
        return response.json() if response.content else None

    def await_trainer(self) -> float:
        """Wait until a lesson could begin; seconds since the call."""
        begun = time.monotonic()
        while self.client.health().trainer != "ready":
            time.sleep(0.05)
        return time.monotonic() - begun

    def memory(self) -> dict[str, dict[str, int]]:
        """By role: bytes resident, proportional, and proportional without mapped files."""
        return {role: rollup([pid]) for role, pid in self.processes().items()}

    def mappings(self) -> dict[str, dict[str, int]]:
        """By role: the bytes of its mapping of the arena, where it has one."""
        found = {role: mapping(pid, ARENA) for role, pid in self.processes().items()}
        return {role: m for role, m in found.items() if m["size"]}

    def weights(self) -> str:
        """Hash over the engine's weights, read from outside, from the file that its worker holds."""
        with open_arena(self.processes()["worker"]) as memory:
            return hashlib.sha256(memory[HEADER_BYTES:]).hexdigest()


@contextmanager
def open_arena(worker: int) -> Generator[memoryview]:
    """The bytes of the arena that a process holds, header first; read-only."""
    for link in Path(f"/proc/{worker}/fd").iterdir():
        with suppress(OSError):
            if str(link.readlink()).startswith(f"/{ARENA}"):
                with link.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
                    view = memoryview(memory)
                    yield view
                    view.release()
                return
    raise RuntimeError(f"process {worker} holds no arena")


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stand_in(folder: Path) -> Path:
    """A directory that gives vLLM torchvision's names as a plug-in of its own, and nothing else of ours."""
    about = folder / "site" / f"{STAND_IN}-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {STAND_IN}\nVersion: 0\n")
    entry = f"{STAND_IN} = secondnature.engines.vllm.torchvision_stub:stand_in"
    (about / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{entry}\n")
    return about.parent


def environment(folder: Path, home: Path | None, settings: dict[str, str]) -> dict[str, str]:
    """Of a vLLM with the plug-in around `home`, or (None) without it; `folder` is for what it needs."""
    found = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
    found |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if home is None:
        paths = [str(_stand_in(folder)), *filter(None, [found.get("PYTHONPATH")])]
        found |= {"VLLM_PLUGINS": STAND_IN, "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": os.pathsep.join(paths)}
        return found  # the development mode has the routes that reload weights
    found |= {"VLLM_PLUGINS": "secondnature", "SECONDNATURE_HOME": str(home)}
    found |= {"SECONDNATURE_REQUESTS_PER_MINUTE": "1000000"}
    return found | {f"SECONDNATURE_{name.upper()}": value for name, value in settings.items()}


@contextmanager
def vllm(
    model: Path, *, plugin: bool = True, home: Path | None = None, flags: Iterable[str] = (), **settings: str
) -> Generator[Vllm]:
    """vLLM (eager) with this model, until the end of the `with` block.

    `home`: kept, where one is given; else thrown away. `settings`: of the plug-in, by their names.
    """
    with tempfile.TemporaryDirectory(prefix="secondnature-bench-") as name:
        folder = Path(name)
        port = free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
        command += ["--model", str(model), "--served-model-name", NAME, "--host", "127.0.0.1"]
        command += ["--port", str(port), "--max-model-len", str(MAX_TOKENS), "--enforce-eager", *flags]
        home = (home or folder / "home") if plugin else None
        with (folder / "log").open("wb") as log:
            begun = time.monotonic()
            process = subprocess.Popen(
                command, env=environment(folder, home, settings), cwd=folder, stdout=log, stderr=log
            )
        url = f"http://127.0.0.1:{port}"
        started: list[int] = []
        try:
            with httpx2.Client(base_url=url, timeout=600, trust_env=False) as http:
                _await(process, http, begun)
                start_s = time.monotonic() - begun
                key = (home / "key").read_text().strip() if home is not None else None
                with Client(url, key, timeout_s=600) as client:
                    yield Vllm(url, process.pid, http, start_s, client if plugin else None)
        except Exception as e:
            e.add_note("the log of vLLM ends with:\n" + _errors(folder / "log"))
            raise
        finally:
            started = descendants(process.pid)
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            end(started)
            process.wait(10)


def _errors(log: Path) -> str:
    """The last lines that speak of an error, or of us."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join([line for line in lines if re.search("rror|secondnature", line)][-30:])


def end(pids: Iterable[int]) -> None:
    """Kill those of our own processes that still live."""
    for pid in pids:
        if lives(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _await(process: subprocess.Popen[bytes], http: httpx2.Client, begun: float) -> None:
    while True:
        with suppress(httpx2.TransportError):
            if http.get("/health").status_code == 200:
                return
        if process.poll() is not None or time.monotonic() - begun > START_S:
            raise RuntimeError("vLLM did not start")
        time.sleep(0.05)
