"""What the model reads and writes as text: tokenizer, chat template, tokens of both (server).

One place for everything that turns people's words into token ids: what is asked, taught and probed is encoded
alike. Nothing is downloaded, no code of a model directory is run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from secondnature.errors import BadCheckpoint, BadInput
from secondnature.records import Message

__all__ = ["encode_answer", "encode_chat", "read_tokenizer"]

_LOG = logging.getLogger(__name__)


def read_tokenizer(directory: Path) -> Any:
    """The tokenizer with its chat template, from the directory's files alone.

    Raises:
        BadCheckpoint: the files are missing or broken.
    """
    if not (directory / "tokenizer.json").exists():
        raise BadCheckpoint(f"{directory}: no tokenizer.json", "expected the files of a fast tokenizer")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        raise BadCheckpoint(f"{directory}: tokenizer cannot be read: {e}", "export it again") from None


def _render(tokenizer: Any, messages: Sequence[Message | Mapping[str, str]], *, prompt: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise BadInput(
            "the model has no chat template", "send token ids, or add chat_template.jinja to the model"
        )
    plain = [m.model_dump() if isinstance(m, Message) else dict(m) for m in messages]
    return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_chat(
    tokenizer: Any, messages: Sequence[Message | Mapping[str, str]], add_generation_prompt: bool = True
) -> list[int]:
    """Token ids of a conversation as the model's chat template renders it; nothing is added to the rendering.

    Raises:
        BadInput: the tokenizer has no chat template.
    """
    return _ids(tokenizer, _render(tokenizer, messages, prompt=add_generation_prompt))


def encode_answer(
    tokenizer: Any,
    prompt_messages: Sequence[Message | Mapping[str, str]],
    answer_message: Message | Mapping[str, str],
) -> tuple[list[int], list[int]]:
    """(context_ids, continuation_ids): the prompt up to where the model answers, and the answer with its end.

    Context + continuation is the template's own rendering of the whole conversation, cut after the end-of-turn
    token (what follows is never generated); a template that writes no end gets the tokenizer's `eos_token`.
    Where the rendering or its tokens do not split at the answer (a template that drops or adds reasoning, a
    token across the border), the continuation is the answer's own text, encoded alone, and a warning says so.

    Raises:
        BadInput: the tokenizer has no chat template.
    """
    before = _render(tokenizer, prompt_messages, prompt=True)
    whole = _render(tokenizer, [*prompt_messages, answer_message], prompt=False)
    context = _ids(tokenizer, before)
    everything = _ids(tokenizer, whole)
    if whole.startswith(before) and everything[: len(context)] == context:
        continuation = everything[len(context) :]
    else:
        _LOG.warning("the chat template does not split at the answer: the answer is encoded on its own")
        content = answer_message.content if isinstance(answer_message, Message) else answer_message["content"]
        continuation = _ids(tokenizer, whole[len(before) :] if whole.startswith(before) else content)
    end: int | None = tokenizer.eos_token_id
    if end is not None:
        continuation = continuation[: continuation.index(end)] if end in continuation else continuation
        continuation = [*continuation, end]
    return context, continuation
