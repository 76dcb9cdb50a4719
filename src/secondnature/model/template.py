"""A chat template is asked: what it renders, and what it refuses, in its own words (server).

A template is a program of the model's makers. It may refuse a conversation (no system role, turns that do not
alternate) or simply break; both are said to whoever sent the conversation and never end as a fault of the server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from secondnature.errors import BadInput

__all__ = ["apply"]

REFUSALS = (
    TemplateError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What a rendering ends with that is the template's or the conversation's doing."""
OURS = frozenset(
    {
        *("conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "messages"),
    }
)
"""Names that are no options of a template."""


def apply(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as the model's chat template writes it.

    Args:
        prompt: also what the template writes where the model shall answer.
        tools: as OpenAI's clients send them.
        options: what a template may be told besides, such as `enable_thinking`.

    Raises:
        BadInput: there is no template, it refuses the conversation, or an option is none of a template's.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise BadInput(
            "the model has no chat template", "send token ids, or add chat_template.jinja to the model"
        )
    wrong = sorted(OURS & set(options or ()))
    if wrong:
        raise BadInput(f"`{wrong[0]}` is no option of a chat template", "leave it out")
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tools=[dict(t) for t in tools] if tools else None,
                tokenize=False,
                add_generation_prompt=prompt,
                **(options or {}),
            )
        )
    except REFUSALS as e:
        words = " ".join(str(e).split()) or type(e).__name__
        raise BadInput(
            f"the model's chat template refuses this conversation: {words[:400]}",
            "change the roles or their order, or mend chat_template.jinja in the model's directory",
        ) from None
