"""What a kill -9 does: of the trainer in the midst of a lesson, twenty times, and of vLLM's API server.

The weights are read from outside, from the file that vLLM's worker holds, and hashed. Trainer: from the kill to
the moment at which the job is said to have failed and its writes are undone, while clients stream; then a
lesson must work. Server: from the kill to the last of its processes gone, and from the new start to the first
answer; what is served must be the lesson that was kept last, although another one was being trained.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Settings, say, spread
from vllm_checkpoint import teach
from vllm_clients import gaps, streams
from vllm_process import Vllm, descendants, end, lives, vllm
from vllm_serving import await_step, lesson

NUM_CLIENTS = 2
MAX_TOKENS = 64
GONE_S = 30.0
"""How long is waited for processes that nobody ended; the server is started again beside what is left then."""


def _kill_trainer(server: Vllm, source: random.Random) -> dict[str, float]:
    """One kill at a random moment of a step: seconds until undone, and until a trainer is ready again."""
    before = server.weights(), server.client.health().weights_version
    job = server.client.train(lesson(max_steps=100_000)).job
    await_step(server, job, 2)
    time.sleep(source.uniform(0, 1))
    trained = server.weights()
    os.kill(server.processes()["trainer"], signal.SIGKILL)
    begun = time.monotonic()
    while (status := server.client.status(job)).state == "running":
        time.sleep(0.005)
    undone_s = time.monotonic() - begun
    after = server.weights(), server.client.health().weights_version
    server.await_trainer()
    return {
        "undone_s": undone_s,
        "ready_s": time.monotonic() - begun,
        "changed": float(trained != before[0]),
        "restored": float(after == before),
        "said_so": float(status.state == "failed" and status.error is not None),
    }


def _trainer(model: Path, kills: int) -> dict[str, Any]:
    """Kills of the trainer, and a lesson after each, while clients stream."""
    source = random.Random(0)
    found: list[dict[str, float]] = []
    worked = 0
    with vllm(model) as server:
        server.await_trainer()
        teach(server, lesson(max_steps=3, keep=True))  # what is restored is more than the checkpoint
        with streams(server, NUM_CLIENTS, max_tokens=MAX_TOKENS) as clients:
            for turn in range(kills):
                found.append(_kill_trainer(server, source))
                server.client.revert(teach(server, lesson(max_steps=1, keep=True)))
                worked += 1
                say(f"trainer {turn + 1}: {found[-1]}")
            clients.rest()
            failed = [a.failure for a in clients.answers if a.failure]
            longest = max(b - a for a, b in gaps(clients.answers))
            requests = len(clients.answers)
            not_finite = sum(a.not_finite for a in clients.answers)
    return {
        "kills": len(found),
        "seconds": {k: spread([f[k] for f in found]) for k in ("undone_s", "ready_s")},
        **{k: int(sum(f[k] for f in found)) for k in ("changed", "restored", "said_so")},
        "next_lesson_kept": worked,
        "requests": requests,
        "failed": len(failed),
        "failures": sorted(set(failed))[:5],
        "not_finite": not_finite,
        "longest_gap": longest,
    }


def _kill_api_server(server: Vllm) -> tuple[list[int], float, int]:
    """All its processes, seconds until all are gone (or it is no longer waited), and how many are left then."""
    pids = descendants(server.pid)
    os.kill(server.pid, signal.SIGKILL)
    begun = time.monotonic()
    while any(lives(pid) for pid in pids) and time.monotonic() - begun < GONE_S:
        time.sleep(0.01)
    return pids, time.monotonic() - begun, sum(lives(pid) for pid in pids)


def _left_without_plugin(model: Path) -> int:
    """Processes that outlive the API server of a vLLM without the plug-in."""
    with vllm(model, plugin=False) as server:
        pids, _, left = _kill_api_server(server)
        end(pids)
    return left


def _kill_server(model: Path, home: Path) -> dict[str, float]:
    """Keep a lesson, kill the server while it trains the next one, start again."""
    with vllm(model, home=home) as server:
        first_s = server.start_s
        server.await_trainer()
        teach(server, lesson(max_steps=3, keep=True))
        kept = server.weights(), server.client.health().weights_version
        await_step(server, server.client.train(lesson(max_steps=100_000)).job, 2)
        pids, gone_s, left = _kill_api_server(server)
    try:
        again = _restart(model, home, kept)
    finally:
        end(pids)
    return {"gone_s": gone_s, "left": float(left), "start_s": first_s, **again}


def _restart(model: Path, home: Path, kept: tuple[str, str]) -> dict[str, float]:
    with vllm(model, home=home) as server:
        after = server.weights(), server.client.health().weights_version
        server.await_trainer()
        taught = teach(server, lesson(max_steps=1, keep=True))
        return {
            "restart_s": server.start_s,
            "restored": float(after == kept),
            "next_lesson_kept": float(bool(taught)),
        }


def _server(model: Path, kills: int) -> dict[str, Any]:
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="secondnature-bench-") as folder:
        for turn in range(kills):
            found.append(_kill_server(model, Path(folder) / "home"))
            say(f"server {turn + 1}: {found[-1]}")
    return {
        "kills": len(found),
        "seconds": {k: spread([f[k] for f in found]) for k in ("gone_s", "start_s", "restart_s")},
        **{k: int(sum(f[k] for f in found)) for k in ("left", "restored", "next_lesson_kept")},
        "waited_s": GONE_S,
        "left_without_plugin": _left_without_plugin(model),
    }


def measure(settings: Settings) -> dict[str, Any]:
    """Kills of the trainer and of the server."""
    return {
        "trainer": _trainer(settings.model, 2 if settings.quick else 20),
        "server": _server(settings.model, 1 if settings.quick else 3),
    }
