"""Clients that stream from vLLM on a thread of their own, token by token, and what they saw (client side).

A closed loop: each asks again as soon as its answer has ended. No request has a seed: where a prompt is read in
parts, vLLM 0.32 ends on CPUs at the first one that has ("CPU Generator does not use offset"). vLLM is asked for
log-probabilities, so that a number that is not finite would be seen, and for token ids, so that tokens are
counted and not pieces of text.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx2
import numpy as np
from common import PROMPTS, ratio, spread
from vllm_process import NAME, Vllm

Moment = tuple[float, float]
"""From, to; monotonic seconds."""


@dataclass
class Answer:
    """One request as its client saw it; monotonic seconds."""

    sent: float
    times: list[float] = field(default_factory=list[float])
    """When each token came."""
    stamp: dict[str, Any] = field(default_factory=dict[str, Any])
    not_finite: int = 0
    """Log-probabilities that are no finite number."""
    failure: str = ""


@dataclass(frozen=True)
class Phase:
    """A stretch of time in which everything is as its name says."""

    name: str
    begun: float
    ended: float


class Streams:
    """`count` clients; they ask while `go` was called last, and rest after `rest`."""

    def __init__(self, url: str, count: int, *, max_tokens: int, ignore_eos: bool = False) -> None:
        self._url = url
        self._count = count
        self._body = {
            "model": NAME,
            "max_tokens": max_tokens,
            "ignore_eos": ignore_eos,
            "stream": True,
            "logprobs": True,
            "return_token_ids": True,
        }
        self.answers: list[Answer] = []
        """Those that have ended."""
        self._open: dict[int, Answer] = {}
        self._going = False
        self._ended = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), daemon=True)
        self._thread.start()

    def go(self) -> None:
        """Ask."""
        self._going = True

    def rest(self) -> None:
        """Let the answers under way end, and ask nothing more."""
        self._going = False
        time.sleep(0.1)
        while self._open:
            time.sleep(0.02)

    def seen(self) -> list[Answer]:
        """All answers, also those under way."""
        return [*self.answers, *self._open.values()]

    def stop(self, *, cut: bool) -> None:
        """Ask no more, for good; `cut`: the answers under way are left."""
        if not cut:
            self.rest()
        self._ended = True
        self._thread.join(60)

    async def _live(self) -> None:
        tasks = [asyncio.create_task(self._client(i)) for i in range(self._count)]
        while not self._ended:
            await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _client(self, number: int) -> None:
        count = 0
        async with httpx2.AsyncClient(base_url=self._url, timeout=300, trust_env=False) as http:
            while not self._ended:
                if not self._going:
                    await asyncio.sleep(0.02)
                    continue
                answer = self._open[number] = Answer(time.monotonic())
                prompt = PROMPTS[(number * 5 + count) % len(PROMPTS)]
                try:
                    await self._stream(http, prompt, answer)
                except (httpx2.HTTPError, ValueError, KeyError, RuntimeError) as e:
                    answer.failure = repr(e)
                    await asyncio.sleep(0.05)
                self.answers.append(answer)
                del self._open[number]
                count += 1

    async def _stream(self, http: httpx2.AsyncClient, prompt: str, answer: Answer) -> None:
        body = {**self._body, "messages": [{"role": "user", "content": prompt}]}
        ended = False
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"status {response.status_code}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    ended = ended or line == "data: [DONE]"
                    continue
                now = time.monotonic()
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise RuntimeError(line)
                if "weights_version" in chunk:
                    answer.stamp = {k: chunk[k] for k in ("weights_version", "trial", "weights_span")}
                choice = chunk["choices"][0]
                answer.times += [now] * len(choice.get("token_ids") or [])
                for token in (choice.get("logprobs") or {}).get("content") or []:
                    logprob = token["logprob"]
                    answer.not_finite += logprob is None or not math.isfinite(logprob)
        if not ended:
            raise RuntimeError("the stream broke off")


@contextmanager
def streams(server: Vllm, count: int, *, max_tokens: int, ignore_eos: bool = False) -> Generator[Streams]:
    """Clients of this server, asking, until the end of the `with` block."""
    made = Streams(server.url, count, max_tokens=max_tokens, ignore_eos=ignore_eos)
    made.go()
    try:
        yield made
    finally:
        made.stop(cut=ignore_eos)


def gaps(answers: Iterable[Answer]) -> list[Moment]:
    """From each token to the next one of the same stream."""
    return [pair for a in answers for pair in pairwise(a.times)]


def within(phase: Phase, moments: Iterable[Moment]) -> list[float]:
    """Lengths of those that lie in the phase."""
    return [b - a for a, b in moments if phase.begun <= a and b <= phase.ended]


def touching(phase: Phase, moments: Iterable[Moment]) -> float:
    """The longest of those that overlap with the phase."""
    return max((b - a for a, b in moments if b >= phase.begun and a <= phase.ended), default=0.0)


def figures(phases: Sequence[Phase], answers: Sequence[Answer]) -> dict[str, float]:
    """What the streams saw in some stretches together; seconds."""
    lengths = [x for phase in phases for x in within(phase, gaps(answers))]
    waits = [
        a.times[0] - a.sent for a in answers for p in phases if a.times and p.begun <= a.times[0] <= p.ended
    ]
    count = sum(p.begun <= t <= p.ended for a in answers for t in a.times for p in phases)
    p50, p99, p999 = np.percentile(lengths, [50, 99, 99.9])
    return {
        "p50": float(p50),
        "p99": float(p99),
        "p999": float(p999),
        "longest": max(lengths),
        "first_token_p50": float(np.median(waits)) if waits else 0.0,
        "tokens_per_s": count / sum(p.ended - p.begun for p in phases),
    }


def compared(turns: Sequence[dict[str, dict[str, float]]], peer: str) -> dict[str, Any]:
    """Per kind of phase the spread over the turns, and all over the peer's, turn by turn."""
    kinds = list(turns[0])
    found: dict[str, Any] = {
        kind: {k: spread([turn[kind][k] for turn in turns]) for k in turns[0][kind]} for kind in kinds
    }
    found["ratio"] = {
        kind: {k: ratio([t[kind][k] for t in turns], [t[peer][k] for t in turns]) for k in turns[0][kind]}
        for kind in kinds
        if kind != peer
    }
    return found


def timeline(answers: Sequence[Answer], begun: float, ended: float, bin_s: float) -> list[list[float]]:
    """Per stretch of `bin_s`: [middle in seconds since `begun`, p50, p99 of the gaps that end in it]; seconds."""
    rows: list[list[float]] = []
    known = [(b, b - a) for a, b in gaps(answers)]
    for i in range(int((ended - begun) / bin_s)):
        start = begun + i * bin_s
        lengths = [length for at, length in known if start <= at < start + bin_s]
        if lengths:
            rows.append([(i + 0.5) * bin_s, *(float(x) for x in np.percentile(lengths, [50, 99]))])
    return rows
