# pyright: reportMissingImports=false
"""What a request of ours says of sampling does in vLLM what it does in the local engine, or is refused by name.

One dense model in float32, in both engines: their greedy answers are the same, and what may be drawn is too.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tiny_models import dense_config, in_arena, save_tiny
from tiny_server import save_tokenizer

from secondnature.engines.base import Engine
from secondnature.engines.generation import GenerationRequest, GenerationResult
from secondnature.engines.local.engine import Engine as LocalEngine
from secondnature.engines.stamps import Clock
from secondnature.engines.vllm.client import VllmEngine
from secondnature.errors import BadInput
from secondnature.model.chat import end_ids, read_tokenizer
from secondnature.weights.arena import Arena

PROMPT = [40, 80, 120, 33, 70, 201]
PLAIN = GenerationRequest(PROMPT, max_tokens=12, temperature=0.0, ignore_eos=True)
ENDS = (61, 62, 3, 1)
"""What config.json, generation_config.json, the tokenizer and the chat template call an end."""
NUM_DRAWN = 150
"""First tokens, of so many seeds: each that may be drawn is, and no other."""


@dataclass(frozen=True)
class Both:
    """The same model twice."""

    local: Engine
    vllm: Engine
    tokenizer: Any

    def answers(self, *requests: GenerationRequest) -> tuple[list[GenerationResult], list[GenerationResult]]:
        found = [[engine.submit(r) for r in requests] for engine in (self.local, self.vllm)]
        local, vllm = ([handle.result(120) for handle in handles] for handles in found)
        return local, vllm


@pytest.fixture(scope="module")
def both(vllm_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Generator[Both]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from secondnature.engines.vllm.rendering import stop_at

    config = dense_config(vocab_size=320, max_position_embeddings=256, head_dim=32, eos_token_id=ENDS[0])
    directory = save_tiny(config, tmp_path_factory.mktemp("model"))
    save_tokenizer(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS[1]}))
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": "<|user|>"}))
    tokenizer = read_tokenizer(directory)
    assert end_ids(tokenizer) == set(ENDS)
    _, model = in_arena(directory, compute_dtype=torch.float32)
    options: dict[str, Any] = {"model": str(directory), "dtype": "float32", "max_model_len": 256}
    given = AsyncEngineArgs(
        **options, enforce_eager=True, num_gpu_blocks_override=512, disable_log_stats=True
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> Any:
        return AsyncLLM.from_engine_args(given)

    client = asyncio.run_coroutine_threadsafe(start(), loop).result(280)
    stop_at(client, end_ids(tokenizer))
    clock = Clock(Arena.create({"a": torch.zeros(4, dtype=torch.bfloat16)}), "w0")
    vllm = VllmEngine(client, loop, clock, vocab_size=320, max_context=256, load=lambda: 0, priorities=False)
    try:
        with LocalEngine(model, tokenizer, max_context=256) as local:
            yield Both(local, vllm, tokenizer)
    finally:
        asyncio.run_coroutine_threadsafe(_end(client), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


async def _end(client: Any) -> None:
    client.shutdown()
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)


MOVED = {
    "logit_bias up": {"logit_bias": {77: 100.0}},
    "logit_bias down": {"logit_bias": dict.fromkeys(range(100, 300), -100.0)},
    "presence_penalty": {"presence_penalty": 2.0},
    "presence_penalty below 0": {"presence_penalty": -2.0},
    "frequency_penalty": {"frequency_penalty": 0.5, "logit_bias": {77: 1.2}},
    "repetition_penalty": {"repetition_penalty": 3.0, "logit_bias": {80: 3.0}},
    "max_tokens": {"max_tokens": 3},
}
"""Fields that change a greedy answer."""


@pytest.mark.parametrize("fields", MOVED.values(), ids=MOVED)
def test_a_greedy_answer_is_moved_alike(both: Both, fields: dict[str, Any]) -> None:
    (plain, local), (plain_there, there) = both.answers(PLAIN, replace(PLAIN, **fields))
    assert there.token_ids == local.token_ids
    # of bytes that are no character vLLM shows none at the end of a text
    assert there.text == local.text.rstrip("\N{REPLACEMENT CHARACTER}")
    assert (there.finish_reason, there.stop_reason) == (local.finish_reason, local.stop_reason)
    assert plain_there.token_ids == plain.token_ids
    assert local.token_ids != plain.token_ids, "the field changes nothing here"


def test_it_ends_at_the_same_string_or_token_and_says_which(both: Both) -> None:
    letters = both.tokenizer.encode("abcdefghijklmnop", add_special_tokens=False)
    spoken = replace(PLAIN, logit_bias=dict.fromkeys(letters, 5.0), frequency_penalty=0.2)
    (whole,), _ = both.answers(spoken)
    stop, token = whole.text[3:5], whole.token_ids[6]
    asked = [
        replace(spoken, stop=(stop,)),
        replace(spoken, stop_token_ids=(token,)),
        replace(spoken, max_tokens=None),
        *(replace(spoken, ignore_eos=False, logit_bias={end: 100.0}) for end in ENDS),
        *(replace(spoken, ignore_eos=True, logit_bias={end: 100.0}) for end in ENDS),
    ]
    local, there = both.answers(*asked)
    for a, b in zip(local, there, strict=True):
        assert (b.token_ids, b.text, b.finish_reason, b.stop_reason) == (
            a.token_ids,
            a.text,
            a.finish_reason,
            a.stop_reason,
        )
    assert [r.stop_reason for r in there] == [stop, token, None, *ENDS, None, None, None, None]
    assert [r.finish_reason for r in there] == ["stop"] * 2 + ["length"] + ["stop"] * 4 + ["length"] * 4
    assert len(there[2].token_ids) == 256 - len(PROMPT)


CUT = {
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.25, "temperature": 0.2},
    "min_p": {"min_p": 0.4, "temperature": 0.2},
    "all three": {"min_p": 0.2, "top_k": 6, "top_p": 0.6, "temperature": 0.2},
    "seed -> one": {"top_k": 1, "temperature": 2.0},
}
"""Fields that leave a few tokens of many."""


@pytest.mark.parametrize("fields", CUT.values(), ids=CUT)
def test_the_same_tokens_may_be_drawn(both: Both, fields: dict[str, Any]) -> None:
    base = replace(PLAIN, max_tokens=1, **{"temperature": 1.0, **fields})
    local, there = both.answers(*(replace(base, seed=i) for i in range(NUM_DRAWN)))
    found = {r.token_ids[0] for r in local}
    assert found == {r.token_ids[0] for r in there}
    assert 1 <= len(found) <= 12
    assert (len(found) == 1) == (fields.get("top_k") == 1)


def test_a_seed_draws_the_same_again(both: Both) -> None:
    asked = [replace(PLAIN, temperature=1.5, seed=seed) for seed in (0, 0, 1, 2**63 - 1)]
    _, (first, again, other, _last) = both.answers(*asked)
    assert first.token_ids == again.token_ids != other.token_ids


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprobs", 1),
        ("shape", object()),
        ("marks", ("<tool_call>",)),
        ("temperature", 0.005),
        ("temperature", 2.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("seed", -1),
        ("seed", 2**63),
        ("top_k", -2),
        ("min_p", 1.5),
        ("logit_bias", {320: 1.0}),
        ("stop_token_ids", (320,)),
    ],
)
def test_what_vllm_cannot_is_refused_by_name(both: Both, field: str, value: Any) -> None:
    with pytest.raises(BadInput, match=field) as e:
        both.vllm.submit(replace(PLAIN, **{field: value}))
    assert e.value.hint
