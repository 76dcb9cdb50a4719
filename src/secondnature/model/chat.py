"""What the model reads and writes as text: tokenizer, chat template, tokens of both (server).

One place for everything that turns people's words into token ids: what is asked, taught and probed is encoded
alike. Nothing is downloaded, no code of a model directory is run.

Encoding is slow (a megabyte can take seconds), so what cannot fit is refused by its length before it is encoded:
a text has at least as many tokens as it has characters, divided by the most that one token can stand for.
"""

from __future__ import annotations

import json
import logging
import math
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from secondnature.errors import BadCheckpoint, BadInput, ContextOverflow
from secondnature.records import Message

__all__ = [
    "cannot_fit",
    "characters_per_token",
    "encode_answer",
    "encode_chat",
    "encode_text",
    "read_tokenizer",
]

_LOG = logging.getLogger(__name__)
_KNOWN: weakref.WeakKeyDictionary[Any, int | None] = weakref.WeakKeyDictionary()
"""`characters_per_token` of the tokenizers that were asked about."""
_NORMALIZERS = {
    "NFC": 4,  # no character is composed of more than four
    "NFKC": 4,
    **dict.fromkeys(("NFD", "NFKD", "Lowercase", "Prepend", "ByteLevel"), 1),
}
"""Normalizers that drop no text, each with the most characters that it makes one of."""
_SPLITTERS = frozenset({"ByteLevel", "Digits", "Metaspace", "UnicodeScripts"})
"""Pre-tokenizers that drop no text."""


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


