"""From token ids to text, piece by piece (process A).

A token may be half a character, or the beginning of a stop string. `Detokenizer` releases only whole characters,
`StopScanner` only text that cannot become part of a stop string any more; so what a client has read is never taken
back. Decoding looks at a short window (the tokens since the last clean cut and a few before it, which settle the
spaces of sentencepiece vocabularies), so its cost does not grow with the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

REPLACEMENT = "\ufffd"
_BYTE = re.compile("<0x([0-9A-F]{2})>")
LOOK_BACK = 4
"""Tokens of the prompt that are decoded together with the first new one."""
MAX_HELD = 3
"""An unfinished UTF-8 character is at most three bytes, hence at most three replacement characters."""

MAX_SILENT = 16
"""After so many tokens without text (special tokens) the window moves on."""

Decode = Callable[[Sequence[int]], str]


def decoder(tokenizer: Any, marks: Collection[str] = ()) -> Decode:
    """The function ids -> text of a transformers tokenizer: special tokens left out but for `marks`, no clean-up
    of spaces."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and marks:
        added = backend.get_added_tokens_decoder()
        hidden = frozenset(i for i, t in added.items() if t.special and t.content not in marks)
        return lambda ids: backend.decode([i for i in ids if i not in hidden], skip_special_tokens=False)
    if backend is not None:
        # straight to the Rust tokenizer: the wrapper costs ten times as much, per token and row
        return lambda ids: backend.decode(list(ids), skip_special_tokens=True)
    return lambda ids: tokenizer.decode(
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


Entry = tuple[str, bytes | None]
"""What one token is: how it is shown, and what it adds to a text (None: nothing, as special tokens do)."""


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable ones for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def vocabulary(tokenizer: Any) -> Callable[[int], Entry]:
    """The function id -> `Entry` of a transformers tokenizer, read from the vocabulary's entry.

    Half a character has bytes there, which no decoded text has: the bytes of an answer's tokens, joined, are the
    UTF-8 of its text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decode = decoder(tokenizer)
    if backend is None:
        return lambda token: (decode([token]), decode([token]).encode())
    special = {i: str(t.content) for i, t in backend.get_added_tokens_decoder().items() if t.special}
    raw = _raw_entry(backend, decode)

    def entry(token: int) -> Entry:
        if token in special:
            return special[token], None
        found = raw(token)
        return found.decode("utf-8", "replace"), found

    return entry


def _raw_entry(backend: Any, decode: Decode) -> Callable[[int], bytes]:
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    steps = {str(step["type"]) for step in state.get("decoders", [state]) if "type" in step}
    if "ByteLevel" in steps:
        table = _bytes_of_characters()

        def of_bytes(token: int) -> bytes:
            text = backend.id_to_token(token) or ""
            found = [table.get(c) for c in text]
            return text.encode() if None in found else bytes(b for b in found if b is not None)

        return of_bytes
    if steps & {"ByteFallback", "Metaspace"}:

        def of_pieces(token: int) -> bytes:
            text = backend.id_to_token(token) or ""
            byte = _BYTE.fullmatch(text)
            return bytes([int(byte[1], 16)]) if byte else text.replace("\u2581", " ").encode()

        return of_pieces
    return lambda token: decode([token]).encode()


class Detokenizer:
    """The text of a growing list of tokens, whole characters only."""

    def __init__(self, decode: Decode, prompt_ids: Sequence[int] = ()) -> None:
        """`prompt_ids`: what stands before the first token; it is not part of the text."""
        self._decode = decode
        self._window: list[int] = list(prompt_ids[-LOOK_BACK:])
        self._cut = len(self._window)
        """The window's tokens before this one are fully released; they are only context."""
        self._base = decode(self._window) if self._window else ""
        if self._base.endswith(REPLACEMENT):
            self._window, self._cut, self._base = [], 0, ""
        self._released = 0
        """Characters after `_base` that were released already."""

    def feed(self, token: int) -> str:
        """The text that this token settles; empty while a character is unfinished."""
        self._window.append(token)
        text = self._decode(self._window)
        start = len(self._base) + self._released
        tail = text[start:]
        held = min(len(tail) - len(tail.rstrip(REPLACEMENT)), MAX_HELD)
        settled = tail[: len(tail) - held]
        if held:
            self._released += len(settled)
        elif tail or len(self._window) - self._cut > MAX_SILENT:
            self._window, self._cut = self._window[self._cut :], len(self._window) - self._cut
            self._base, self._released = self._decode(self._window), 0
        return settled


class StopScanner:
    """Finds the first stop string in a stream of text and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [s for s in stops if s]
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def feed(self, text: str) -> str:
        """The text that is safe to show; after a stop string was `found`, nothing more is."""
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        hits = [(at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if hits:
            at, self.found = min(hits)
            self._held = ""
            return text[:at]
        longest = max(map(len, self._stops)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            tail = text[-length:]
            if any(s.startswith(tail) for s in self._stops):
                self._held = tail
                return text[:-length]
        self._held = ""
        return text

    def flush(self) -> str:
        """What was held back when the text ends for another reason than a stop string."""
        text, self._held = self._held, ""
        return text
