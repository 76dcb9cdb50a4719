"""Serving while learning: what four streaming clients see without a lesson, during one, and during its undo.

A real server and its trainer, real HTTP, a closed loop (a client asks again as soon as its answer has ended).
Phases take turns: the clients alone, the clients and a lesson, the lesson alone; each lesson ends in a cancel,
which undoes it under load. At last a lesson is kept and reverted under load. Server, trainer and clients share
this machine's cores, and nothing is pinned to a core: so the ratio holds the competition for cores as well.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx2
import numpy as np
from common import PROMPTS, Settings, corrections, ratio, say, spread
from server import Server, serving

from secondnature.records import OptimizerSettings
from secondnature.wire import JobStatus, TrainRequest

NUM_CLIENTS = 4
MAX_TOKENS = 64
LESSON_LR = 1e-5
KEPT_STEPS = 20


@dataclass
class Answer:
    """One request as its client saw it; monotonic seconds."""

    sent: float
    times: list[float] = field(default_factory=list[float])
    """When each piece of text came."""
    tokens: int = 0
    last: dict[str, Any] = field(default_factory=dict[str, Any])
    """The chunk with the stamp."""
    failure: str = ""


@dataclass(frozen=True)
class Phase:
    """A stretch of time in which everything is as its name says."""

    name: str
    begun: float
    ended: float
    steps_per_s: float = 0.0


class Clients:
    """Four tasks that stream one answer after another while `going` is set."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.going = asyncio.Event()
        self.answers: list[Answer] = []
        self._busy = 0

    async def run(self, number: int) -> None:
        """One client, until cancelled."""
        count = 0
        async with httpx2.AsyncClient(base_url=self._url, timeout=120, trust_env=False) as http:
            while True:
                await self.going.wait()
                self._busy += 1
                answer = Answer(time.monotonic())
                try:
                    prompt = PROMPTS[(number * 5 + count) % len(PROMPTS)]
                    await self._stream(http, prompt, 1000 * number + count, answer)
                except (httpx2.HTTPError, ValueError, RuntimeError) as e:
                    answer.failure = repr(e)
                self._busy -= 1
                self.answers.append(answer)
                count += 1

    async def _stream(self, http: httpx2.AsyncClient, prompt: str, seed: int, answer: Answer) -> None:
        body = {
            "messages": [{"role": "user", "content": prompt}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": MAX_TOKENS,
            "seed": seed,
        }
        ended = False
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"status {response.status_code}")
            async for line in response.aiter_lines():
                if '"delta": {"content": ' in line:
                    answer.times.append(time.monotonic())
                elif '"weights_version"' in line:
                    answer.last = json.loads(line.removeprefix("data: "))
                elif '"usage"' in line:
                    answer.tokens = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
                elif '"error"' in line:
                    raise RuntimeError(line)
                ended = ended or line == "data: [DONE]"
        if not ended:
            raise RuntimeError("the stream broke off")

    async def pause(self) -> None:
        """Let the answers under way end, and ask nothing more."""
        self.going.clear()
        while self._busy:
            await asyncio.sleep(0.02)


