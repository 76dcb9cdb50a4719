"""What a model's config says about its limits (any process that has a config; imports no transformers).

Apart from `load`, so that the step and the optimizer can ask without what reading a model from disk takes.
"""

from __future__ import annotations

from typing import Any

from secondnature.errors import UnsupportedModel

__all__ = ["context_limit"]


def context_limit(config: Any) -> int:
    """How many tokens a model of this config can read, prompt and answer together.

    Raises:
        UnsupportedModel: the config does not say.
    """
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        raise UnsupportedModel(f"config has max_position_embeddings = {limit!r}; expected a positive number")
    return limit
