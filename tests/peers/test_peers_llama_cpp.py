"""A GGUF file of a taught model, loaded by llama.cpp itself: it says what our engine says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny
from tiny_server import fit, habits, save_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from secondnature.engines.local.engine import Engine
from secondnature.lessons.prober import Prober
from secondnature.model import load
from secondnature.model.chat import encode_answer, encode_chat, read_tokenizer
from secondnature.records import Message
from secondnature.weights import checkpoint, gguf

llama_cpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
TAUGHT = ["tea", "oak", "red", "kite"]
PROMPTS = [*(f"Use {w}." for w in TAUGHT), "Say tea.", "Say lamp."]


def llama_talker(directory: Path) -> Path:
    """A Llama that has the habits of `tiny_server.make_talker`, and was taught to answer some of them otherwise."""
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    save_tiny(config, directory)
    save_tokenizer(directory)
    tokenizer = read_tokenizer(directory)
    taught = [(q, "Done." if q in PROMPTS[: len(TAUGHT)] else a) for q, a in habits()]
    rows = [
        encode_answer(tokenizer, [Message(role="user", content=q)], Message(role="assistant", content=a))
        for q, a in taught
    ]
    length = max(len(c) + len(a) for c, a in rows)
    ids = torch.tensor([c + a + [0] * (length - len(c) - len(a)) for c, a in rows])
    targets = torch.full_like(ids, -100)
    for i, (context, answer) in enumerate(rows):
        targets[i, len(context) : len(context) + len(answer)] = torch.tensor(answer)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    fit(model, ids, targets, 150)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def answers(path: Path, prompts: list[str]) -> list[str]:
    """llama.cpp's greedy answers, by the chat template in the file."""
    given = llama_cpp.CommonParams()
    given.model.path = str(path)
    given.n_ctx, given.n_parallel, given.cpuparams.n_threads = 256, 1, 1
    given.warmup, given.use_jinja = False, True
    server = llama_cpp.Server(given)
    found: list[str] = []
    for prompt in prompts:
        body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 12}
        found.append(server.handle_chat_completions(body)["choices"][0]["message"]["content"])
    del server
    return found


def test_llama_cpp_says_what_our_engine_says(tmp_path: Path) -> None:
    """Word for word, greedily, by the chat template: what was taught, and what was not."""
    model = llama_talker(tmp_path / "model")
    weights = checkpoint.read(model)
    tokenizer = read_tokenizer(model)
    engine = Engine(load.build(model, weights), tokenizer)
    try:
        prober = Prober(engine, tokenizer, context_limit=engine.limits.context)
        contexts = [encode_chat(tokenizer, [Message(role="user", content=p)]) for p in PROMPTS]
        ours = [x.text for x in prober.answers(contexts, lambda *_: None)]
    finally:
        engine.close()
    assert ours == ["Done."] * len(TAUGHT) + ["tea!", "lamp!"]
    for dtype in ("bf16", "f16", "q8_0"):
        path = tmp_path / f"{dtype}.gguf"
        gguf.write(path, sorted(weights.items()), model, dtype, {})
        assert answers(path, PROMPTS) == ours, dtype
