"""Blocks of thoughts: how they begin and end, and whether an answer to a prompt may begin with one (server)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from secondnature.model.rendering import Rendering

__all__ = ["THOUGHTS", "Thoughts", "new_in", "opened_in", "thoughts_before"]

THOUGHTS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|channel>thought": "<channel|>",
}
"""How blocks of thoughts begin and end."""


@dataclass(frozen=True)
class Thoughts:
    """The block of thoughts that an answer may begin with."""

    open: str
    close: str
    opened: bool
    """By the prompt: the answer begins inside."""


def opened_in(asks: str) -> str | None:
    """The beginning of the block that a prompt leaves open, if it does."""
    return next((o for o in THOUGHTS if asks.rfind(o) > asks.rfind(THOUGHTS[o])), None)


def thoughts_before(tokenizer: Any, rendering: Rendering) -> Thoughts | None:
    """What an answer to a conversation may begin with. None: a template that knows no thoughts, or has closed them.

    Raises:
        BadInput: the template refuses the conversation.
    """
    asks = new_in(rendering.prompt(), rendering.conversation())
    opened = opened_in(asks)
    if opened is not None:
        return Thoughts(opened, THOUGHTS[opened], True)
    if any(close in asks for close in THOUGHTS.values()):
        return None
    template = str(getattr(tokenizer, "chat_template", None) or "")
    known = next((o for o in THOUGHTS if o in template), None)
    return None if known is None else Thoughts(known, THOUGHTS[known], False)


def new_in(text: str, other: str) -> str:
    """The end of a text, from where it differs from another one."""
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), len(other))
    return text[same:]