class Course:
    """The phases, in turns; each gives its stretch of time."""

    def __init__(self, server: Server, clients: Clients, seconds: float) -> None:
        self._server, self._clients, self._seconds = server, clients, seconds
        self.rates: dict[str, list[float]] = {}
        """Continuation tokens per second of each lesson's steps, by phase."""

    async def alone(self) -> Phase:
        """The clients, no lesson."""
        self._clients.going.set()
        await asyncio.sleep(0.5)
        begun = time.monotonic()
        await asyncio.sleep(self._seconds)
        return Phase("serving", begun, time.monotonic())

    async def lesson(self, name: str, *, load: bool) -> tuple[Phase, Phase]:
        """A lesson that is cancelled after the stretch, and the stretch of its undo."""
        if load:
            self._clients.going.set()
        else:
            await self._clients.pause()
        status = await self._start(_lesson(max_steps=100_000))
        first, begun = await self._await_step(status.job)
        await asyncio.sleep(self._seconds)
        while (last := await self._status(status.job)).step <= first:  # a slow machine
            await asyncio.sleep(0.1)
        ended = time.monotonic()
        cancelled = await asyncio.to_thread(self._server.client.cancel, status.job)
        undone = time.monotonic()
        if cancelled.state != "cancelled":
            raise RuntimeError(f"the lesson is {cancelled.state}: {cancelled.error}")
        await self._note_rate(name, cancelled.lesson)
        speed = (last.step - first) / (ended - begun)
        return Phase(name, begun, ended, speed), Phase(f"cancel of {name}", ended, undone)

    async def kept_and_reverted(self) -> Phase:
        """A lesson to its end, kept, then taken back, all under load; the stretch of the revert."""
        self._clients.going.set()
        client = self._server.client
        before = await asyncio.to_thread(client.health)
        status = await self._start(_lesson(max_steps=KEPT_STEPS, keep=True))
        while (status := await self._status(status.job)).state in ("queued", "running", "on_trial"):
            await asyncio.sleep(0.1)
        if status.state != "kept":
            raise RuntimeError(f"the lesson is {status.state}: {status.error}")
        await asyncio.sleep(self._seconds / 5)
        begun = time.monotonic()
        await asyncio.to_thread(client.revert, status.lesson)
        ended = time.monotonic()
        await asyncio.sleep(self._seconds / 5)
        after = await asyncio.to_thread(client.health)
        if (after.weights_version, after.status) != (before.weights_version, "ok"):
            raise RuntimeError(f"after the revert: {after}; before the lesson: {before}")
        await self._clients.pause()
        return Phase("revert", begun, ended)

    async def _start(self, request: TrainRequest) -> JobStatus:
        reply = await asyncio.to_thread(self._server.client.train, request)
        return await self._status(reply.job)

    async def _status(self, job: str) -> JobStatus:
        return await asyncio.to_thread(self._server.client.status, job)

    async def _await_step(self, job: str) -> tuple[int, float]:
        """Wait for the second step: (steps made, when)."""
        while (status := await self._status(job)).step < 2:
            if status.state not in ("queued", "running"):
                raise RuntimeError(f"the lesson is {status.state}: {status.error}")
            await asyncio.sleep(0.05)
        return status.step, time.monotonic()

    async def _note_rate(self, name: str, lesson: str) -> None:
        detail = await asyncio.to_thread(self._server.client.lesson, lesson)
        rates = [m["tokens_per_s"] for m in detail.metrics if m.get("kind") == "step"]
        self.rates.setdefault(name, []).append(float(np.median(rates[1:])))


def _lesson(**options: Any) -> TrainRequest:
    return TrainRequest(corrections=corrections(), optimizer=OptimizerSettings(lr=LESSON_LR), **options)


async def _run(server: Server, settings: Settings) -> tuple[list[Answer], list[Phase], Course]:
    clients = Clients(server.url)
    tasks = [asyncio.create_task(clients.run(i)) for i in range(NUM_CLIENTS)]
    course = Course(server, clients, 1.5 if settings.quick else 12.0)
    phases: list[Phase] = []
    await course.alone()  # warm
    await course.lesson("warm", load=False)
    for turn in range(1 if settings.quick else 3):
        phases.append(await course.alone())
        phases += await course.lesson("learning", load=True)
        phases += await course.lesson("trainer alone", load=False)
        say(f"turn {turn + 1}: {len(clients.answers)} answers so far")
    phases.append(await course.kept_and_reverted())
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return clients.answers, phases, course


def _within(phase: Phase, moments: Iterable[tuple[float, float]]) -> list[float]:
    """Lengths of those (from, to) that lie in the phase."""
    return [b - a for a, b in moments if phase.begun <= a and b <= phase.ended]


