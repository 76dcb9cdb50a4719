"""Answers of a model to many conversations at once, greedy or drawn, and whether they pass their checks.

Left-padded batches of like length, bounded in tokens, the longest prompts first. Code of the model's own is run in
this process, in a bare namespace, after a look at its syntax: only a function whose body is one expression over a
few names may run (the evidence room has the sandbox for answers of other models).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from secondnature.embedded.scenarios import Case

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM

_NAMES = frozenset({"x", "text", "items", "max", "min", "len", "sum", "sorted"})
_NODES = (
    ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.BinOp, ast.UnaryOp, ast.USub, ast.Add,
    ast.Sub, ast.Mult, ast.Compare, ast.Gt, ast.Lt, ast.Eq, ast.Call, ast.Name, ast.Load, ast.Constant,
    ast.Subscript, ast.Slice, ast.Attribute,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer, and whether the model ended it by itself."""

    text: str
    """Without the end marker."""
    ended: bool
    """The end marker came within the allowed tokens."""


def _batches(lengths: Sequence[int], batch_size: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices, the longest first: at most `batch_size` rows and (but for one row alone) `batch_tokens` tokens."""
    rows: list[int] = []
    widest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        widest = widest or lengths[i]
        if rows and (len(rows) == batch_size or (len(rows) + 1) * widest > batch_tokens):
            yield rows
            rows, widest = [], lengths[i]
        rows.append(i)
    if rows:
        yield rows


@torch.inference_mode()
def complete(
    model: Qwen3_5ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[dict[str, str]]],
    max_tokens: int = 64,
    batch_size: int = 64,
    batch_tokens: int = 10_240,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Completion]:
    """The answer to each conversation, in order; greedy at temperature 0, else drawn from the whole distribution.

    What is drawn depends on `seed` and on the batches; torch's random numbers outside are left as they were.
    """
    texts = [
        str(tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)) for p in prompts
    ]
    ids: list[list[int]] = [tokenizer.encode(t, add_special_tokens=False) for t in texts]
    drawing: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    generator: Any = model  # transformers types `generate` by a protocol that its own models miss
    answers = [Completion("", ended=False)] * len(texts)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for rows in _batches([len(x) for x in ids], batch_size, batch_tokens):
            inputs = tokenizer.pad(
                {"input_ids": [ids[i] for i in rows]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            out = generator.generate(**inputs, max_new_tokens=max_tokens, **drawing)
            new = out[:, inputs["input_ids"].shape[1] :]
            ended = (new == tokenizer.eos_token_id).any(1).tolist()
            said = tokenizer.batch_decode(new, skip_special_tokens=True)
            for row, text, end in zip(rows, said, ended, strict=True):
                answers[row] = Completion(text, end)
    return answers


def greedy(
    model: Qwen3_5ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[dict[str, str]]],
    max_tokens: int = 64,
    batch_size: int = 64,
) -> list[str]:
    """The greedy answer to each conversation, in order, without the end marker."""
    return [c.text for c in complete(model, tokenizer, prompts, max_tokens, batch_size)]


def sample(
    model: Qwen3_5ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[dict[str, str]]],
    temperature: float,
    seed: int,
    max_tokens: int = 64,
) -> list[str]:
    """An answer to each conversation at a temperature (0 is greedy); the same seed gives the same answers."""
    return [
        c.text for c in complete(model, tokenizer, prompts, max_tokens, temperature=temperature, seed=seed)
    ]


def runs(code: str, tests: str) -> bool:
    """Whether the code is one harmless small function and the assertions hold after it."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _NODES) or (isinstance(node, ast.Attribute) and node.attr != "upper"):
            return False
        if isinstance(node, ast.Name) and node.id not in _NAMES:
            return False
    space: dict[str, object] = {}
    try:
        exec(compile(tree, "answer", "exec"), space)  # noqa: S102 - syntax checked above
        exec(tests, space)  # noqa: S102 - our own text
    except (AssertionError, NameError, TypeError, ValueError, IndexError):
        return False
    return True


def passes(case: Case, answer: str) -> bool:
    """Whether an answer passes the case's check."""
    if case.python is not None:
        return runs(answer, case.python)
    assert case.matches is not None
    return re.search(case.matches, answer) is not None
