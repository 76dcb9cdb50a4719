# pyright: reportMissingImports=false
"""What a write into vLLM's weights moves, and when the next token shows it.

Three things, each read from the outside. Who does what while a lesson trains and nobody asks: a process that
was never woken received nothing; what trainer and server say to one another is encoded again from the log of
the lesson. Where the weights are: every process's mapping of the arena as the kernel counts it, and its private
memory searched for the updated weights, at random places of them. And the time from a write to the first token
that shows it, in an engine whose arena this program maps as the trainer does: 100 times a norm that the forward
reads last, and a norm that it reads first, so that the forward under way cannot show it.

    python benchmarks/vllm_write.py DIR COUNT     # the last part alone, as a process of its own
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Settings, say, spread
from vllm_process import Vllm, open_arena, vllm
from vllm_serving import await_step, lesson

from secondnature import wire
from secondnature.weights.arena import HEADER_BYTES

PLACES = 2000
"""Of the weights, looked for in private memory."""
RESULT = "measured: "
WORDS = 8
"""8-byte words that must agree at a place."""
CHUNK_BYTES = 1 << 26
KEPT_STEPS = 5
QUIET_S = 2.0
"""After its last request a worker of vLLM goes on spinning for a second."""
STREAM_TOKENS = 40
BEFORE, AFTER = 6, 12
"""Tokens of a stream before the write, at least, and after it."""

# --------------------------------------------------------------------------------- who does what


def _activity(pid: int) -> dict[str, float]:
    """How often its threads were switched to, bytes of its reads and writes, and its CPU time."""
    switches = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if "ctxt_switches" in line:
                switches += int(line.split()[1])
    said = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    times = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return {
        "switches": switches,
        "bytes": int(said["rchar"]) + int(said["wchar"]),
        "cpu_s": (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
    }


def _during(server: Vllm, seconds: float) -> dict[str, dict[str, float]]:
    """By role, what happened in a stretch in which this program asks nothing."""
    processes = server.processes()
    before = {role: _activity(pid) for role, pid in processes.items()}
    time.sleep(seconds)
    after = {role: _activity(pid) for role, pid in processes.items()}
    return {role: {k: after[role][k] - before[role][k] for k in after[role]} for role in processes}


def _updates(server: Vllm, seconds: float) -> dict[str, Any]:
    """Idle, and the same stretch of a lesson: what every process did, and what was said per update."""
    with open_arena(server.processes()["worker"]) as memory:

        def writes() -> int:
            return int(np.frombuffer(memory[:HEADER_BYTES], np.uint64)[2])

        time.sleep(QUIET_S)
        idle = _during(server, seconds)
        job = server.client.train(lesson(max_steps=100_000)).job
        await_step(server, job, 2)
        time.sleep(QUIET_S)
        first = writes()
        learning = _during(server, seconds)
        count = writes() - first
    cancelled = server.client.cancel(job)
    said = [
        len(wire.encode(wire.Progress(job, metric)))
        for metric in server.client.lesson(cancelled.lesson).metrics
        if metric.get("kind") == "step"
    ]
    return {
        "seconds": seconds,
        "updates": count,
        "idle": idle,
        "learning": learning,
        "said_bytes": spread(said),
    }


# --------------------------------------------------------------------------------- where the weights are


class _Places:
    """Random places of some weights, to be recognised by their bytes wherever they are."""

    def __init__(self, weights: np.ndarray) -> None:
        """`weights`: the bytes, as 8-byte words."""
        source = np.random.default_rng(0)
        starts = np.unique(source.integers(0, len(weights) // WORDS - 1, 4 * PLACES) * WORDS)
        rows = weights[starts[:, None] + np.arange(WORDS)]
        varied = np.array([len(np.unique(row)) == WORDS for row in rows])  # looks like nothing else
        chosen = source.permutation(np.flatnonzero(varied))[:PLACES]
        self._rows = rows[chosen][np.argsort(rows[chosen, 0])]
        self._first = np.ascontiguousarray(self._rows[:, 0])
        self._maybe = np.zeros(1 << 16, bool)
        self._maybe[self._first & np.uint64(0xFFFF)] = True

    def __len__(self) -> int:
        return len(self._rows)

    def found_in(self, memory: np.ndarray) -> int:
        """At how many spots of the memory (8-byte words) one of them begins."""
        spots = np.flatnonzero(self._maybe[memory & np.uint64(0xFFFF)])
        nearest = np.searchsorted(self._first, memory[spots]).clip(max=len(self) - 1)
        found = 0
        for spot in spots[self._first[nearest] == memory[spots]]:
            low, high = (np.searchsorted(self._first, memory[spot], side) for side in ("left", "right"))
            found += any(np.array_equal(memory[spot : spot + WORDS], self._rows[i]) for i in range(low, high))
        return found


def _private_memory(pid: int) -> list[tuple[int, int]]:
    """(start, end) of the stretches of a process's memory that are its own and in use."""
    found: list[tuple[int, int]] = []
    stretch: tuple[int, int] | None = None
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head = re.match(r"^([0-9a-f]+)-([0-9a-f]+) (\S+)", line)
        if head:
            stretch = (int(head[1], 16), int(head[2], 16)) if head[3][0] == "r" else None
        elif stretch and line.startswith("Private_Dirty:") and int(line.split()[1]):
            found.append(stretch)
    return found


def _search(pid: int, kinds: dict[str, _Places]) -> dict[str, int]:
    """Bytes searched of a process's private memory, and the spots at which places of each kind were found."""
    found = {"searched": 0, **dict.fromkeys(kinds, 0)}
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for start, end in _private_memory(pid):
            for begin in range(start, end, CHUNK_BYTES):
                try:
                    memory.seek(begin)
                    data = memory.read(min(CHUNK_BYTES + 8 * WORDS, end - begin))
                except (OSError, ValueError, OverflowError):  # the kernel's own pages
                    continue
                words = np.frombuffer(data[: len(data) // 8 * 8], np.uint64)
                found["searched"] += min(len(data), CHUNK_BYTES)
                for kind, places in kinds.items():
                    found[kind] += places.found_in(words)
    return found


def _as_float32(words: np.ndarray) -> np.ndarray:
    """bf16 numbers, in 8-byte words, as the float32 numbers that they are."""
    return (words.view(np.uint16).astype(np.uint32) << 16).view(np.uint64)


def _where(server: Vllm) -> dict[str, Any]:
    """The mapping of each process, and what a search of its private memory for the weights of now gives."""
    processes = server.processes()
    with open_arena(processes["worker"]) as memory:
        weights = np.frombuffer(memory[HEADER_BYTES:], np.uint64).copy()
    kinds = {"bf16": _Places(weights), "float32": _Places(_as_float32(weights))}
    return {
        "weight_bytes": weights.nbytes,
        "places": len(kinds["bf16"]),
        "found_in_the_arena": kinds["bf16"].found_in(weights),
        "mappings": server.mappings(),
        "private": {role: _search(pid, kinds) for role, pid in processes.items()},
    }


def _copies(server: Vllm) -> dict[str, Any]:
    """Before the first lesson, in the midst of a step (the trainer is stopped there), and after a kept lesson."""
    found = {"at_start": _where(server)}
    job = server.client.train(lesson(max_steps=100_000)).job
    await_step(server, job, 3)
    trainer = server.processes()["trainer"]
    os.kill(trainer, signal.SIGSTOP)
    try:
        found["in_a_step"] = _where(server)
    finally:
        os.kill(trainer, signal.SIGCONT)
    server.client.cancel(job)
    job = server.client.train(lesson(max_steps=KEPT_STEPS, keep=True)).job
    while (status := server.client.status(job)).state in ("queued", "running", "on_trial"):
        time.sleep(0.1)
    if status.state != "kept":
        raise RuntimeError(f"the lesson is {status.state}: {status.error}")
    found["after_a_lesson"] = _where(server)
    for when, at in found.items():
        say(
            f"{when}: { ({r: (p['bf16'], p['float32']) for r, p in at['private'].items()}) } of {at['places']}"
        )
    return found


# --------------------------------------------------------------------------------- a write, and its token


@dataclass
class _Stream:
    """One request of a fixed token again and again: (when it came, its log-probability)."""

    tokens: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])

    def step_s(self) -> float:
        """The time of one token here."""
        return float(np.median(np.diff([t for t, _ in self.tokens])))