def _touching(phase: Phase, moments: Iterable[tuple[float, float]]) -> float:
    """The longest of those (from, to) that overlap with the phase."""
    return max((b - a for a, b in moments if b >= phase.begun and a <= phase.ended), default=0.0)


def _figures(phase: Phase, answers: list[Answer]) -> dict[str, float]:
    """What the streams saw in one stretch; seconds."""
    gaps = _within(phase, [p for a in answers for p in _pairs(a.times)])
    waits = [a.times[0] - a.sent for a in answers if a.times and phase.begun <= a.times[0] <= phase.ended]
    everything = sorted(t for a in answers for t in a.times if phase.begun <= t <= phase.ended)
    silences = np.diff(np.array(everything))
    p50, p90, p99, p999 = np.percentile(gaps, [50, 90, 99, 99.9])
    return {
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "p999": p999,
        "longest": max(gaps),
        "first_token_p50": float(np.median(waits)),
        "longest_silence": float(silences.max()),
        "tokens_per_s": len(everything) / (phase.ended - phase.begun),
    }


def _pairs(times: list[float]) -> list[tuple[float, float]]:
    return list(pairwise(times))


def _summary(phases: list[Phase], answers: list[Answer]) -> dict[str, Any]:
    """Per kind of phase the spread over its turns, and learning over serving, turn by turn."""
    by_name: dict[str, list[dict[str, float]]] = {}
    for phase in phases:
        if phase.name in ("serving", "learning"):
            by_name.setdefault(phase.name, []).append(_figures(phase, answers))
    found: dict[str, Any] = {
        name: {k: spread([turn[k] for turn in turns]) for k in turns[0]} for name, turns in by_name.items()
    }
    pairs = zip(by_name["learning"], by_name["serving"], strict=True)
    both = [(a, b) for a, b in pairs]
    found["ratio"] = {k: ratio([a[k] for a, _ in both], [b[k] for _, b in both]) for k in both[0][0]}
    return found


def _undo(phases: list[Phase], answers: list[Answer], name: str) -> dict[str, Any]:
    """How long the undo took, and the longest gap of a stream that overlapped with it."""
    gaps = [p for a in answers for p in _pairs([a.sent, *a.times])]
    mine = [p for p in phases if p.name == name]
    return {
        "seconds": spread([p.ended - p.begun for p in mine]),
        "longest_gap": max(_touching(p, gaps) for p in mine),
    }


def measure(settings: Settings) -> dict[str, Any]:
    """Time per token with and without a lesson, failures, stamps, undo under load, the trainer's pace."""
    with serving(settings.model) as server:
        answers, phases, course = asyncio.run(_run(server, settings))
    good = [a for a in answers if not a.failure]
    stamps = [a.last for a in good if "weights_version" in a.last]
    pace = {n: [p.steps_per_s for p in phases if p.name == n] for n in ("learning", "trainer alone")}
    return {
        "clients": NUM_CLIENTS,
        "max_tokens": MAX_TOKENS,
        "turns": len(pace["learning"]),
        "seconds_per_phase": phases[0].ended - phases[0].begun,
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "failures": sorted({a.failure for a in answers if a.failure})[:5],
        "stamped": len(stamps),
        "on_trial": sum(bool(s["trial"]) for s in stamps),
        "changed": sum(bool(s["weights_span"]["changed"]) for s in stamps),
        "versions": len({s["weights_version"] for s in stamps}),
        "tokens": sum(a.tokens for a in good),
        "phases": _summary(phases, good),
        "cancel": _undo(phases, good, "cancel of learning"),
        "revert": _undo(phases, good, "revert"),
        "trainer": {
            "steps_per_s": {k: spread(v) for k, v in pace.items()},
            "tokens_per_s": {k: spread(v) for k, v in course.rates.items() if k != "warm"},
            "ratio": ratio(pace["learning"], pace["trainer alone"]),
        },
    }
