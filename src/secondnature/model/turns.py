"""What ends a turn: one answer for the engine, for what is taught and probed, and for what is exported (server).

A model's files often disagree. config.json may still be that of the base model, generation_config.json may name
what the chat model was trained to end with, the tokenizer may say a third thing, and the chat template writes what
the model has read after every answer. An answer ends at any of these tokens.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from secondnature.errors import BadInput
from secondnature.model import template

__all__ = [
    "End",
    "Ending",
    "after_answer",
    "declared",
    "end_ids",
    "endings",
    "is_named",
    "literals",
    "note",
    "template_end",
]

_DECLARED: weakref.WeakKeyDictionary[Any, dict[str, frozenset[int]]] = weakref.WeakKeyDictionary()
"""What each of the files beside each tokenizer names."""
_WRITTEN: weakref.WeakKeyDictionary[Any, tuple[str, int | None]] = weakref.WeakKeyDictionary()
"""Of each tokenizer, its template and the token that this writes after an answer."""
OPEN, CLOSE = "\ue0f0", "\ue0f1"
"""Stand around an answer in a rendering that is only looked at: private characters, which no template knows."""


class End(NamedTuple):
    """The end of a turn as a template writes it."""

    text: str
    """From the last character of the answer up to the token, and the token."""
    token: int


def _ids(value: object) -> set[int]:
    values: list[Any] = value if isinstance(value, list) else [value]
    return {v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0}


class Ending(NamedTuple):
    """A token that ends an answer, and who says so."""

    id: int
    text: str
    named_by: tuple[str, ...]


def declared(directory: Path) -> frozenset[int]:
    """The end tokens of generation_config.json, config.json and its text part; a broken file names none."""
    return frozenset[int]().union(*_declared_by(directory).values())


def _declared_by(directory: Path) -> dict[str, frozenset[int]]:
    """Which end tokens each file names."""
    found: dict[str, frozenset[int]] = {}
    for name in ("generation_config.json", "config.json"):
        try:
            settings: Any = json.loads((directory / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        for part in (settings, settings.get("text_config") if isinstance(settings, dict) else None):
            if isinstance(part, dict):
                found[name] = found.get(name, frozenset()) | _ids(part.get("eos_token_id"))
    return found


def note(tokenizer: Any, directory: Path) -> None:
    """Remember what the files of the model in `directory` name, for all that is asked about its tokenizer."""
    known = _DECLARED.setdefault(tokenizer, {})
    for name, ids in _declared_by(directory).items():
        known[name] = known.get(name, frozenset()) | ids


def _named(tokenizer: Any) -> frozenset[int]:
    """What files and tokenizer name."""
    return frozenset[int]().union(*_named_by(tokenizer).values())


def _named_by(tokenizer: Any) -> dict[str, frozenset[int]]:
    """What files and tokenizer name, each."""
    eos = tokenizer.eos_token_id
    own = {} if eos is None else {"the tokenizer": frozenset({int(eos)})}
    return _DECLARED.get(tokenizer, {}) | own


def is_named(tokenizer: Any, token: int) -> bool:
    """Whether files or tokenizer name this token as an end, whatever the template writes."""
    return token in _named(tokenizer)


def end_ids(tokenizer: Any, settings: Any = None) -> frozenset[int]:
    """The tokens that end an answer: those of the model's files, of its tokenizer and of its chat template.

    `settings`: a generation config besides, for a model that is not in files.
    """
    more = _ids(getattr(settings, "eos_token_id", None))
    return frozenset(more).union(*_ends_by(tokenizer).values())


def _ends_by(tokenizer: Any) -> dict[str, frozenset[int]]:
    """What files, tokenizer and chat template name, each."""
    written = template_end(tokenizer)
    by_template = {} if written is None else {"the chat template": frozenset({written})}
    return _named_by(tokenizer) | by_template


def endings(tokenizer: Any) -> list[Ending]:
    """The tokens that end an answer, by id, each with its text and who names it."""
    by = _ends_by(tokenizer)
    ids = sorted(frozenset[int]().union(*by.values()))
    who = {i: tuple(name for name, named in by.items() if i in named) for i in ids}
    return [Ending(i, str(tokenizer.decode([i], skip_special_tokens=False)), who[i]) for i in ids]


def literals(tokenizer: Any) -> dict[str, int]:
    """Control tokens as they are written: those that the tokenizer calls special, and those that end an answer."""
    ends = end_ids(tokenizer)
    added: Mapping[int, Any] = tokenizer.added_tokens_decoder
    return {str(t.content): i for i, t in added.items() if str(t.content) and (t.special or i in ends)}


def after_answer(tokenizer: Any, tail: str) -> End | None:
    """The end of the turn in what a template writes after an answer; None: no token stands there.

    Of tokens that stand side by side (`<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`) the first that files or tokenizer
    name is the end, else the first. What follows the end is never generated.
    """
    added: Mapping[int, Any] = tokenizer.added_tokens_decoder
    known = sorted(
        ((str(t.content), i) for i, t in added.items() if str(t.content)), key=lambda x: -len(x[0])
    )
    named, first = _named(tokenizer), None
    at = len(tail) - len(tail.lstrip())
    while True:
        found = next(((text, i) for text, i in known if tail.startswith(text, at)), None)
        if found is None:
            return first
        at += len(found[0])
        end = End(tail[:at], found[1])
        if end.token in named:
            return end
        first = first or end


def template_end(tokenizer: Any) -> int | None:
    """The token that the chat template itself puts after an answer; None: there is none, or no template."""
    source = str(getattr(tokenizer, "chat_template", None) or "")
    known = _WRITTEN.get(tokenizer)
    if known is None or known[0] != source:
        known = _WRITTEN[tokenizer] = (source, _template_end(tokenizer))
    return known[1]


def _template_end(tokenizer: Any) -> int | None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": f"{OPEN}!{CLOSE}"}]
    try:
        _, found, tail = template.apply(tokenizer, turns, prompt=False).rpartition(CLOSE)
    except BadInput:
        return None
    end = after_answer(tokenizer, tail) if found else None
    return None if end is None else end.token
