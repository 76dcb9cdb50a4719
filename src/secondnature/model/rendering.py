"""A conversation as token ids, in which the text of people is text (server).

Whoever writes `<|im_end|>` in a message means these ten characters, not the end of a turn. So before a template
renders, each control token in the words of people (or of a tool) is exchanged for a character of private use, which
a template moves, trims around and repeats like any other; afterwards it is known which control tokens the template
wrote. These are then encoded under names that nobody can write, by a copy of the tokenizer that knows only those
names: the rest, the control tokens of people included, is text to it, and all else comes out as it always does.
"""

from __future__ import annotations

import json
import re
import secrets
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from secondnature.model import template, turns
from secondnature.model.lengths import cannot_fit
from secondnature.model.tools import as_templates_expect
from secondnature.records import Message

__all__ = ["Rendering", "Turn", "Words", "control_tokens_in"]

Turn = Message | Mapping[str, Any]
ROLES = frozenset({"assistant", "developer", "function", "system", "tool", "user"})
_PRIVATE = range(0xF0000, 0xFFFFE)
_COPIES: weakref.WeakKeyDictionary[Any, tuple[frozenset[str], Tokenizer, dict[str, str]]] = (
    weakref.WeakKeyDictionary()
)
"""Of each tokenizer: the control tokens, the copy that knows them by other names, and these names."""


def _pattern(words: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Finds the longest of them first, as tokenizers do."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True)))) if words else None


def _renamed(tokenizer: Any, control: Mapping[str, int]) -> tuple[Tokenizer, dict[str, str]]:
    """A copy of the tokenizer that reads control tokens by other names only, and these names."""
    known = _COPIES.get(tokenizer)
    if known is None or known[0] != frozenset(control):
        salt = secrets.token_hex(8)
        names = {text: f"\U0010fff0{salt}:{i}\U0010fff1" for text, i in control.items()}
        parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in parts["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = parts["model"]
        vocabulary: Any = model.get("vocab")
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(text, text): i for text, i in vocabulary.items()}
        elif vocabulary:
            model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        parts["truncation"] = parts["padding"] = parts["post_processor"] = None
        known = _COPIES[tokenizer] = (
            frozenset(control),
            Tokenizer.from_str(json.dumps(parts, ensure_ascii=False)),
            names,
        )
    return known[1], known[2]


def _plain(tokenizer: Any, turn: Turn) -> dict[str, Any]:
    """All that is set; what was said is there even if it is nothing."""
    given = turn.model_dump() if isinstance(turn, Message) else dict(turn)
    return as_templates_expect(tokenizer, {k: v for k, v in given.items() if v is not None or k == "content"})


def _mapped(value: Any, change: Any) -> Any:
    """The same with each text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {k: _mapped(v, change) for k, v in value.items()}
    return [_mapped(v, change) for v in value] if isinstance(value, list | tuple) else value


def _texts(value: Any) -> str:
    """All texts in a value, one after the other."""
    found: list[str] = []
    _mapped(value, found.append)
    return "\n".join(found)


def control_tokens_in(tokenizer: Any, text: str) -> list[str]:
    """The control tokens that a text spells, each once."""
    pattern = _pattern(turns.literals(tokenizer))
    return sorted(set(pattern.findall(text))) if pattern else []


class Words:
    """The words of people in one conversation, each control token in them exchanged for a private character."""

    def __init__(self, tokenizer: Any, written: Any) -> None:
        """`written`: all that people wrote, texts in values of any shape."""
        self._tokenizer = tokenizer
        self._control = turns.literals(tokenizer)
        self._pattern = _pattern(self._control)
        text = _texts(written)
        self.spelled = sorted(set(self._pattern.findall(text))) if self._pattern else []
        """Control tokens in the words of people."""
        free = (c for c in map(chr, _PRIVATE) if c not in text)
        self._stands = {found: next(free) for found in self.spelled}
        self._meant = {ord(c): found for found, c in self._stands.items()}

    def _change(self, text: str) -> str:
        return (
            self._pattern.sub(lambda m: self._stands[m.group()], text)
            if self._pattern and self.spelled
            else text
        )

    def changed(self, value: Any) -> Any:
        """The value, as a template gets it."""
        return _mapped(value, self._change)

    def turn(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        """A turn, as a template gets it: its role is compared with others, and stays as it is."""
        return {k: v if k == "role" and v in ROLES else self.changed(v) for k, v in turn.items()}

    def restored(self, value: Any) -> Any:
        """A value that was changed, as it was written."""
        return _mapped(value, self.text)

    def text(self, rendered: str) -> str:
        """What a rendering says, with the control tokens of people as they were written."""
        return rendered.translate(self._meant)

    def ids(self, rendered: str, limit: int | None = None) -> list[int]:
        """Token ids of a rendering, or of a part of one. Raises ContextOverflow."""
        text = self.text(rendered)
        cannot_fit(self._tokenizer, len(text), limit)
        if text == rendered or self._pattern is None:  # nobody wrote a control token
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        copy, names = _renamed(self._tokenizer, self._control)
        renamed = self._pattern.sub(lambda m: names[m.group()], rendered).translate(self._meant)
        return list(copy.encode(renamed, add_special_tokens=False).ids)


class Rendering:
    """One conversation, rendered as often as it has to be looked at."""

    def __init__(
        self,
        tokenizer: Any,
        messages: Sequence[Turn],
        answer: Turn | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._options = options
        plain = [_plain(tokenizer, m) for m in messages]
        last = None if answer is None else _plain(tokenizer, answer)
        self._words = words = Words(tokenizer, [plain, last, list(tools or [])])
        self._messages = [words.turn(m) for m in plain]
        self.answer: dict[str, Any] = words.turn(last) if last is not None else {}
        """The answer's turn, as the methods below take it."""
        self._tools = words.changed(list(tools)) if tools else None
        self.spelled = words.spelled
        """Control tokens in the words of people."""

    def prompt(self, **more: Any) -> str:
        """Up to where the model answers; `more`: options for this once. Raises BadInput."""
        options = {**(self._options or {}), **more}
        return template.apply(
            self._tokenizer, self._messages, prompt=True, tools=self._tools, options=options
        )

    def conversation(self, *more: Mapping[str, Any], prompt: bool = False) -> str:
        """The conversation and the turns that follow it. Raises BadInput."""
        return template.apply(
            self._tokenizer,
            [*self._messages, *more],
            prompt=prompt,
            tools=self._tools,
            options=self._options,
        )

    def text(self, rendered: str) -> str:
        """What a rendering says, with the control tokens of people as they were written."""
        return self._words.text(rendered)

    def ids(self, rendered: str, limit: int | None = None) -> list[int]:
        """Token ids of a rendering, or of a part of one. Raises ContextOverflow."""
        return self._words.ids(rendered, limit)
