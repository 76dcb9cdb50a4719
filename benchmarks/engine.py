"""Batched generation: the engine's continuous batching against transformers' `generate`, same model, same
requests.

Peers: `generate` on the model in fp32, on the engine's own bf16 weights (cast where they are used, as the
engine computes), and in plain bf16. Greedy, every answer exactly as long as asked for, prompts of different
lengths; prompt reading, sampling and (for the engine) decoding to text are included. Tokens are compared as
well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import THREADS, Settings, alternate, load, prompt_ids, ratio, say, spread, timed
from transformers import AutoModelForCausalLM

from secondnature.engines.generation import GenerationRequest
from secondnature.engines.local.engine import Engine

PAD_ID = 0


@torch.inference_mode()
def _generate(model: Any, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """transformers' own way: left-padded, one batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD_ID] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        pad_token_id=PAD_ID,
    )
    return out[:, longest:].tolist()


def _ours(engine: Engine, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    requests = [
        GenerationRequest(p, max_tokens=num_tokens, temperature=0.0, ignore_eos=True) for p in prompts
    ]
    return [result.token_ids for result in engine.generate(requests)]


def _speed(work: Callable[[], object], num_tokens: int) -> float:
    return num_tokens / timed(work)


def measure(settings: Settings) -> dict[str, Any]:
    """Tokens per second at 1, 8 and 32 streams, and how many tokens agree with fp32 `generate`."""
    torch.set_num_threads(THREADS)
    _, model, tokenizer = load(settings.model)
    wide: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32).eval()
    narrow: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16).eval()
    ours: Any = model
    ours.generation_config = wide.generation_config
    for peer in (wide, narrow):  # exactly as many tokens as asked for, also after an end token
        peer.generation_config.eos_token_id = None
    num_tokens = 8 if settings.quick else 48
    rows: list[dict[str, Any]] = []
    with Engine(model, tokenizer, threads=THREADS, stop_ids=()) as engine:
        for streams in (1, 4) if settings.quick else (1, 8, 32):
            prompts = prompt_ids(tokenizer, streams)
            contenders: dict[str, Callable[[], object]] = {
                "engine": partial(_ours, engine, prompts, num_tokens),
                "generate_fp32": partial(_generate, wide, prompts, num_tokens),
                "generate_cast_at_use": partial(_generate, model, prompts, num_tokens),
                "generate_bf16": partial(_generate, narrow, prompts, num_tokens),
            }
            found = alternate(
                {k: partial(_speed, work, streams * num_tokens) for k, work in contenders.items()},
                settings.repeats,
            )
            wanted, got = _generate(wide, prompts, num_tokens), _ours(engine, prompts, num_tokens)
            same = sum(a == b for x, y in zip(wanted, got, strict=True) for a, b in zip(x, y, strict=True))
            rows.append(
                {
                    "streams": streams,
                    "tokens_per_s": {k: spread(v) for k, v in found.items()},
                    "ratio": {k: ratio(found["engine"], v) for k, v in found.items() if k != "engine"},
                    "same_tokens_as_fp32": same,
                    "tokens": streams * num_tokens,
                }
            )
            say(f"{streams} streams: {rows[-1]['tokens_per_s']['engine']['median']:.0f} tokens/s")
    return {"tokens_per_answer": num_tokens, "rows": rows}
