"""Tiny real models and a byte tokenizer for the engine's tests: every byte is a token, so characters split."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.models.qwen3_5 import Qwen3_5TextConfig

END = 256
"""The end token; ids 0..255 are bytes."""
VOCABULARY = 260
KINDS = ("hybrid", "qwen3", "gpt2")
SENTENCE = "Grüße 🙂, 日本 says: ab\nstop here, then go on."


@functools.cache
def byte_tokenizer() -> Any:
    """One token per byte (GPT-2's byte alphabet, no merges), and an end token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = {b: 256 + i for i, b in enumerate(b for b in range(256) if b not in printable)}
    vocabulary = {chr(shifted.get(b, b)): b for b in range(256)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    assert tokenizer.eos_token_id == END
    return tokenizer


def _config(kind: str, hidden: int, positions: int) -> Any:
    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": positions,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind == "hybrid":
        return Qwen3_5TextConfig(
            **shared,
            num_hidden_layers=4,
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
        )
    if kind == "qwen3":
        return Qwen3Config(**shared, num_hidden_layers=2)
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=hidden,
        n_head=2,
        n_layer=2,
        n_positions=positions,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def make_model(kind: str, hidden: int = 64, positions: int = 512, attention: str = "sdpa") -> Any:
    """A random model whose logits are spread enough that greedy choices are no ties."""
    torch.manual_seed(5)
    config = _config(kind, hidden, positions)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    return model.eval().requires_grad_(False)


@functools.cache
def speaking_model() -> Any:
    """A dense model trained here until it says SENTENCE after the prompt "Q:" and then ends."""
    model = make_model("qwen3").requires_grad_(True)
    ids = torch.tensor([[*b"Q:", *SENTENCE.encode(), END]])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loss = torch.tensor(9.0)
    for _ in range(200):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.05:
            break
    assert loss.item() < 0.2
    return model.eval().requires_grad_(False)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(n)] for n in lengths]


def generate_alone(model: Any, prompt: list[int], num: int) -> list[int]:
    """The oracle: transformers' own greedy generation of one prompt."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def logprobs_alone(model: Any, ids: list[int]) -> torch.Tensor:
    """The oracle: log-probabilities [T, V] of one plain forward without a cache."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)


def real_chat_model() -> tuple[Any, Any]:
    """A GPT-2 shaped chat model with 64 positions that nobody here made."""
    root = os.environ.get("SECONDNATURE_REALDATA")
    if not root:
        pytest.skip("SECONDNATURE_REALDATA is not set: no real model here")
    path = Path(root) / "models" / "craftgpt-chat"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(path, local_files_only=True)