def _render(
    tokenizer: Any,
    messages: Sequence[Message | Mapping[str, str]],
    *,
    prompt: bool,
    template_options: Mapping[str, Any] | None = None,
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise BadInput(
            "the model has no chat template", "send token ids, or add chat_template.jinja to the model"
        )
    plain = [m.model_dump() if isinstance(m, Message) else dict(m) for m in messages]
    options = {**(template_options or {}), "tokenize": False, "add_generation_prompt": prompt}
    return str(tokenizer.apply_chat_template(plain, **options))


def _steps(part: Any, inner: str) -> list[dict[str, Any]]:
    """A part of a tokenizer as the list of its steps."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for one in part[inner] for step in _steps(one, inner)]


def _shrinks(normalizer: Mapping[str, Any]) -> int | None:
    """The most characters of which a normalizer makes one; None: it may drop any number."""
    if normalizer["type"] != "Replace":
        return _NORMALIZERS.get(normalizer["type"])
    pattern, content = normalizer["pattern"].get("String"), normalizer["content"]
    return max(1, math.ceil(len(pattern) / len(content))) if pattern and content else None


def _keeps_every_character(model: Mapping[str, Any], byte_level: bool) -> bool:
    """Whether each character that reaches the vocabulary becomes a token of its own, or part of one."""
    vocabulary: Any = model.get("vocab") or ()
    if model["type"] == "Unigram":
        vocabulary = {entry[0] for entry in vocabulary}
    elif model["type"] != "BPE":  # others make one token of a whole unknown word
        return False
    if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return True
    if model["type"] == "Unigram":  # one token for any number of unknown characters
        return False
    if model.get("unk_token") in vocabulary and not model.get("fuse_unk"):
        return True
    marked = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    return byte_level and not marked and all(c in vocabulary for c in ByteLevel.alphabet())


def _characters_per_token(tokenizer: Any) -> int | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    parts: dict[str, Any] = json.loads(backend.to_str())
    normalizers = _steps(parts["normalizer"], "normalizers")
    splitters = _steps(parts["pre_tokenizer"], "pretokenizers")
    shrinks = [_shrinks(n) for n in normalizers]
    dropped = any(
        s["type"] not in _SPLITTERS
        and not (s["type"] in ("Split", "Punctuation") and s["behavior"] != "Removed")
        for s in splitters
    )
    added: list[dict[str, Any]] = parts["added_tokens"]
    strips = any(token["lstrip"] or token["rstrip"] for token in added)  # they swallow spaces beside them
    byte_level = any(step["type"] == "ByteLevel" for step in (*normalizers, *splitters))
    if None in shrinks or dropped or strips or not _keeps_every_character(parts["model"], byte_level):
        return None
    entries = (entry if isinstance(entry, str) else entry[0] for entry in parts["model"]["vocab"])
    longest = max(map(len, (*entries, *(token["content"] for token in added))))
    return longest * math.prod(s for s in shrinks if s is not None)


def characters_per_token(tokenizer: Any) -> int | None:
    """The most characters of a text that one token can stand for; read once per tokenizer.

    None: a text of any length may become few tokens, because the tokenizer drops some of it (a normalizer that
    strips, an unknown word that becomes one token), or nobody has looked at what this kind of tokenizer does.
    """
    try:
        return _KNOWN[tokenizer]
    except KeyError:
        found = _KNOWN[tokenizer] = _characters_per_token(tokenizer)
        return found


def cannot_fit(tokenizer: Any, characters: int, limit: int | None) -> None:
    """Refuse a text before it is encoded if it has more tokens than `limit` however it is encoded.

    Args:
        characters: of the text as the tokenizer gets it (a template may have trimmed what was sent).
        limit: tokens; None: any number.

    Raises:
        ContextOverflow: says how long it may be at most.
    """
    longest = characters_per_token(tokenizer) if limit is not None else None
    if limit is None or longest is None or characters <= limit * longest:
        return
    raise ContextOverflow(
        f"This model's maximum context length is {limit} tokens; a text of {characters:,} characters has "
        f"{math.ceil(characters / longest):,} or more, and no text over {limit * longest:,} characters is encoded",
        "shorten it",
    )


def _ids(tokenizer: Any, text: str, limit: int | None) -> list[int]:
    cannot_fit(tokenizer, len(text), limit)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_text(tokenizer: Any, text: str, *, limit: int | None = None) -> list[int]:
    """Token ids of a plain text, with the special tokens that the tokenizer adds by itself.

    Raises:
        ContextOverflow: its length alone says that it has more than `limit` tokens.
    """
    cannot_fit(tokenizer, len(text), limit)
    return list(tokenizer(text)["input_ids"])


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Message | Mapping[str, str]],
    add_generation_prompt: bool = True,
    *,
    limit: int | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation as the model's chat template renders it; nothing is added to the rendering.

    Args:
        template_options: what the template gets besides the conversation, such as `enable_thinking`.

    Raises:
        BadInput: the tokenizer has no chat template.
        ContextOverflow: the length of the rendering alone says that it has more than `limit` tokens.
    """
    text = _render(tokenizer, messages, prompt=add_generation_prompt, template_options=template_options)
    return _ids(tokenizer, text, limit)


def encode_answer(
    tokenizer: Any,
    prompt_messages: Sequence[Message | Mapping[str, str]],
    answer_message: Message | Mapping[str, str],
    *,
    limit: int | None = None,
) -> tuple[list[int], list[int]]:
    """(context_ids, continuation_ids): the prompt up to where the model answers, and the answer with its end.

    Context + continuation is the template's own rendering of the whole conversation, cut after the end-of-turn
    token (what follows is never generated); a template that writes no end gets the tokenizer's `eos_token`.
    Where the rendering or its tokens do not split at the answer (a template that drops or adds reasoning, a
    token across the border), the continuation is the answer's own text, encoded alone, and a warning says so.

    Raises:
        BadInput: the tokenizer has no chat template.
        ContextOverflow: the length of the rendering alone says that it has more than `limit` tokens.
    """
    before = _render(tokenizer, prompt_messages, prompt=True)
    whole = _render(tokenizer, [*prompt_messages, answer_message], prompt=False)
    context = _ids(tokenizer, before, limit)
    everything = _ids(tokenizer, whole, limit)
    if whole.startswith(before) and everything[: len(context)] == context:
        continuation = everything[len(context) :]
    else:
        _LOG.warning("the chat template does not split at the answer: the answer is encoded on its own")
        content = answer_message.content if isinstance(answer_message, Message) else answer_message["content"]
        continuation = _ids(tokenizer, whole[len(before) :] if whole.startswith(before) else content, limit)
    end: int | None = tokenizer.eos_token_id
    if end is not None:
        continuation = continuation[: continuation.index(end)] if end in continuation else continuation
        continuation = [*continuation, end]
    return context, continuation
