"""A large model: how much memory server and trainer have beside the weights, and what each phase of a lesson takes.

A Llama-like model of random bf16 weights is written in a stream; a real server, of whatever source tree, serves
it, teaches two short lessons (one on probes, judged; one kept and taken back) and starts again. Every 50 ms the
kernel is asked what each process holds: private memory (`RssAnon`), pages of the arena (`RssShmem`), and pages of
other files (`RssFile`: libraries, and whatever is mapped from the home), which it can take away at any time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from secondnature.weights.tensor_file import header

MAX_CONTEXT = 32
"""Tokens: random weights never end an answer, so this bounds it."""
VOCABULARY = 32_768
"""Entries; the tokenizer of the embedded model has fewer, and the table is padded."""
SAMPLE_S = 0.05
POLL_S = 0.05
KEY = "the-key-of-the-benchmark"
FIELDS = ("RssAnon", "RssShmem", "RssFile")
BLOCK = 1 << 22


def shape(num_parameters: float) -> Qwen3Config:
    """A config with about so many parameters: as many layers as it takes."""
    hidden = 2048 if num_parameters >= 5e8 else 1024 if num_parameters >= 5e7 else 128
    heads = hidden // 128 if hidden >= 256 else 2
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY if hidden >= 1024 else 2048,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": 128 if hidden >= 256 else 64,
        "max_position_embeddings": MAX_CONTEXT,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    per_layer = _count(settings, 1) - _count(settings, 0)
    layers = max(1, round((num_parameters - _count(settings, 0)) / per_layer))
    return Qwen3Config(num_hidden_layers=layers, **settings)


def _empty(settings: dict[str, Any], layers: int) -> Any:
    with torch.device("meta"):
        config = Qwen3Config(num_hidden_layers=layers, **settings)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _count(settings: dict[str, Any], layers: int) -> int:
    return sum(p.numel() for p in _empty(settings, layers).parameters())


def write_model(directory: Path, num_parameters: float, tokenizer: Path) -> int:
    """Write the model, a tensor at a time; gives its number of parameters."""
    config = shape(num_parameters)
    directory.mkdir(parents=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    config.architectures = ["Qwen3ForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    for path in tokenizer.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, directory / path.name)
    source = torch.Generator().manual_seed(0)
    places = {n: ("BF16", s, 2 * torch.Size(s).numel()) for n, s in shapes.items()}
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header(places, {"format": "pt"}))
        for name, size in shapes.items():
            count = torch.Size(size).numel()
            for start in range(0, count, BLOCK):
                part = torch.ones(min(BLOCK, count - start))
                if "norm" not in name:
                    part.normal_(0.0, 0.02, generator=source)
                file.write(part.bfloat16().view(torch.int16).numpy().data)
    return sum(torch.Size(s).numel() for s in shapes.values())


class Served:
    """A server of some source tree on a home; speaks HTTP and nothing else, so that any version will do."""

    def __init__(self, source: Path, model: Path, home: Path, log: Path, **settings: object) -> None:
        self.home = home
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SECONDNATURE_")}
        given = {"home": home, "model": model, "port": 0, "api_key": KEY, "requests_per_minute": 1_000_000}
        environment |= {f"SECONDNATURE_{k}".upper(): str(v) for k, v in (given | settings).items()}
        threads = str(settings.get("engine_threads", 1))
        environment |= {"PYTHONPATH": str(source), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        self._log = log
        self.begun = time.monotonic()
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "secondnature.serve.local"],
                env=environment,
                cwd=log.parent,
                stdout=file,
                stderr=file,
            )
        self.url = ""
        self._trainer: int | None = None

    def ready(self, limit_s: float = 900.0) -> float:
        """Wait until it answers; seconds since it was started."""
        while True:
            with contextlib.suppress(OSError, ValueError, KeyError):
                found = json.loads((self.home / "server.json").read_text())
                if found["pid"] == self.process.pid:
                    self.url = found["url"]
                    self.get("/v1/health")
                    return time.monotonic() - self.begun
            if self.process.poll() is not None or time.monotonic() - self.begun > limit_s:
                raise RuntimeError(f"the server did not start:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.01)

    def get(self, path: str) -> Any:
        """The reply to a GET."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The reply to a POST."""
        return self._ask("POST", path, {} if body is None else body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as e:
            raise RuntimeError(f"{method} {path}: {e.code} {e.read()[:2000]!r}") from None

    def wait_for_trainer(self) -> None:
        """Until it has mapped the weights."""
        while self.get("/v1/health")["trainer"] not in ("ready", "busy"):
            time.sleep(POLL_S)

    def pids(self) -> dict[str, int]:
        """Server and trainer, as far as they live."""
        found = {"server": self.process.pid}
        if self._trainer is None or not Path(f"/proc/{self._trainer}").exists():
            self._trainer = _child(self.process.pid)
        if self._trainer is not None:
            found["trainer"] = self._trainer
        return found

    def stop(self) -> float:
        """End it; the seconds that it took."""
        begun = time.monotonic()
        self.process.terminate()
        self.process.wait(120)
        return time.monotonic() - begun


def _child(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in task.read_text().split():
                if b"secondnature.train.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
    return None


@contextlib.contextmanager
def served(source: Path, model: Path, home: Path, log: Path, **settings: object) -> Generator[Served]:
    """A server, ended at the end of the block."""
    server = Served(source, model, home, log, **settings)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


class Watch:
    """What the two processes hold, every 50 ms, by phase."""

    def __init__(self, server: Served) -> None:
        self._server = server
        self.phase = "start"
        self.peaks: dict[str, dict[str, dict[str, int]]] = {}
        self.seconds: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._since = time.monotonic()
        self._thread.start()

    def enter(self, phase: str) -> None:
        """From now on it is this phase."""
        if phase != self.phase:
            now = time.monotonic()
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._since
            self.phase, self._since = phase, now

    def close(self) -> None:
        """The last phase has ended."""
        self.enter("")
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            together = 0
            for who, pid in self._server.pids().items():
                now = _memory(pid)
                if now:
                    together += now["RssAnon"]
                    self._note(who, now)
            self._note("both", {"RssAnon": together})

    def _note(self, who: str, now: dict[str, int]) -> None:
        peaks = self.peaks.setdefault(self.phase, {}).setdefault(who, {})
        for key, value in now.items():
            peaks[key] = max(value, peaks.get(key, 0))


def _memory(pid: int) -> dict[str, int]:
    """Bytes by kind; empty where the process has gone."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/status").read_text()
        found = {f: re.search(rf"^{f}:\s+(\d+) kB", text, re.M) for f in FIELDS}
        return {f: int(m[1]) * 1024 for f, m in found.items() if m}
    return {}


def _corrections(count: int) -> list[dict[str, Any]]:
    things = ("door", "fence", "wall", "gate", "boat", "shelf", "bench", "cabinet")
    return [
        {"prompt": f"Paint the {x}.", "chosen": f"The {x} is red.", "rejected": f"No {x} today."}
        for x in things[:count]
    ]


def request(behaviour: str, steps: int, **more: Any) -> dict[str, Any]:
    """A small lesson: two corrections, so many steps, rank 16, no replay."""
    return {
        "corrections": _corrections(2),
        "batch_size": 2,
        "max_steps": steps,
        "learned_loss": 0.0,
        "replay": {"share": 0.0, "lessons": False},
        "optimizer": {"rank": 16, "lr": 1e-5},
        "lesson": {"behaviour": behaviour},
        **more,
    }


def teach(server: Served, watch: Watch | None, body: dict[str, Any], name: str = "") -> dict[str, Any]:
    """One lesson to its end; the watch is told of every phase. Gives the job's last status."""
    job = server.post("/v1/train", body)["job"]
    while True:
        status = server.get(f"/v1/train/status?job={job}")
        if status["state"] in ("kept", "undone", "inconclusive", "failed", "cancelled"):
            return status
        if watch is not None and status["phase"]:
            watch.enter(name + status["phase"])
        time.sleep(POLL_S if watch is not None else 0.005)


def _probes() -> list[dict[str, Any]]:
    return [
        {"prompt": "Paint the chair.", "behaviour": "paint", "check": {"matches": "red"}},
        {
            "prompt": "Paint the lamp.",
            "behaviour": "paint",
            "check": {"prefers": ["It is red.", "Not today."]},
        },
        {"prompt": "Who are you?", "behaviour": "guard", "check": {"not_matches": "red"}},
    ]


def run(
    source: Path, model: Path, folder: Path, *, steps: int = 2, threads: int = 1, brief: bool = False
) -> dict[str, Any]:
    """All phases with one source tree: peaks by phase and process, seconds by phase. `brief`: one lesson."""
    home, log = folder / "home", folder / "server.log"
    shutil.rmtree(home, ignore_errors=True)
    found: dict[str, Any] = {"steps": steps, "threads": threads}
    settings: dict[str, Any] = {"engine_threads": threads, "train_threads": threads}
    with served(source, model, home, log, **settings) as server:
        watch = Watch(server)
        found["start_s"] = server.ready()
        watch.enter("trainer starts")
        server.wait_for_trainer()
        watch.enter("idle")
        time.sleep(3.0)
        before = server.get("/v1/lessons")["weights_version"]
        if not brief:
            judged = teach(server, watch, request("paint", steps, probes=_probes()), "judged: ")
            found["judged"] = {k: judged[k] for k in ("state", "steps", "loss")}
            watch.enter("idle after the first lesson")
            time.sleep(3.0)
        kept = teach(server, watch, request("paint", steps, keep=True), "kept: ")
        assert kept["state"] == "kept", kept
        watch.enter("idle after the lesson")
        time.sleep(3.0)
        lesson = server.get("/v1/lessons")["lessons"][-1]
        found["delta_bytes"] = (home / "lessons" / lesson["id"] / "delta.safetensors").stat().st_size
        watch.enter("undo")
        server.post(f"/v1/lessons/{lesson['id']}/revert")
        watch.enter("idle after the undo")
        found["undone_to_the_byte"] = server.get("/v1/lessons")["weights_version"] == before
        server.post(f"/v1/lessons/{server.get('/v1/lessons')['lessons'][-1]['id']}/revert")  # have it again
        watch.close()
        found["stop_s"] = server.stop()
        found["first"] = {"peaks": watch.peaks, "seconds": watch.seconds}
    with served(source, model, home, log, **settings) as server:
        watch = Watch(server)
        watch.enter("restart with a kept lesson")
        found["restart_s"] = server.ready()
        watch.enter("idle after the restart")
        server.wait_for_trainer()
        time.sleep(3.0)
        watch.enter("working copy")
        server.post("/v1/checkpoint")
        watch.close()
        found["second"] = {"peaks": watch.peaks, "seconds": watch.seconds}
    shutil.rmtree(home, ignore_errors=True)
    return found


def hold_config(directory: Path) -> str:
    """What the model is, in words."""
    config = AutoConfig.from_pretrained(directory)
    return f"{config.num_hidden_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size}"
