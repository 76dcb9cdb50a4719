"""Layers whose activations are computed a second time in backward, instead of being kept (any engine).

What backward needs of a layer is then its input; with a frozen context that is one vector per continuation token
and layer. One more forward of the continuations (a third of their forward and backward) buys it: Chen et al. 2016,
arXiv 1604.06174. transformers' own switch does the same, but turns caches off, which a frozen context is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from secondnature.errors import UnsupportedModel

__all__ = ["recomputed"]


@contextlib.contextmanager
def recomputed(model: nn.Module) -> Generator[int]:
    """While open, forwards keep only the layers' inputs for backward, which may run inside only; yields how many.

    Raises:
        UnsupportedModel: it has no list of layers.
    """
    layers = _layers(model)
    for layer in layers:
        layer.forward = _twice(layer.forward)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def _twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers."""
    config: Any = model.config
    wanted = config.get_text_config(decoder=True).num_hidden_layers
    body: Any = getattr(model, "base_model", model)
    for module in body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return list(module)
    raise UnsupportedModel(
        f"{type(model).__name__} has no list of {wanted} layers", "train without recomputing activations"
    )
