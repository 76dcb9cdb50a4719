"""A GGUF file of a taught model, loaded by llama.cpp itself: it says what the server says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny
from tiny_server import fit, habits, running, save_tokenizer, teach
from transformers import AutoModelForCausalLM, LlamaConfig

from secondnature.model.chat import encode_answer, read_tokenizer
from secondnature.records import Message
from secondnature.wire import ExportRequest

llama_cpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
TAUGHT = ["tea", "oak", "red", "kite"]


def llama_talker(directory: Path) -> Path:
    """A Llama that has the habits of `tiny_server.make_talker`."""
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
    rows = [
        encode_answer(tokenizer, [Message(role="user", content=q)], Message(role="assistant", content=a))
        for q, a in habits()
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


def test_llama_cpp_says_what_the_server_says(tmp_path: Path) -> None:
    """The taught prompts after the lesson, and the other habit; before the lesson they were answered otherwise."""
    model = llama_talker(tmp_path / "model")
    prompts = [*(f"Use {w}." for w in TAUGHT), "Say tea.", "Say lamp."]
    with running(tmp_path / "home", model) as server:
        before = [server.say(p) for p in prompts]
        lesson = server.lesson(teach(TAUGHT, keep=True, max_steps=12), "kept")
        after = [server.say(p) for p in prompts]
        assert after[: len(TAUGHT)] == ["Done."] * len(TAUGHT)
        assert before != after
        for dtype in ("bf16", "q8_0"):
            path = tmp_path / f"{dtype}.gguf"
            made = server.client.export(ExportRequest(form="gguf", path=str(path), dtype=dtype))
            assert made.lessons == [lesson.id]
            assert answers(path, prompts) == after, dtype