class _Engine:
    """vLLM in this process's children; tokens come one by one, each with its log-probability."""

    def __init__(self, model: Path) -> None:
        from vllm import LLM

        from secondnature.engines.vllm.share import attach

        llm = LLM(str(model), enforce_eager=True, max_model_len=2048, disable_log_stats=True)
        self.engine: Any = llm.llm_engine
        self.shared = attach(self.engine.collective_rpc("secondnature_manifest")[0])
        self._count = 0
        self._keep = llm

    def stream(self, num_tokens: int, each: Any = None) -> _Stream:
        """Greedy, but only one token is allowed: the context is the same whatever the weights are."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._count += 1
        params = SamplingParams(
            max_tokens=num_tokens,
            temperature=0.0,
            logprobs=0,
            ignore_eos=True,
            allowed_token_ids=[40],
            output_kind=RequestOutputKind.DELTA,
        )
        self.engine.add_request(f"stream-{self._count}", {"prompt_token_ids": list(range(20, 36))}, params)
        found = _Stream()
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                now = time.monotonic()
                answer = output.outputs[0]
                for token, at in zip(answer.token_ids, answer.logprobs, strict=True):
                    found.tokens.append((now, at[token].logprob))
                    if each is not None:
                        each(len(found.tokens))
        return found


class _Writer:
    """Writes from a thread of its own, at a random moment within a token's time."""

    def __init__(self, engine: _Engine, name: str) -> None:
        self._arena = engine.shared.arena
        self._name = name
        self.before = self._arena.tensors[name].clone()
        self.after = self.before + 0.5
        self.written: list[float] = []
        self._threads: list[threading.Thread] = []

    def write(self, *, changed: bool, wait_s: float = 0.0) -> None:
        """Now, or on a thread that waits first."""

        def work() -> None:
            time.sleep(wait_s)
            self._arena.write({self._name: self.after if changed else self.before})
            self.written.append(time.monotonic())

        if wait_s:
            self._threads.append(threading.Thread(target=work))
            self._threads[-1].start()
        else:
            work()

    def join(self) -> None:
        """Wait for what was begun."""
        for thread in self._threads:
            thread.join()


def _shows(
    stream: _Stream, written: float, until: float, old: list[float], new: list[float] | None
) -> tuple[float, int]:
    """(seconds from the write to the first token that shows it, tokens in between that do not)."""
    late = 0
    for i, (at, logprob) in enumerate(stream.tokens):
        if not written < at <= until:
            continue
        if logprob != old[i] and (new is None or logprob == new[i]):
            return at - written, late
        late += 1
    raise RuntimeError("a write was never seen")


