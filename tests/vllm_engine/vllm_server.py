"""vLLM with the plug-in, as its users start it: a process on a port, and what it leaves in /proc.

    with Server(home) as server: server.client.train(...)

The engine's only weights are a memfd of the worker; `weights` reads it through /proc, past every route of ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from secondnature import embedded
from secondnature.records import Correction
from secondnature.weights.arena import HEADER_BYTES
from secondnature.wire import Client, JobStatus, TrainRequest

KEY = "the-key-of-the-tests"
EMBEDDED = Path(embedded.__file__).parent / "weights"
LISTENING = Path(__file__).parents[2] / "examples" / "listening"
ENTRY = "vllm.entrypoints.launchers.api_server.entry"
OVER = ("kept", "undone", "failed", "cancelled")
START_TIMEOUT_S = 280.0


def environment(given: Mapping[str, str] | None = None, /, **more: str) -> dict[str, str]:
    """Without anybody's settings; the plug-in enabled, few threads, no network."""
    kept = {
        k: v
        for k, v in (os.environ if given is None else given).items()
        if not k.startswith(("SECONDNATURE_", "VLLM_"))
    }
    return {
        **kept,
        "VLLM_PLUGINS": "secondnature",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "VLLM_PROCESS_NAME_PREFIX": "TESTED",  # not to be taken for anybody else's
        "SECONDNATURE_API_KEY": KEY,
        "SECONDNATURE_REQUESTS_PER_MINUTE": "1000000",
        **more,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(found: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """Poll until `found` says something true, and give that back."""
    deadline = time.monotonic() + timeout_s
    while not (value := found()):
        assert time.monotonic() < deadline, f"in vain waited for {what}"
        time.sleep(0.05)
    return value


def born(pid: int) -> str:
    """When this process was started, in ticks; empty: it is not there, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def children(pid: int) -> list[int]:
    """Direct children, of all threads."""
    found: set[int] = set()
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found |= {int(p) for p in tasks.read_text().split()}
    return sorted(found)


def cpu_s(pid: int) -> float:
    """Seconds of processors that a process has had, its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return ""


class Server:
    """One server in a session of its own. Nothing of it is left after `with`."""

    def __init__(
        self, home: Path, *flags: str, model: Path = EMBEDDED, eager: bool = True, **variables: str
    ) -> None:
        """Starts it, and does not wait."""
        self.home = home
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = home.with_name(f"{home.name}-{self.port}.log")
        self.scratch = Path(tempfile.mkdtemp(prefix="sn-"))
        """Its temporary files; sockets want a short path."""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", ENTRY, "--model", str(model), "--served-model-name", "tiny"),
                    *("--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", "2048"),
                    *("--num-gpu-blocks-override", "512"),  # little memory: several run at a time
                    *(["--enforce-eager"] if eager else []),
                    *flags,
                ],
                env=environment(SECONDNATURE_HOME=str(home), TMPDIR=str(self.scratch), **variables),
                cwd=home.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.client = Client(self.url, KEY)
        self._seen: dict[int, str] = {}
        """Every process that it ever had, with the moment of its start: numbers are used again."""

    def __enter__(self) -> Self:
        try:
            return self.wait()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.processes()
        for pid in self.left():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)

    # ------------------------------------------------------------------------------------------- its life

    def wait(self) -> Self:
        """Until it answers, and its trainer is ready."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.status("/health") != 200:
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.1)
        self.processes()
        return self

    def ready(self) -> Self:
        """Until the trainer can be given a job."""
        until(lambda: self.client.health().trainer == "ready", "the trainer", 120)
        return self

    def output(self) -> str:
        """What it wrote to stdout and stderr."""
        return self.log.read_text(errors="replace")

    def processes(self) -> dict[str, int]:
        """Its processes by name: `api`, `core`, `worker`, `trainer`."""
        found = {"api": self.process.pid}
        for pid in children(self.process.pid):
            line = command_line(pid)
            if "secondnature.train.worker" in line:
                found["trainer"] = pid
            elif "EngineCore" in line:
                found["core"] = pid
                for inner in children(pid):
                    if "Worker" in command_line(inner):
                        found["worker"] = inner
        self._seen |= {pid: since for pid in found.values() if (since := born(pid))}
        return found

    def end(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 60) -> int:
        """Signal the API server and wait: its exit status."""
        self.processes()
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def left(self) -> dict[int, str]:
        """Of the processes that it ever had: those that still live, and what they are."""
        return {pid: command_line(pid) for pid, since in self._seen.items() if born(pid) == since}

    def sockets(self) -> list[str]:
        """Private directories of its trainers."""
        return [path.name for path in self.scratch.glob("secondnature-*")]

    def arena(self) -> Path:
        """The file in the worker that is the engine's weights."""
        for entry in Path(f"/proc/{self.processes()['worker']}/fd").iterdir():
            with contextlib.suppress(OSError):
                if "secondnature-weights" in str(entry.readlink()):
                    return entry
        raise AssertionError("the worker holds no arena")

    def weights(self) -> str:
        """sha256 of the bytes of the engine's weights."""
        with self.arena().open("rb") as memory:
            memory.seek(HEADER_BYTES)
            return hashlib.sha256(memory.read()).hexdigest()

    def damage(self, num_bytes: int = 100_000) -> None:
        """NaN in the first tensor (bf16), behind everybody's back."""
        with self.arena().open("r+b", buffering=0) as memory:
            memory.seek(HEADER_BYTES)
            memory.write(b"\xff\x7f" * (num_bytes // 2))

    # ---------------------------------------------------------------------------------------- its answers

    def call(
        self, method: str, path: str, body: Any = None, key: str | None = KEY
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, body; whatever the status."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"} if data is not None else {}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, {k.lower(): v for k, v in reply.headers.items()}, reply.read()
        except urllib.error.HTTPError as e:
            return e.code, {k.lower(): v for k, v in e.headers.items()}, e.read()

    def status(self, path: str, method: str = "GET", body: Any = None, key: str | None = KEY) -> int:
        """Of one answer; 0: nobody answers."""
        try:
            return self.call(method, path, body, key)[0]
        except OSError:
            return 0

    def ask(self, text: str, **options: Any) -> dict[str, Any]:
        """A greedy chat completion, whole."""
        messages = [{"role": "user", "content": text}]
        return self.client.chat(messages, **{"temperature": 0, "max_tokens": 40, **options})

    def say(self, text: str) -> str:
        """The greedy answer's text."""
        return str(self.ask(text)["choices"][0]["message"]["content"])

    def scores(self, ids: list[int], **options: Any) -> list[dict[str, float]]:
        """Log-probabilities of the likeliest tokens after these ids, for some greedy steps."""
        given = {"prompt": ids, "temperature": 0, "max_tokens": 8, "logprobs": 5, **options}
        answer = self.client.request("POST", "/v1/completions", body=given)
        return answer["choices"][0]["logprobs"]["top_logprobs"]

    def metric(self, name: str) -> float:
        """A counter of `/metrics`, over all its labels."""
        lines = self.call("GET", "/metrics")[2].decode().splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} "))
        )

    def state(self, prompts: list[str]) -> tuple[Any, ...]:
        """What an undo must give back: the bytes, the version that is told, the answers with their numbers."""
        answers = [self.ask(p, logprobs=True, top_logprobs=5)["choices"] for p in prompts]
        return self.weights(), self.client.lessons().weights_version, answers

    # ----------------------------------------------------------------------------------------- its lessons

    def until(self, job: str, done: Callable[[JobStatus], bool], timeout_s: float = 120) -> JobStatus:
        """Poll a job until `done`; a job that ends otherwise fails the test."""
        deadline = time.monotonic() + timeout_s
        while not done(status := self.client.status(job)):
            assert status.state not in OVER or status.phase not in ("", "done"), status
            assert time.monotonic() < deadline, status
            time.sleep(0.02)
        return status

    def lesson(self, request: TrainRequest, timeout_s: float = 240) -> JobStatus:
        """Submit, and wait until it is on trial or over."""
        job = self.client.train(request).job
        return self.until(
            job, lambda s: s.phase == "on trial" or (s.state in OVER and s.phase == "done"), timeout_s
        )


def corrections() -> list[Correction]:
    """The six of examples/listening."""
    lines = (LISTENING / "corrections.jsonl").read_text().splitlines()
    return [Correction.model_validate_json(line) for line in lines]


DIRECTION = "Today, make the door white."
"""Taught by `listening`; the model suggests something else before, and says yes after."""


def listening(steps: int = 12, **fields: Any) -> TrainRequest:
    """A lesson of the example, without probes or replay."""
    given: dict[str, Any] = {
        "corrections": corrections(),
        "max_steps": steps,
        "batch_size": 6,
        "optimizer": {"lr": 3e-4},
        "lesson": {"behaviour": "listening"},
    }
    return TrainRequest.model_validate({**given, **fields})
