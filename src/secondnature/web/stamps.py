"""How an answer says which weights gave it (law 5): fields and headers, for both engines (server)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secondnature.engines.generation import Span

__all__ = ["headers_of", "merged", "stamps"]


def merged(spans: Sequence[Span | None]) -> Span | None:
    """The stamp of several answers in one body: from the first look at the weights to the last."""
    found = [span for span in spans if span is not None]
    if not found:
        return None
    first = min((s.first for s in found), key=lambda stamp: stamp.epoch)
    last = max((s.last for s in found), key=lambda stamp: stamp.epoch)
    changed = any(s.changed for s in found) or first.epoch != last.epoch or first.version != last.version
    return Span(first, last, changed, any(s.trial for s in found))


def stamps(span: Span | None) -> dict[str, Any]:
    """The stamp's fields in a body."""
    if span is None:
        return {}
    return {
        "weights_version": span.last.version,
        "weights_span": {
            "first": span.first.version,
            "last": span.last.version,
            "first_epoch": span.first.epoch,
            "last_epoch": span.last.epoch,
            "changed": span.changed,
        },
        "trial": span.trial,
        "system_fingerprint": span.last.version,
    }


WEIGHTS_HEADERS = ("x-weights-version", "x-weights-span", "x-weights-trial")
"""What a web page of another origin may read, where one is allowed."""


def headers_of(span: Span | None) -> dict[str, str]:
    """The stamp in headers."""
    if span is None:
        return {}
    return {
        "x-weights-version": span.last.version,
        "x-weights-span": f"{span.first.version}..{span.last.version}" + (" changed" if span.changed else ""),
        "x-weights-trial": "true" if span.trial else "false",
    }
