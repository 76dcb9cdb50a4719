"""What a model's config says about its limits (any process that has a config; imports no transformers).

Apart from `load`, so that the step and the optimizer can ask without what reading a model from disk takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from secondnature.errors import UnsupportedModel

__all__ = ["UNSTATED", "context_limit"]

UNSTATED = 2048
"""Tokens, where a model has no table of positions and no word of how many it can read (ALiBi)."""


def context_limit(config: Any) -> int:
    """How many tokens a model of this config can read, prompt and answer together.

    With LongRoPE it is the length up to which one set of frequencies holds: beyond it, transformers takes others
    for all rows of a forward at once, so that an answer would depend on who else asks.

    Raises:
        UnsupportedModel: the config does not say, or says no number.
    """
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions"):
        limit = getattr(text, name, None)
        if limit is not None:
            break
    else:
        if hasattr(text, "max_position_embeddings"):
            raise UnsupportedModel(
                "config has max_position_embeddings = None; expected a positive number",
                "say in config.json how many tokens the model reads",
            )
        limit = UNSTATED
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise UnsupportedModel(f"config has {name} = {limit!r}; expected a positive number")
    for rope in _ropes(text):
        if rope.get("rope_type", rope.get("type")) == "longrope":
            short = rope.get("original_max_position_embeddings")
            short = short or getattr(text, "original_max_position_embeddings", None)
            limit = min(limit, short) if isinstance(short, int) and short > 0 else limit
    return limit


def _ropes(text: Any) -> Iterator[Mapping[str, Any]]:
    """The rotary settings of a config: one, or one for each kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(text, name, None)
        if isinstance(found, Mapping):
            yield found
            yield from (inner for inner in found.values() if isinstance(inner, Mapping))
