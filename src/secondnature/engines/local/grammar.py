"""Answers of a given shape: which tokens may come next, by llguidance (process A; compiled in the caller's thread).

A schema is compiled once per request, beside the event loop, and each answer goes on with a copy of its own. What
is forbidden is masked before a token is drawn; log-probabilities stay the model's. JSON is written as
`json.dumps` writes it (one space after `,` and `:`): free white space is where small models never come back from.
A model that thinks first is let think: the shape begins behind the closed block of thoughts.

llguidance is an extra (`secondnature[json]`): without it everything else works, and a schema is refused by name.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from secondnature.errors import BadInput
from secondnature.model.thoughts import Thoughts

__all__ = ["Grammars", "Shape"]

MAX_SCHEMA_CHARACTERS = 200_000


class Shape:
    """What one answer may still become. A compiled one is a pattern: each answer begins with a `fresh` copy."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def fresh(self) -> Shape:
        """A copy for one answer."""
        return Shape(self._matcher.deep_copy(), self._vocab_size)

    @property
    def whole(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def mask(self, logits: Tensor) -> None:
        """Set the logits [V] of every token that may not come next to -inf, in place.

        Raises:
            BadInput: the schema turned out too hard to follow.
        """
        bits = torch.zeros(-(-self._vocab_size // 32), dtype=torch.int32)
        self._matcher.unsafe_compute_mask_ptr(bits.data_ptr(), bits.numel() * 4)
        self._check()
        shifts = torch.arange(32, dtype=torch.int32)
        allowed = ((bits[:, None] >> shifts) & 1).flatten()[: len(logits)].bool()
        logits.masked_fill_(~allowed, float("-inf"))

    def take(self, token: int) -> None:
        """The next token. Raises BadInput."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise BadInput(
                f"the schema cannot be followed: {_words(self._matcher.get_error())}", "simplify the schema"
            )


class Grammars:
    """Compiles schemas for one tokenizer; safe from any thread."""

    def __init__(self, tokenizer: Any, vocab_size: int, stop_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = sorted(stop_ids)
        self._lock = threading.Lock()
        self._known: Any = None

    def compile(self, schema: Mapping[str, Any], thoughts: Thoughts | None = None) -> Shape:
        """The shape of the JSON that fits a schema.

        Args:
            thoughts: that the answer may begin with.

        Raises:
            BadInput: llguidance is not installed, or cannot compile the schema; says what it found.
        """
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise BadInput(
                "answers of a given shape (`response_format`, `text.format`, a `tool_choice` that demands a call) "
                "need the package llguidance, which this server does not have",
                "on the server: pip install 'secondnature[json]'",
            ) from None
        text = json.dumps(schema)
        if '"allOf"' not in text:  # parts that are joined name each other's properties
            text = json.dumps(_closed(schema))
        if len(text) > MAX_SCHEMA_CHARACTERS:
            raise BadInput(
                f"a schema of {len(text):,} characters; at most {MAX_SCHEMA_CHARACTERS:,}",
                "simplify the schema",
            )
        vocabulary = self._vocabulary()
        written: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=written)
        except ValueError as e:
            raise BadInput(f"the schema cannot be read: {_words(str(e))}", "mend the schema") from None
        if thoughts is not None:
            json_part = json.dumps({"x-guidance": written, **json.loads(text)})
            grammar = LLMatcher.grammar_from_lark(self._behind(thoughts, json_part))
        matcher = LLMatcher(vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise BadInput(
                f"the schema cannot be compiled: {_words(matcher.get_error())}", "mend or simplify the schema"
            )
        return Shape(matcher, self._vocab_size)

    def _behind(self, thoughts: Thoughts, schema: str) -> str:
        """JSON behind thoughts, in llguidance's dialect of Lark; special tokens are no text there, but ids."""
        special = {
            str(t.content): i
            for i, t in self._tokenizer.backend_tokenizer.get_added_tokens_decoder().items()
            if t.special
        }

        def mark(text: str) -> str:
            return f"<[{special[text]}]>" if text in special else json.dumps(text, ensure_ascii=False)

        if thoughts.close in special:
            block = f"block: /(?s:.*)/ {mark(thoughts.close)}"
        else:
            block = f"block[suffix={mark(thoughts.close)}]: /(?s:.*)/"
        begin = "block SPACE" if thoughts.opened else f"({mark(thoughts.open)} block SPACE)?"
        return f"start: {begin} json\n{block}\nSPACE: /[ \\n]*/\njson: %json {schema}"

    def _vocabulary(self) -> Any:
        """The tokenizer as llguidance reads it: made once, for it takes a second where there are many tokens."""
        from llguidance import LLTokenizer

        with self._lock:
            if self._known is None:
                backend = getattr(self._tokenizer, "backend_tokenizer", None)
                if backend is None:
                    raise BadInput(
                        "answers of a given shape need a fast tokenizer", "add tokenizer.json to the model"
                    )
                ends = self._stop_ids or self._tokenizer.eos_token_id
                try:
                    self._known = LLTokenizer(backend.to_str(), n_vocab=self._vocab_size, eos_token=ends)
                except ValueError as e:
                    raise BadInput(
                        f"llguidance cannot read this model's tokenizer: {_words(str(e))}",
                        "ask without a schema",
                    ) from None
            return self._known


def _closed(schema: Any) -> Any:
    """A schema whose objects have the properties that it names, unless it says something of others.

    What is written fits the schema as it was given all the same; a model that may invent properties seldom stops.
    """
    if not isinstance(schema, Mapping):
        return schema
    given = cast("Mapping[str, Any]", schema)
    found = dict(given)
    for key in ("properties", "$defs", "definitions"):
        if isinstance(given.get(key), Mapping):
            found[key] = {name: _closed(part) for name, part in given[key].items()}
    for key in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(given.get(key), list):
            found[key] = [_closed(part) for part in given[key]]
    if "items" in given:
        found["items"] = _closed(given["items"])
    if "properties" in given and not given.keys() & {"patternProperties", "unevaluatedProperties", "$ref"}:
        found.setdefault("additionalProperties", False)
    return found


def _words(error: str) -> str:
    """An error on one line, cut."""
    return " ".join(error.split())[:500] or "no reason given"
