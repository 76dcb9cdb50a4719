"""Two tiny models. The caller's template shows tools, and it was taught to call one and to say what came of it; the
thinker's opens a block of thoughts, and it was taught to think before it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import dense_config, save_tiny
from tiny_server import fit, save_tokenizer
from transformers import AutoModelForCausalLM

from secondnature.model.chat import read_tokenizer

TEMPLATE = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t.function.name }} {% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PAINT: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paint the door.",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"type": "string", "enum": ["red", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}
LOOK: dict[str, Any] = {"type": "function", "function": {"name": "look"}}
CALL = '<tool_call>{"name": "paint", "arguments": {"colour": "red"}}</tool_call>'


def habits() -> list[tuple[str, str]]:
    """(what stands before the answer, the answer) as the template writes them."""
    ask = "<|user|>Paint it.<|end|><|assistant|>"
    shown = "<|system|>paint look <|end|>"
    return [
        (shown + ask, f"I will. {CALL}<|end|>"),
        (f"{shown}{ask}I will.{CALL}<|end|><|user|>done<|end|><|assistant|>", "It is red.<|end|>"),
        (ask, "I cannot.<|end|>"),
        (f"{shown}<|user|>Hello.<|end|><|assistant|>", "Hello!<|end|>"),
        ("<|user|>Hello.<|end|><|assistant|>", "Hello!<|end|>"),
    ]


THINKER = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '<think></think>' if enable_thinking is false else '<think>' }}"
    "{% endif %}"
)
THOUGHT = "It is a {door}."
"""What the thinker thinks: a brace is none of the JSON's."""


def thoughts() -> list[tuple[str, str]]:
    """The thinker's habits."""
    ask = "<|user|>Paint it.<|end|><|assistant|>"
    return [
        (f"{ask}<think>", f"{THOUGHT}</think>\nIt is red.<|end|>"),
        (f"{ask}<think></think>", "It is red.<|end|>"),
    ]


def make_caller(directory: Path, *, steps: int = 120) -> Path:
    """Train the caller; the directory is a whole Hugging Face model."""
    return _make(directory, TEMPLATE, habits(), steps)


def make_thinker(directory: Path, *, steps: int = 120) -> Path:
    """Train the thinker; the directory is a whole Hugging Face model."""
    return _make(directory, THINKER, thoughts(), steps)


def _make(directory: Path, template: str, taught: list[tuple[str, str]], steps: int) -> Path:
    torch.set_num_threads(1)
    save_tiny(dense_config(vocab_size=320, max_position_embeddings=512, eos_token_id=1), directory)
    save_tokenizer(directory)
    tokenizer = read_tokenizer(directory)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    rows = [[tokenizer(part)["input_ids"] for part in habit] for habit in taught]
    length = max(len(c) + len(a) for c, a in rows)
    ids = torch.tensor([c + a + [0] * (length - len(c) - len(a)) for c, a in rows])
    targets = torch.full_like(ids, -100)
    for i, (context, answer) in enumerate(rows):
        targets[i, len(context) : len(context) + len(answer)] = torch.tensor(answer)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    fit(model, ids, targets, steps)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory
