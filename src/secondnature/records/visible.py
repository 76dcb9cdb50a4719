"""Text of models and people as it may be shown: what would steer a terminal or reorder a line is made visible.

Character by character, so that a sequence split over two pieces of a stream is caught as well (any process).
"""

from __future__ import annotations

_SHOWN = {
    code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"
}  # ESC is shown as its picture
_SHOWN[0x7F] = 0x2421
_ESCAPED = [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {code: f"\\u{code:04x}" for code in _ESCAPED}
_TABLE = {**_SHOWN, **_ESCAPES}


def visible(text: str) -> str:
    """The text, its control characters (but newline and tab) and bidi overrides as pictures or `\\u` escapes."""
    return text.translate(_TABLE)


def visible_json(text: str) -> str:
    """The same for JSON, which has escaped the first 32 already: what is left becomes escapes that read back."""
    return text.translate({**_ESCAPES, 0x7F: "\\u007f"})