def _last_read(engine: _Engine, name: str, count: int) -> dict[str, Any]:
    """The norm before the head: it leaves no trace in the cache, so that one stream sees change and restore."""
    writer = _Writer(engine, name)
    every = AFTER
    length = every * (count + 2)
    old = [p for _, p in engine.stream(length).tokens]
    writer.write(changed=True)
    new = [p for _, p in engine.stream(length).tokens]
    writer.write(changed=False)
    if any(a == b for a, b in zip(old, new, strict=True)):
        raise RuntimeError("the change does not show in every token")
    source = random.Random(0)
    step_s = engine.stream(STREAM_TOKENS).step_s()
    writer.written.clear()

    def each(token: int) -> None:
        if token % every == 0 and token // every <= count:
            writer.write(changed=token // every % 2 == 1, wait_s=source.uniform(0.1, 1.1) * step_s)

    stream = engine.stream(length, each)
    writer.join()
    writer.write(changed=False)
    found: list[tuple[float, int]] = []
    moments = [*writer.written[:count], float("inf")]
    for i in range(count):
        values = (old, new) if i % 2 == 0 else (new, old)
        found.append(_shows(stream, moments[i], moments[i + 1], *values))
    return _told(found, stream.step_s())


def _first_read(engine: _Engine, name: str, count: int) -> dict[str, Any]:
    """The norm of the first layer, in streams of their own: the forward under way has read it already."""
    writer = _Writer(engine, name)
    old = [p for _, p in engine.stream(STREAM_TOKENS).tokens]
    if [p for _, p in engine.stream(STREAM_TOKENS).tokens] != old:
        raise RuntimeError("the same request gives other numbers")
    source = random.Random(1)
    step_s = engine.stream(STREAM_TOKENS).step_s()
    found: list[tuple[float, int]] = []
    times: list[float] = []
    for _ in range(count):
        writer.written.clear()
        at = source.randint(BEFORE, STREAM_TOKENS - AFTER)

        def each(token: int, at: int = at) -> None:
            if token == at:
                writer.write(changed=True, wait_s=source.uniform(0.1, 1.1) * step_s)

        stream = engine.stream(STREAM_TOKENS, each)
        writer.join()
        found.append(_shows(stream, writer.written[0], float("inf"), old, None))
        times.append(stream.step_s())
        writer.write(changed=False)
    if [p for _, p in engine.stream(STREAM_TOKENS).tokens] != old:
        raise RuntimeError("after the last restore the numbers are not those of before")
    return _told(found, float(np.median(times)))


def _told(found: list[tuple[float, int]], step_s: float) -> dict[str, Any]:
    seconds = [s for s, _ in found]
    late = [n for _, n in found]
    return {
        "writes": len(found),
        "token_s": step_s,
        "seconds": spread(seconds),
        "tokens": spread([s / step_s for s in seconds]),
        "late": {str(n): late.count(n) for n in sorted(set(late))},
    }


def visible(model: Path, count: int) -> dict[str, Any]:
    """Both kinds of write, in an engine that this process starts."""
    torch.set_num_threads(1)
    engine = _Engine(model)
    names = list(engine.shared.arena.tensors)
    first = next(n for n in names if n.endswith("layers.0.input_layernorm.weight"))
    last = next(n for n in names if n.endswith("model.norm.weight"))
    engine.stream(STREAM_TOKENS)  # warm
    return {
        "read_last": _last_read(engine, last, count),
        "read_first": _first_read(engine, first, count),
    }


def _visible_apart(model: Path, count: int) -> dict[str, Any]:
    ours = ("VLLM_", "OMP_", "MKL_", "SECONDNATURE_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environment |= {"VLLM_PLUGINS": "secondnature", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, str(model), str(count)]
    done = subprocess.run(
        command,
        env=environment | {"VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the engine failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    (found,) = re.findall(rf"^{RESULT}(.*)$", done.stdout, re.M)
    return json.loads(found)


def measure(settings: Settings) -> dict[str, Any]:
    """What an update moves, where the weights are after a kept lesson, and when a write is seen."""
    with vllm(settings.model) as server:
        server.await_trainer()
        updates = _updates(server, 3.0 if settings.quick else 15.0)
        say(f"{updates['updates']} updates")
        copies = _copies(server)
    seen = _visible_apart(settings.model, 10 if settings.quick else 100)
    return {**updates, "copies": copies, "visible": seen}


if __name__ == "__main__":
    print(RESULT + json.dumps(visible(Path(sys.argv[1]), int(sys.argv[2]))))
