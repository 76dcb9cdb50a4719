"""The life of requests: cancelling, refusals, failures, priorities, stamps, closing."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_models import END, byte_tokenizer, generate_alone, make_model, prompts, speaking_model

from secondnature.engines.generation import Delta, Finished, GenerationRequest, Stamp, score_request
from secondnature.engines.local.engine import Engine, Unchanging
from secondnature.errors import (
    BadExample,
    BadInput,
    Busy,
    Cancelled,
    ContextOverflow,
    SecondnatureError,
    Unreachable,
    WeightsError,
)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return make_model("hybrid", positions=2048)


class Turns:
    """Called after every turn of the engine, in its thread: counts, and does what a test asks at a turn."""

    def __init__(self) -> None:
        self.count = 0
        self.rows: list[int] = []
        self.acts: dict[int, Any] = {}
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, engine: Engine) -> None:
        self.gate.wait(60)
        self.count += 1
        self.rows.append(engine.metrics.running)
        act = self.acts.pop(self.count, None)
        if act is not None:
            act()


class Clock:
    """Weights that change when a test says so."""

    def __init__(self) -> None:
        self.stamp = Stamp(4, False, "w-one", False)

    def read(self) -> Stamp:
        return self.stamp

    def change(self, **fields: Any) -> None:
        self.stamp = replace(self.stamp, **fields)


def greedy(prompt: list[int], num: int, **fields: Any) -> GenerationRequest:
    return GenerationRequest(prompt, max_tokens=num, temperature=0.0, ignore_eos=True, **fields)


def test_refusals_say_found_expected_and_what_to_do(model: Any) -> None:
    with Engine(model, byte_tokenizer(), max_context=50) as engine:
        with pytest.raises(
            ContextOverflow,
            match=r"maximum context length is 50 tokens; .* prompt of 40 and an answer of 11: 51 tokens",
        ):
            engine.submit(greedy([1] * 40, 11))
        with pytest.raises(ContextOverflow, match=r"found a prompt of 50"):
            engine.submit(GenerationRequest([1] * 50))
        with pytest.raises(BadExample, match=r"token id 260 is outside the vocabulary; expected 0 to 259"):
            engine.submit(greedy([3, 260], 1))
        with pytest.raises(BadExample, match="token id -1"):
            engine.submit(greedy([-1], 1))
        with pytest.raises(BadExample, match="no tokens"):
            engine.submit(greedy([], 1))
        with pytest.raises(BadInput, match="score_from"):
            engine.submit(GenerationRequest([1, 2], score_from=0))
        with pytest.raises(BadExample, match="context has no tokens"):
            engine.score([([], [1])])
        # the limits themselves are served
        assert engine.generate([greedy([1] * 40, 10)])[0].num_completion_tokens == 10
        assert len(engine.generate([score_request([1] * 49, [2])])[0].prompt_tokens) == 1
        assert engine.generate([GenerationRequest([1] * 45, ignore_eos=True)])[0].num_completion_tokens == 5


def test_cancel_frees_the_row_and_leaves_the_others_alone(model: Any) -> None:
    turns = Turns()
    texts = prompts(6, 9, 12)
    with Engine(model, byte_tokenizer(), on_step=[turns]) as engine:
        turns.gate.clear()
        handles = [engine.submit(greedy(p, 40)) for p in texts]
        turns.acts[10] = handles[1].cancel
        turns.gate.set()
        results = [h.result(60) for h in handles]
        assert max(turns.rows) == 3
        assert turns.rows[10] == 2
    assert results[1].finish_reason == "cancelled"
    assert isinstance(results[1].error, Cancelled)
    assert 5 <= results[1].num_completion_tokens <= 11
    assert results[1].token_ids == generate_alone(model, texts[1], 40)[: len(results[1].token_ids)]
    for i in (0, 2):
        assert results[i].token_ids == generate_alone(model, texts[i], 40)
    assert engine.metrics.requests == {"stop": 0, "length": 2, "cancelled": 1, "error": 0}


def test_cancel_while_waiting_or_while_the_prompt_is_read(model: Any) -> None:
    turns = Turns()
    with Engine(model, byte_tokenizer(), max_rows=1, prefill_tokens=8, on_step=[turns]) as engine:
        turns.gate.clear()
        reading = engine.submit(greedy([1] * 400, 5))
        waiting = engine.submit(greedy([2] * 4, 5))
        turns.acts[3] = lambda: (reading.cancel(), waiting.cancel())
        turns.gate.set()
        assert [reading.result(60).finish_reason, waiting.result(60).finish_reason] == ["cancelled"] * 2
        assert waiting.result().weights is None
        assert engine.generate([greedy([2] * 4, 5)])[0].token_ids == generate_alone(model, [2] * 4, 5)


def test_nan_weights_fail_the_requests_and_nothing_else() -> None:
    model, turns = make_model("hybrid"), Turns()
    weight = model.model.layers[1].mlp.down_proj.weight
    good = weight.clone()
    texts = prompts(6, 300)
    with Engine(model, byte_tokenizer(), on_step=[turns]) as engine:
        turns.gate.clear()
        struck = [engine.submit(greedy(p, 40)) for p in texts]
        turns.acts[8] = lambda: weight.data.fill_(float("nan"))
        turns.gate.set()
        for handle in struck:
            with pytest.raises(WeightsError, match="NaN or infinite"):
                handle.result(60)
        with pytest.raises(WeightsError):
            engine.score([([1, 2], [3])])
        weight.data.copy_(good)
        for prompt, result in zip(texts, engine.generate([greedy(p, 12) for p in texts]), strict=True):
            assert result.token_ids == generate_alone(model, prompt, 12)
    assert engine.metrics.requests["error"] == 3


def test_one_bad_row_does_not_hurt_the_others() -> None:
    model = make_model("qwen3")
    model.get_input_embeddings().weight.data[7] = float("nan")  # only prompts with this token are struck
    texts = [[1, 2, 3, 4], [1, 7, 3], [5, 6]]
    with Engine(model, byte_tokenizer()) as engine:
        handles = [engine.submit(greedy(p, 3)) for p in texts]
        with pytest.raises(WeightsError):
            handles[1].result(60)
        for i in (0, 2):
            ids = [*texts[i], *handles[i].result(60).token_ids]
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            assert ids[len(texts[i]) :] == logits[len(texts[i]) - 1 : -1].argmax(-1).tolist()


def test_an_exception_in_a_forward_fails_its_requests_and_the_engine_goes_on(model: Any) -> None:
    turns, broken = Turns(), [False]

    def strike(*_: Any) -> None:
        if broken[0]:
            raise RuntimeError("out of luck")

    hook = model.register_forward_pre_hook(strike)
    try:
        with Engine(model, byte_tokenizer(), on_step=[turns]) as engine:
            turns.gate.clear()
            handles = [engine.submit(greedy(p, 30)) for p in prompts(4, 5)]
            turns.acts[6] = lambda: broken.__setitem__(0, True)
            turns.gate.set()
            for handle in handles:
                with pytest.raises(SecondnatureError, match="generation failed: RuntimeError: out of luck"):
                    handle.result(60)
            with pytest.raises(SecondnatureError, match="out of luck"):
                engine.generate([greedy([1], 2)])
            broken[0] = False
            assert engine.generate([greedy([1, 2], 9)])[0].token_ids == generate_alone(model, [1, 2], 9)
    finally:
        hook.remove()


def test_a_full_queue_is_refused_and_users_are_not_hit_by_probes(model: Any) -> None:
    turns = Turns()
    with Engine(model, byte_tokenizer(), max_rows=2, max_waiting=3, on_step=[turns]) as engine:
        first = engine.submit(greedy([1], 500))
        while turns.count < 2:
            time.sleep(0.001)
        turns.gate.clear()
        probes = [engine.submit(greedy([2], 2, background=True)) for _ in range(3)]
        with pytest.raises(Busy, match="3 requests are waiting; at most 3 may"):
            engine.submit(greedy([2], 2, background=True))
        user = engine.submit(greedy([3], 2))
        turns.gate.set()
        first.cancel()
        for handle in (*probes, user):
            assert handle.result(60).finish_reason == "length"
        assert engine.metrics.refused == 1


def test_users_go_first_and_keep_reserved_rows(model: Any) -> None:
    turns, order = Turns(), list[str]()
    with Engine(model, byte_tokenizer(), max_rows=4, reserved_rows=1, on_step=[turns]) as engine:
        turns.gate.clear()
        engine.submit(greedy([9], 2))
        probes = [engine.submit(greedy([i], 60, background=True)) for i in range(6)]
        users = [engine.submit(greedy([50 + i], 20)) for i in range(2)]
        late = list[Any]()

        def note(handle: Any, name: str) -> None:
            handle.subscribe(lambda e: order.append(name) if isinstance(e, Finished) else None)

        def come_late() -> None:
            late.append(engine.submit(greedy([60], 3)))
            note(late[0], "late")

        for name, handles in (("probe", probes), ("user", users)):
            for handle in handles:
                note(handle, name)
        turns.acts[40] = come_late  # the probes hold every row that they may
        turns.gate.set()
        for handle in (*probes, *users, *late):
            handle.result(60)
    assert order == ["user", "user", "late"] + ["probe"] * 6
    assert turns.rows[38] == 3
    assert max(turns.rows) <= 4


def test_long_prompts_and_crowds_do_not_stall_running_streams(model: Any) -> None:
    turns = Turns()
    with Engine(model, byte_tokenizer(), prefill_tokens=32, on_step=[turns]) as engine:
        turns.gate.clear()
        stream = engine.submit(greedy([1, 2], 60))
        at: list[int] = []
        stream.subscribe(lambda _: at.append(turns.count))
        crowd: list[Any] = []
        turns.acts[3] = lambda: crowd.extend(
            engine.submit(greedy(p, 2)) for p in [*prompts(600, 500), *prompts(*[20] * 30)]
        )
        turns.gate.set()
        stream.result(60)
        results = [h.result(60) for h in crowd]
    assert [r.num_completion_tokens for r in results] == [2] * 32
    assert len(stream.result().token_ids) == 60
    # a token at every turn: 62 turns at most, while 1700 prompt tokens waited
    assert max(at) <= 62


def test_memory_is_bounded_by_rows_times_longest(model: Any) -> None:
    turns = Turns()
    with Engine(model, byte_tokenizer(), max_held_tokens=100, on_step=[turns]) as engine:
        turns.gate.clear()
        handles = [engine.submit(greedy([i], 49)) for i in range(5)]
        turns.gate.set()
        assert [h.result(60).num_completion_tokens for h in handles] == [49] * 5
        assert max(turns.rows) == 2
        with pytest.raises(ContextOverflow):
            engine.submit(greedy([1] * 60, 41))


def test_stamps_follow_the_weights(model: Any) -> None:
    clock, turns = Clock(), Turns()
    with Engine(model, byte_tokenizer(), clock=clock, on_step=[turns]) as engine:
        turns.gate.clear()
        long, short = engine.submit(greedy([1, 2], 30)), engine.submit(greedy([3], 3))
        turns.acts[10] = lambda: clock.change(epoch=5, version="w-two", trial=True)
        turns.gate.set()
        span, brief = long.result(60).weights, short.result(60).weights
        assert span is not None
        assert brief is not None
        assert (span.first.version, span.last.version, span.changed, span.trial) == (
            "w-one",
            "w-two",
            True,
            True,
        )
        assert (span.first.epoch, span.last.epoch) == (4, 5)
        assert (brief.first, brief.last, brief.changed, brief.trial) == (Stamp(4, False, "w-one"),) * 2 + (
            False,
            False,
        )
        # back to the first version (an undo): the same name, another epoch
        clock.change(trial=False)
        turns.count = 0
        turns.gate.clear()
        undone = engine.submit(greedy([1, 2], 30))
        turns.acts[10] = lambda: clock.change(epoch=6, version="w-one")
        turns.acts[15] = lambda: clock.change(epoch=7, version="w-two")
        turns.gate.set()
        span = undone.result(60).weights
        assert span is not None
        assert (span.first.version, span.last.version, span.changed) == ("w-two", "w-two", True)
        # a write that is under way through the whole request has no epoch to show, but is seen
        clock.change(writing=True)
        span = engine.generate([greedy([4], 2)])[0].weights
        assert span is not None
        assert span.changed
        scored = engine.generate([score_request([1], [2])])[0].weights
        assert scored is not None
        assert scored.changed


def test_asyncio_reads_the_stream_and_leaving_it_cancels() -> None:
    async def main(engine: Engine) -> None:
        request = GenerationRequest(list(b"Q:"), temperature=0.0)
        texts = [e.text async for e in engine.submit(request).stream() if isinstance(e, Delta)]
        assert "".join(texts).startswith("Grüße 🙂")
        answer = await engine.submit(request).answer()
        assert answer.text == "".join(texts)
        gone = engine.submit(replace(request, ignore_eos=True, max_tokens=400))
        events = gone.stream()
        await anext(events)
        await events.aclose()
        assert (await asyncio.to_thread(gone.result, 60)).finish_reason == "cancelled"
        waiting = asyncio.ensure_future(
            engine.submit(replace(request, ignore_eos=True, max_tokens=400)).answer()
        )
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    with Engine(speaking_model(), byte_tokenizer(), stop_ids=[END]) as engine:
        asyncio.run(main(engine))
    assert engine.metrics.requests["cancelled"] == 2


def test_a_reader_that_raises_loses_only_its_own_request(model: Any) -> None:
    heard = list[object]()

    def broken(event: object) -> None:
        heard.append(event)
        if len(heard) == 8:
            raise ValueError("the reader is gone")

    turns = Turns()
    with Engine(model, byte_tokenizer(), on_step=[turns]) as engine:
        turns.gate.clear()
        handles = [engine.submit(greedy([60 + i], 60)) for i in range(2)]
        handles[0].subscribe(broken)
        turns.gate.set()
        assert handles[1].result(60).finish_reason == "length"
        assert handles[0].result(60).finish_reason == "cancelled"
    assert len(heard) == 8


def test_closing_fails_or_drains_what_is_under_way_and_refuses_what_comes_after(model: Any) -> None:
    engine = Engine(model, byte_tokenizer())
    handle = engine.submit(greedy([1, 2], 12))
    engine.close(drain=True)
    assert handle.result().token_ids == generate_alone(model, [1, 2], 12)
    with pytest.raises(Unreachable):
        engine.submit(greedy([1], 1))

    turns = Turns()
    engine = Engine(model, byte_tokenizer(), max_rows=1, on_step=[turns])
    turns.gate.clear()
    handles = [engine.submit(greedy([i], 1500)) for i in range(3)]
    turns.gate.set()
    engine.close()
    for handle in handles:
        with pytest.raises(Unreachable, match="shut down"):
            handle.result(0)
    assert engine.metrics.requests == {"stop": 0, "length": 0, "cancelled": 0, "error": 3}


def test_metrics_count_what_was_done(model: Any) -> None:
    with Engine(model, byte_tokenizer(), clock=Unchanging("w-x")) as engine:
        results = engine.generate([greedy(p, 7) for p in prompts(5, 40, 300)])
        metrics = engine.metrics
        assert (metrics.prompt_tokens, metrics.completion_tokens) == (345, 21)
        assert metrics.requests["length"] == 3
        assert sum(metrics.time_to_first_token.counts) == 3
        assert sum(metrics.time_per_token.counts) == 18
        assert metrics.time_per_token.total_s > 0
        assert results[0].weights is not None
        assert results[0].weights.first.version == "w-x"


def test_a_thread_that_ends_leaves_nobody_waiting(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the cleaning up after a failure works: those under way are told, and those that come after."""
    turns = Turns()
    with Engine(model, byte_tokenizer(), max_rows=2, on_step=[turns]) as engine:
        assert (engine.limits.context, engine.limits.vocab_size, engine.limits.rows) == (2048, 260, 2)
        turns.gate.clear()
        handles = [engine.submit(greedy([i], 1500)) for i in range(4)]
        forget, failures = engine._turns.forget, [MemoryError("no room"), MemoryError("none at all")]  # pyright: ignore[reportPrivateUsage]

        def failing() -> None:
            if failures:
                raise failures.pop()
            forget()

        monkeypatch.setattr(engine._turns, "_read_prompts", failing)
        monkeypatch.setattr(engine._turns, "forget", failing)
        turns.gate.set()
        for handle in handles:
            with pytest.raises(SecondnatureError, match=r"no room|none at all|has ended"):
                handle.result(60)
        engine._thread.join(60)  # pyright: ignore[reportPrivateUsage]
        assert "MemoryError" in engine.trouble
        with pytest.raises(Unreachable, match="the engine has ended: MemoryError"):
            engine.submit(greedy([1], 1))
