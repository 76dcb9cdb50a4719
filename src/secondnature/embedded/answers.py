"""Greedy answers of a model to many conversations at once, and whether they pass their checks.

Left-padded batches, the longest prompts first. Code of the model's own is run in this process, in a bare namespace,
after a look at its syntax: only a function whose body is one expression over a few names may run (the evidence room
has the sandbox for answers of other models).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
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


@torch.inference_mode()
def greedy(
    model: Qwen3_5ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[dict[str, str]]],
    max_tokens: int = 64,
    batch_size: int = 64,
) -> list[str]:
    """The greedy answer to each conversation, in order, without the end marker."""
    texts = [
        str(tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)) for p in prompts
    ]
    generator: Any = model  # transformers types `generate` by a protocol that its own models miss
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    answers = [""] * len(texts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs = tokenizer(
            [texts[i] for i in rows],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        out = generator.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_tokens,
            do_sample=False,
        )
        new = out[:, inputs["input_ids"].shape[1] :]
        for row, text in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[row] = text
    return answers


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
