"""What each layer of a model keeps of the text it has read: keys and values, recurrences, nothing (any engine).

transformers names it by the classes of its own cache, one per layer of a config. They are read here, and only those
that can be batched and frozen are taken: which of its keys a layer looks at (a window, a chunk) is left to
transformers' masks, so a sliding layer keeps all of them, as a full one does. A recurrence is a pair: the last
columns of a convolution, and a state that is carried from token to token; some layers have only one of the two
(LFM2 a convolution), some have attention beside it (Falcon-H1).
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from secondnature.errors import UnsupportedModel

__all__ = ["BothLayer", "EmptyLayer", "Keeps", "kept", "reading"]

EmptyLayer: Any = getattr(cache_utils, "DummyLayer", None)
"""What transformers puts where a layer keeps nothing of its own: it takes those of another, or has no attention."""
BothLayer: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)
"""Attention and recurrences in one layer. None, as above: this version of transformers has no such models."""
_BOTH_SLIDING: Any = getattr(cache_utils, "LinearAttentionAndSlidingWindowAttentionLayer", None)


@dataclass(frozen=True)
class Keeps:
    """The kinds of state of one layer."""

    attention: bool
    """Keys and values (B, H, S, D)."""
    recurrences: int
    """Pairs of a convolution's columns (B, channels, kernel) and a recurrent state (B, ...)."""


def kept(config: Any) -> list[Keeps]:
    """Per layer of a causal language model of transformers what it keeps.

    Raises:
        UnsupportedModel: a layer keeps something else, or transformers' cache has no word for it.
    """
    try:
        layers = DynamicCache(config=config).layers
    except (KeyError, TypeError, AttributeError) as e:  # a kind of layer that its own table does not have
        raise UnsupportedModel(
            f"a {config.model_type} keeps a state that transformers' cache does not know ({e!r})",
            "models of this kind cannot be served and trained yet",
        ) from e
    if not layers:
        return [Keeps(True, 0)] * int(config.get_text_config(decoder=True).num_hidden_layers)
    return [_kept(index, layer, config) for index, layer in enumerate(layers)]


def _kept(index: int, layer: Any, config: Any) -> Keeps:
    kind = type(layer)
    if kind in (DynamicLayer, DynamicSlidingWindowLayer):
        return Keeps(True, 0)
    if kind is LinearAttentionLayer:
        return Keeps(False, layer.number_of_states)
    if kind is EmptyLayer:
        return Keeps(False, 0)
    if kind in (BothLayer, _BOTH_SLIDING):
        return Keeps(True, layer.number_of_states)
    raise UnsupportedModel(
        f"layer {index} of a {config.model_type} keeps another state ({kind.__name__}) than attention or a "
        "recurrence",
        "models of this kind cannot be served and trained yet",
    )


def reading(module: nn.Module, cache: Cache | None, places: Tensor) -> dict[str, Any]:
    """The arguments with which a model, or its body, reads on from a cache (None: from the beginning).

    `places`: the positions (B or 1, T) of the new tokens, for a module that takes them.

    Raises:
        UnsupportedModel: it takes no cache.
    """
    name, takes_places = _takes(type(module))
    if name is None:
        raise UnsupportedModel(
            f"{type(module).__name__} takes no state of a text that it has read",
            "models of this kind cannot be served and trained yet",
        )
    if cache is None:
        return {"use_cache": False}
    return {"use_cache": True, name: cache} | ({"position_ids": places} if takes_places else {})


@functools.cache
def _takes(kind: type[nn.Module]) -> tuple[str | None, bool]:
    """What the module calls its cache, and whether it can be told positions."""
    takes = inspect.signature(kind.forward).parameters
    name = next((n for n in ("past_key_values", "cache_params") if n in takes), None)
    rest = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    return name, rest or "position_ids" in takes
