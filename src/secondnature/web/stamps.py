"""How an answer says which weights gave it (law 5): fields and headers, for both engines (server)."""

from __future__ import annotations

from typing import Any

from secondnature.engines.base import Span

__all__ = ["headers_of", "stamps"]


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
    }


def headers_of(span: Span | None) -> dict[str, str]:
    """The stamp in headers."""
    if span is None:
        return {}
    return {
        "x-weights-version": span.last.version,
        "x-weights-span": f"{span.first.version}..{span.last.version}" + (" changed" if span.changed else ""),
        "x-weights-trial": "true" if span.trial else "false",
    }
