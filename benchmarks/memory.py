"""How many copies of the weights there are: a server and its trainer, against two processes with a copy each.

Read from the kernel (`/proc/PID/smaps_rollup`, PSS: a page that n processes map counts 1/n in each; mapped
files, that is libraries, left out). Interpreters are larger than a small model; so the same is measured with a
wider model of random weights, and the slope, bytes per byte of weights, is the number of copies. The server is
measured at rest, its trainer ready.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from common import THREADS, Settings, say
from server import ARENA, serving
from transformers import AutoConfig, AutoModelForCausalLM

from secondnature.model.load import build, plan
from secondnature.train.prefix import self_test
from secondnature.weights import checkpoint

SCALED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "linear_num_key_heads",
    "linear_num_value_heads",
)


def rollup(pids: Iterable[int]) -> dict[str, int]:
    """Bytes of some processes together: resident, proportional, and proportional without mapped files."""
    found = {"Rss": 0, "Pss": 0, "Pss_File": 0}
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        for key in found:
            match = re.search(rf"^{key}:\s+(\d+) kB", text, re.M)
            assert match is not None
            found[key] += int(match[1]) * 1024
    return {"rss": found["Rss"], "pss": found["Pss"], "own": found["Pss"] - found["Pss_File"]}


def mapping(pid: int, name: str) -> dict[str, int]:
    """Bytes of what one process has mapped of a file of this name: size, resident, proportional, private."""
    found = {"size": 0, "rss": 0, "pss": 0, "private": 0}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            inside = name in line
        elif inside and line.startswith(("Size:", "Rss:", "Pss:", "Private_")):
            key = line.split(":")[0].split("_")[0].lower()
            found[key] += int(line.split()[1]) * 1024
    return found


def weight_bytes(directory: Path) -> int:
    return sum(2 * torch.Size(spec.shape).numel() for spec in plan(directory))


def widen(source: Path, directory: Path, factor: int) -> Path:
    """A model of the same architecture, `factor` times as wide, random weights, the same tokenizer."""
    config = AutoConfig.from_pretrained(source)
    for name in SCALED:
        if hasattr(config, name):
            setattr(config, name, factor * getattr(config, name))
    if config.num_attention_heads > 16 * config.num_key_value_heads:  # vLLM's attention on CPUs takes no more
        config.num_key_value_heads *= factor
    shutil.copytree(
        source, directory, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "card.json")
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def _shared(directory: Path) -> dict[str, Any]:
    """The product: server and trainer around one arena."""
    with serving(directory) as server:
        pids = (server.pid, server.trainer_pid())
        found: dict[str, Any] = {**rollup(pids), "arena": [mapping(pid, ARENA) for pid in pids]}
    return found


def hold(directory: Path) -> None:
    """A process of the peer: a model around weights of its own; says when it is ready, waits to be ended."""
    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    weights = {
        n: t.clone() for n, t in checkpoint.read(directory).items()
    }  # not the mapped file: to be written
    model = build(directory, weights)
    self_test(model)  # as server and trainer have done: the same working memory
    print("ready", flush=True)
    sys.stdin.read()


def _private(directory: Path) -> dict[str, int]:
    """The peer: two processes with a copy of the weights each."""
    command = [sys.executable, __file__, str(directory)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", "a process of the peer failed"
        return rollup(p.pid for p in processes)
    finally:
        for process in processes:
            process.communicate()


def measure(settings: Settings) -> dict[str, Any]:
    """PSS with a small and a wide model, shared and private; the copies that follow."""
    torch.set_num_threads(THREADS)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        wide = widen(settings.model, Path(folder) / "wide", 2 if settings.quick else 6)
        for directory in (wide,) if settings.quick else (settings.model, wide):
            row = {
                "weight_bytes": weight_bytes(directory),
                "shared": _shared(directory),
                "private": _private(directory),
            }
            rows.append(row)
            say(f"weights {row['weight_bytes'] / 1e6:.1f} MB: {row['shared']['own'] / 1e6:.0f} MB shared")
    found: dict[str, Any] = {"rows": rows}
    if len(rows) == 2:
        small, large = rows
        more = large["weight_bytes"] - small["weight_bytes"]
        found["copies"] = {k: (large[k]["own"] - small[k]["own"]) / more for k in ("shared", "private")}
    return found


if __name__ == "__main__":
    hold(Path(sys.argv[1]))
