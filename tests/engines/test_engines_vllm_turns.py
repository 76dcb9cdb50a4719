"""Probes inside vLLM wait for their turn without a core: on a plain loop, with a made-up far side."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from secondnature.engines.base import GenerationHandle
from secondnature.engines.generation import GenerationRequest
from secondnature.engines.stamps import Clock
from secondnature.engines.vllm.client import AT_ONCE, AT_ONCE_UNDER_LOAD, VllmEngine
from secondnature.errors import ContextOverflow, Unreachable
from secondnature.weights.arena import Arena

NUM_PROBES = 4 * AT_ONCE


@dataclass
class FarSide:
    """vLLM's client: answers a request when the test lets it."""

    asked: list[int] = field(default_factory=list[int])
    """First token of each prompt that came in."""
    inside: int = 0
    most: int = 0
    gates: list[asyncio.Future[None]] = field(default_factory=list[Any])

    async def generate(self, prompt: Any, params: Any, **_: Any) -> AsyncIterator[Any]:
        self.asked.append(prompt["prompt_token_ids"][0])
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.gates.append(asyncio.get_running_loop().create_future())
        try:
            await self.gates[-1]
            said = SimpleNamespace(text="x", token_ids=[1], finish_reason="stop", stop_reason=None)
            yield SimpleNamespace(outputs=[said], prompt_logprobs=None)
        finally:
            self.inside -= 1

    def open(self, number: int) -> None:
        """Let so many of those inside come to their end."""
        shut = [gate for gate in self.gates if not gate.done()]
        for gate in shut[:number]:
            gate.set_result(None)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> FarSide:
    vllm, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vllm.__dict__["SamplingParams"] = lambda **given: given
    params.__dict__["RequestOutputKind"] = SimpleNamespace(FINAL_ONLY=1)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    return FarSide()


@pytest.fixture(scope="module")
def arena() -> Arena:
    return Arena.create({"a": torch.zeros(4, dtype=torch.bfloat16)})


async def settled() -> None:
    """Every callback that is due has run."""
    for _ in range(20):
        await asyncio.sleep(0)


def play(
    far: FarSide, arena: Arena, scene: Callable[[VllmEngine, list[int]], Coroutine[Any, Any, None]]
) -> None:
    async def run() -> None:
        load = [0]
        loop = asyncio.get_running_loop()
        engine = VllmEngine(
            far,
            loop,
            Clock(arena, "w0"),
            vocab_size=1000,
            max_context=50,
            load=lambda: load[0],
            priorities=False,
        )
        await asyncio.wait_for(scene(engine, load), 60)

    asyncio.run(run())


def submit(engine: VllmEngine, number: int) -> GenerationHandle:
    return engine.submit(GenerationRequest([number], max_tokens=1, temperature=0.0))


def test_who_waits_is_let_in_in_order_and_nothing_is_looked_at_meanwhile(far: FarSide, arena: Arena) -> None:
    async def scene(engine: VllmEngine, load: list[int]) -> None:
        timers: list[Any] = asyncio.get_running_loop()._scheduled  # pyright: ignore[reportAttributeAccessIssue]
        before = list(timers)
        handles = [submit(engine, i) for i in range(NUM_PROBES)]
        await settled()
        assert far.inside == AT_ONCE
        assert timers == before  # nobody asked to be woken
        far.open(10)
        await settled()
        assert (far.inside, len(far.asked)) == (AT_ONCE, AT_ONCE + 10)
        while not all(h.done for h in handles):
            far.open(NUM_PROBES)
            await settled()
        assert [h.result(0).finish_reason for h in handles] == ["stop"] * NUM_PROBES

    play(far, arena, scene)
    assert far.asked == list(range(NUM_PROBES))
    assert far.most == AT_ONCE


def test_users_come_first_and_when_they_are_gone_the_rest_is_let_in(far: FarSide, arena: Arena) -> None:
    async def scene(engine: VllmEngine, load: list[int]) -> None:
        load[0] = 3
        engine.load_changed()
        handles = [submit(engine, i) for i in range(NUM_PROBES)]
        await settled()
        assert far.inside == AT_ONCE_UNDER_LOAD
        load[0] = 0
        await settled()
        assert far.inside == AT_ONCE_UNDER_LOAD  # nobody looks; the door tells
        engine.load_changed()
        await settled()
        assert far.inside == AT_ONCE
        for handle in handles:
            handle.cancel()
        await settled()
        assert far.inside == 0
        assert [h.result(0).finish_reason for h in handles] == ["cancelled"] * NUM_PROBES
        submit(engine, 7)  # no turn was lost
        await settled()
        assert (far.inside, far.asked[-1]) == (1, 7)
        far.open(NUM_PROBES)
        await settled()
        assert far.inside == 0

    play(far, arena, scene)


def test_one_that_is_cancelled_before_its_first_step_ends_too(far: FarSide, arena: Arena) -> None:
    async def scene(engine: VllmEngine, load: list[int]) -> None:
        handles = [submit(engine, i) for i in range(10)]
        for handle in handles:
            handle.cancel()
        await settled()
        assert [h.result(0).finish_reason for h in handles] == ["cancelled"] * 10
        assert far.asked == []

    play(far, arena, scene)


def test_the_loops_end_is_an_error_of_those_under_way(far: FarSide, arena: Arena) -> None:
    """Whoever waits for an answer gets one, and it does not look like an answer."""
    handles: list[GenerationHandle] = []
    engines: list[VllmEngine] = []

    async def scene(engine: VllmEngine, load: list[int]) -> None:
        engines.append(engine)
        handles.extend(submit(engine, i) for i in range(AT_ONCE + 5))
        await settled()

    play(far, arena, scene)
    for handle in handles:
        with pytest.raises(Unreachable, match="shutting down"):
            handle.result(0)
    with pytest.raises(Unreachable):
        submit(engines[0], 1)


def test_what_is_asked_for_from_another_thread_is_answered_there(far: FarSide, arena: Arena) -> None:
    async def scene(engine: VllmEngine, load: list[int]) -> None:
        with pytest.raises(ContextOverflow):
            engine.submit(GenerationRequest([1] * 50, max_tokens=1))
        assert (engine.limits.context, engine.limits.rows) == (50, AT_ONCE)
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(submit(engine, 1).result(30).text))
        thread.start()
        while thread.is_alive():
            far.open(1)
            await asyncio.sleep(0.001)
        assert found == ["x"]

    play(far, arena, scene)
