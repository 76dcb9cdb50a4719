"""What the plug-in costs vLLM: seconds to start, memory, and tokens per second without packed weights.

Servers with and without the plug-in take turns, same flags, eager, for the embedded model and for a wide one of
random weights. Start: from the process to the first answer of `/health`; with the plug-in also until a trainer
is ready. Memory: PSS of all processes without mapped files, at rest; the slope from the smaller model to the
larger is the number of copies of the weights, whatever interpreters take. Speed: greedy streams over HTTP, and
long prompts of random tokens that are read at once.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
from common import Settings, ratio, say, spread
from memory import weight_bytes, widen
from vllm_process import NAME, Vllm, vllm

from secondnature.model.load import read_config

WIDE = 6
STREAMS = (1, 8)
PROMPT_TOKENS = 32
LONG_PROMPT_TOKENS = 1500
Server = dict[str, float]
"""What one start gave, by figure."""


def _prompt(vocabulary: int, count: int, seed: int) -> list[int]:
    """Ids that no other prompt begins with."""
    return [16 + (seed * 7919 + i * (seed + 1) * 31) % (vocabulary - 32) for i in range(count)]


async def _stream(http: httpx2.AsyncClient, prompt: list[int], count: int) -> list[float]:
    """When the tokens of one greedy answer came."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
    times: list[float] = []
    async with http.stream(
        "POST", "/v1/completions", json={**body, "stream": True, "return_token_ids": True}
    ) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                now = time.monotonic()
                times += [now] * len(json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"] or [])
    if len(times) != count:
        raise RuntimeError(f"{len(times)} tokens; expected {count}")
    return times


async def _speed(url: str, vocabulary: int, *, quick: bool) -> Server:
    """Tokens per second of one stream, of eight, and of reading."""
    found: Server = {}
    count = 32 if quick else 160
    seed = 0
    async with httpx2.AsyncClient(base_url=url, timeout=600, trust_env=False) as http:
        for streams in STREAMS:
            for warm in (True, False):
                prompts = [_prompt(vocabulary, PROMPT_TOKENS, seed := seed + 1) for _ in range(streams)]
                length = 16 if warm else count
                all_times = await asyncio.gather(*(_stream(http, p, length) for p in prompts))
                first = max(times[0] for times in all_times)  # when all are under way
                last = min(times[-1] for times in all_times)
                inside = sum(first < t <= last for times in all_times for t in times)
                found[f"streams_{streams}"] = inside / (last - first)
        reads: list[float] = []
        for _ in range(1 if quick else 4):
            prompt = _prompt(vocabulary, LONG_PROMPT_TOKENS, seed := seed + 1)
            begun = time.monotonic()
            await _stream(http, prompt, 1)
            reads.append(LONG_PROMPT_TOKENS / (time.monotonic() - begun))
        found["reading"] = sum(reads[-3:]) / len(reads[-3:])
    return found


def _started(model: Path, *, plugin: bool, quick: bool) -> Server:
    """One start, to its end."""
    with vllm(model, plugin=plugin) as server:
        found: Server = {"start_s": server.start_s}
        if plugin:
            found["ready_s"] = server.start_s + server.await_trainer()
        asked = {"model": NAME, "prompt": [20, 21, 22], "max_tokens": 4}
        server.post("/v1/completions", asked)
        time.sleep(1 if quick else 3)
        found |= _memory(server)
        vocabulary = read_config(model).get_text_config(decoder=True).vocab_size
        return found | asyncio.run(_speed(server.url, vocabulary, quick=quick))


def _memory(server: Vllm) -> Server:
    """Bytes: of all processes, of the trainer, of the rest."""
    held = server.memory()
    trainer = held.pop("trainer", {"rss": 0, "own": 0})
    return {
        "own": float(sum(m["own"] for m in held.values())),
        "rss": float(sum(m["rss"] for m in held.values())),
        "trainer_own": float(trainer["own"]),
        "trainer_rss": float(trainer["rss"]),
        "all_own": float(sum(m["own"] for m in held.values()) + trainer["own"]),
    }


def measure(settings: Settings) -> dict[str, Any]:
    """Start, memory and speed with and without the plug-in; the copies of the weights that follow."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="secondnature-bench-") as folder:
        models = [settings.model, widen(settings.model, Path(folder) / "wide", 2 if settings.quick else WIDE)]
        known: list[dict[bool, list[Server]]] = [{False: [], True: []} for _ in models]
        for turn in range(1 if settings.quick else 2):
            for model, found in zip(models, known, strict=True):
                for plugin in (False, True):
                    found[plugin].append(_started(model, plugin=plugin, quick=settings.quick))
                pair = {
                    k: found[True][-1][k] / found[False][-1][k]
                    for k in found[False][-1]
                    if "trainer" not in k
                }
                say(f"turn {turn + 1}: with over without: { ({k: round(v, 2) for k, v in pair.items()}) }")
        for model, found in zip(models, known, strict=True):
            rows.append({"weight_bytes": weight_bytes(model), **_compared(found[False], found[True])})
    small, large = rows
    more = large["weight_bytes"] - small["weight_bytes"]
    return {
        "rows": rows,
        "copies": {
            k: (large[k]["all_own"]["median"] - small[k]["all_own"]["median"]) / more
            for k in ("without", "with")
        },
        "copies_without_trainer": (large["with"]["own"]["median"] - small["with"]["own"]["median"]) / more,
    }


def _compared(without: list[Server], having: list[Server]) -> dict[str, Any]:
    """Spreads of both, and with over without, turn by turn."""
    shared = [
        k for k in without[0] if k in ("start_s", "own", "all_own", "reading") or k.startswith("streams")
    ]
    return {
        "without": {k: spread([s[k] for s in without]) for k in without[0]},
        "with": {k: spread([s[k] for s in having]) for k in having[0]},
        "ratio": {k: ratio([s[k] for s in having], [s[k] for s in without]) for k in shared},
    }
