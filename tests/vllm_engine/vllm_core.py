# pyright: reportMissingImports=false
"""vLLM's engine in this process, stepped by hand: a write can fall between any two of its steps."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import dense_config, hybrid_config, llama_config, read_weights, save_tiny
from transformers import Qwen3_5Config
from vllm_server import EMBEDDED

NUM_BATCHED_TOKENS = 512
"""A longer prompt takes several steps."""

Scores = list[list[tuple[int, float]]]
"""Per generated token: the likeliest tokens and their log-probabilities."""


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    scores: Scores
    num_cached: int
    """Tokens of the prompt that were not computed again."""


class Core:
    """vLLM's engine, stepped by hand, and the arena that it computes with."""

    def __init__(self, directory: Path, *, long: int, **options: Any) -> None:
        from vllm import LLM

        from secondnature.engines.vllm.share import attach

        self.long = long
        """Tokens of a prompt that takes more than one step and fills several blocks."""
        settings = {"enforce_eager": True, "enable_prefix_caching": True, "disable_log_stats": True}
        settings |= json.loads(os.environ.get("TESTED_VLLM_OPTIONS", "{}"))  # what a GPU needs
        self.engine: Any = LLM(
            model=str(directory),
            skip_tokenizer_init=True,
            max_num_batched_tokens=NUM_BATCHED_TOKENS,
            **{**settings, **options},  # pyright: ignore[reportArgumentType]
        ).llm_engine
        self.core = self.engine.engine_core.engine_core
        self.arena = attach(self.engine.collective_rpc("secondnature_manifest")[0]).arena
        self.original = {name: tensor.clone() for name, tensor in self.arena.tensors.items()}
        self._numbers = itertools.count()

    def close(self) -> None:
        self.engine.engine_core.shutdown()

    # ------------------------------------------------------------------------------------------- weights

    def changed(self) -> dict[str, torch.Tensor]:
        """Other weights: every matrix a little larger, so that all that is kept of a prompt differs."""
        return {name: t * 1.125 if t.ndim > 1 else t for name, t in self.original.items()}

    def change(self) -> None:
        self.arena.write(self.changed())

    def undo(self) -> None:
        self.arena.write(self.original)

    # ------------------------------------------------------------------------------------------ requests

    def prompt(self, num_tokens: int | None = None) -> list[int]:
        """Token ids that nobody asked about before."""
        start = 7 * next(self._numbers) + 5
        return [5 + (start + 13 * i + i // 7) % 80 for i in range(num_tokens or self.long)]

    def begin(self, ids: list[int], num_tokens: int = 4, salt: str | None = None) -> None:
        """Hand a request in; it waits until somebody steps."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=num_tokens, logprobs=5, ignore_eos=True, detokenize=False
        )
        given = {"prompt_token_ids": ids, **({} if salt is None else {"cache_salt": salt})}
        self.engine.add_request(f"r{next(self._numbers)}", given, params)

    def step(self) -> list[Answer]:
        """One step: what ended in it."""
        return [_answer(o) for o in self.engine.step() if o.finished]

    def finish(self) -> Answer:
        """Step until nothing is left to do: the answer of the only request."""
        found: list[Answer] = []
        while self.engine.has_unfinished_requests():
            found += self.step()
        (answer,) = found
        return answer

    def ask(self, ids: list[int], num_tokens: int = 4, salt: str | None = None) -> Answer:
        self.begin(ids, num_tokens, salt)
        return self.finish()

    def fresh(self, ids: list[int], num_tokens: int = 4) -> Answer:
        """By the weights as they are, with an empty cache."""
        self.forget()
        answer = self.ask(ids, num_tokens)
        assert answer.num_cached == 0
        return answer

    def forget(self) -> None:
        assert self.engine.reset_prefix_cache()
        assert self.num_blocks() == 0

    def num_blocks(self) -> int:
        """Blocks that a later request could be given."""
        return len(self.core.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block)

    def preempt(self) -> None:
        """As the scheduler does when memory is short: the running request gives its blocks back and waits."""
        scheduler = self.core.scheduler
        scheduler._preempt_request(scheduler.running.pop(), time.monotonic(), drop_stale_output=True)
        scheduler.prev_step_scheduled_req_ids.clear()


def _answer(output: Any) -> Answer:
    said = output.outputs[0]
    scores = [sorted((t, float(p.logprob)) for t, p in step.items()) for step in said.logprobs]
    return Answer(list(said.token_ids), scores, output.num_cached_tokens or 0)


@contextlib.contextmanager
def without(core: Core, *parts: str) -> Generator[None]:
    """These parts of the plug-in's work left undone."""
    from secondnature.engines.vllm.cache import EPOCHS

    assert parts
    core.forget()
    EPOCHS.parts -= set(parts)
    try:
        assert core.core.secondnature_cache() == "unsalted"
        yield
    finally:
        EPOCHS.parts |= set(parts)
        core.forget()


def dense(path: Path) -> dict[str, Any]:
    directory = save_tiny(dense_config(max_position_embeddings=1024, head_dim=32), path)
    return {**SMALL, "directory": directory, "dtype": "float32"}


def llama(path: Path) -> dict[str, Any]:
    """With biases, and one matrix for both ends."""
    config = llama_config(
        max_position_embeddings=1024,
        head_dim=32,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    return {**SMALL, "directory": save_tiny(config, path), "dtype": "bfloat16"}


def conditional(path: Path) -> dict[str, Any]:
    """A hybrid in the published form: its text model within one that also sees; images are switched off."""
    text = hybrid_config(linear_key_head_dim=64, linear_value_head_dim=64, head_dim=32)
    weights = read_weights(save_tiny(text, path / "text"))
    architectures = ["Qwen3_5ForConditionalGeneration"]
    Qwen3_5Config(
        text_config=text.to_dict(), architectures=architectures, tie_word_embeddings=True
    ).save_pretrained(path / "whole")
    named = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in weights.items()}
    save_file(named, path / "whole" / "model.safetensors", metadata={"format": "pt"})
    return {
        "directory": path / "whole",
        "long": 400,
        "dtype": "bfloat16",
        "max_model_len": 512,
        "language_model_only": True,
    }


SMALL: dict[str, Any] = {"long": 600, "block_size": 32, "max_model_len": 1024}

Make = Callable[[Path], dict[str, Any]]
MODELS: dict[str, Make] = {
    # blocks of 256 tokens: as large as the state of a GatedDeltaNet
    "hybrid": lambda _: {"directory": EMBEDDED, "long": 900, "dtype": "bfloat16", "max_model_len": 2048},
    "dense": dense,
}


@contextlib.contextmanager
def started(make: Make, path: Path) -> Generator[Core]:
    """An engine in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(min(os.sched_getaffinity(0))))
        found = Core(**make(path))
    try:
        yield found
    finally:
        found.close()
