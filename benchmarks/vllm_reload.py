"""The pause that streaming clients see when the weights change: a lesson in place beside vLLM's own reload.

Eight clients stream long answers. Ours: a lesson of one step, kept, and then its revert. Theirs, a vLLM without
the plug-in: the same update read from its exported checkpoint (pause, `reload_weights`, reset of the prefix
cache, resume), and back. Theirs does not count who computes the update and writes the checkpoint, which is
timed apart. Beside both, the longest gap of a stretch as long in which nothing happens. For the embedded model,
and for a wide one of random weights. What the reload leaves behind is in `vllm_checkpoint`.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Settings, say, spread
from memory import weight_bytes, widen
from vllm_checkpoint import teach
from vllm_clients import Phase, Streams, gaps, streams, touching
from vllm_process import vllm
from vllm_serving import NUM_CLIENTS, lesson

MAX_TOKENS = 1500
WIDE = 6
"""Times as wide as the embedded model."""
REST_S = 2.0


def _stretch(name: str, work: Callable[[], object]) -> Phase:
    begun = time.monotonic()
    work()
    return Phase(name, begun, time.monotonic())


def _length(phase: Phase) -> float:
    return phase.ended - phase.begun


def _told(phases: list[Phase], clients: Streams) -> dict[str, Any]:
    """By name: how long it took, the longest gap of a stream that it overlapped with; and the same of no event."""
    moments = gaps(clients.seen())
    names = list(dict.fromkeys(p.name for p in phases))
    found: dict[str, Any] = {
        name: {
            "seconds": spread([_length(p) for p in phases if p.name == name]),
            "longest_gap": spread([touching(p, moments) for p in phases if p.name == name]),
        }
        for name in names
    }
    found["failed"] = sum(bool(a.failure) for a in clients.answers)
    found["failures"] = sorted({a.failure for a in clients.answers if a.failure})[:5]
    return found


def _ours(model: Path, turns: int, exported: Path) -> dict[str, Any]:
    """Lessons of one step and their reverts; leaves the checkpoint of such a lesson."""
    phases: list[Phase] = []
    taught: list[str] = []
    with vllm(model) as server:
        server.await_trainer()
        teach(server, lesson(max_steps=1, keep=True))  # warm
        with streams(server, NUM_CLIENTS, max_tokens=MAX_TOKENS, ignore_eos=True) as clients:
            time.sleep(2 * REST_S)
            for _ in range(turns):
                phases.append(
                    _stretch("lesson", lambda: taught.append(teach(server, lesson(max_steps=1, keep=True))))
                )
                time.sleep(REST_S)
                phases.append(_stretch("nothing", lambda: time.sleep(_length(phases[-1]))))
                phases.append(_stretch("revert", lambda: server.client.revert(taught[-1])))
                time.sleep(REST_S)
            found = _told(phases, clients)
        saved = _stretch("save", server.client.checkpoint)
        shutil.copytree(server.client.checkpoint().path, exported)
    return {**found, "export_s": _length(saved)}


def _theirs(model: Path, turns: int, exported: Path) -> dict[str, Any]:
    """Reloads of the two checkpoints in turn."""
    phases: list[Phase] = []
    with vllm(model, plugin=False) as server:
        calls: list[tuple[str, dict[str, Any] | None, dict[str, str]]] = [
            ("/pause", None, {"mode": "keep"}),
            ("/collective_rpc", {"method": "reload_weights"}, {}),
            ("/reset_prefix_cache", None, {"reset_running_requests": "true"}),
            ("/resume", None, {}),
        ]

        def reload(directory: Path) -> None:
            for path, body, params in calls:
                given = {**body, "kwargs": {"weights_path": str(directory)}} if body else None
                name = body["method"] if body else path[1:]
                parts.append(_stretch(name, lambda p=path, g=given, q=params: server.post(p, g, **q)))

        parts: list[Phase] = []
        reload(exported)  # warm
        parts.clear()
        with streams(server, NUM_CLIENTS, max_tokens=MAX_TOKENS, ignore_eos=True) as clients:
            time.sleep(2 * REST_S)
            for turn in range(turns):
                directory = model if turn % 2 == 0 else exported
                phases.append(_stretch("reload", lambda d=directory: reload(d)))
                time.sleep(REST_S)
                phases.append(_stretch("nothing", lambda: time.sleep(_length(phases[-1]))))
            found = _told(phases, clients)
    names = dict.fromkeys(p.name for p in parts)
    found["parts"] = {n: spread([_length(p) for p in parts if p.name == n]) for n in names}
    found["read_bytes"] = sum(f.stat().st_size for f in exported.glob("*.safetensors"))
    return found


def measure(settings: Settings) -> dict[str, Any]:
    """Both ways, for both models."""
    turns = 2 if settings.quick else 3
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="secondnature-bench-") as folder:
        models = [settings.model]
        if not settings.quick:
            models.append(widen(settings.model, Path(folder) / "wide", WIDE))
        for i, model in enumerate(models):
            exported = Path(folder) / f"exported-{i}"
            row = {
                "weight_bytes": weight_bytes(model),
                "ours": _ours(model, turns, exported),
                "theirs": _theirs(model, turns, exported),
            }
            rows.append(row)
            said = {k: row["ours"][k]["longest_gap"]["median"] for k in ("lesson", "revert")}
            say(f"longest gaps: {said}, reload {row['theirs']['reload']['longest_gap']['median']}")
    return {"clients": NUM_CLIENTS, "turns": turns, "rows": rows}
