"""What a step may hold, and freed memory that goes back to the system (trainer).

glibc keeps what lies between things that live on, and a lesson's sums live on among the thousands of short-lived
tensors of a step: more was kept than was in use.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

__all__ = ["MAX_ACTIVATION_BYTES", "give_back", "room"]

MAX_ACTIVATION_BYTES = 2**29
"""Kept for backward by one forward, about."""
MIN_ROOM = 64
"""Tokens: of a larger model, too, an answer goes through in one piece."""


def room(model: nn.Module, max_bytes: int = MAX_ACTIVATION_BYTES) -> int:
    """How many tokens go through one forward whose activations backward needs; an estimate from the config.

    Per layer and token some 14 vectors of the hidden size and 5 of the MLP's are kept in fp32: 1.9 MB a token of
    SmolLM2 (30 layers of 576 and 1,536).
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    hidden = int(text.hidden_size)
    wide = getattr(text, "intermediate_size", None)  # of mixtures perhaps a list, or not there
    per_layer = 14 * hidden + 5 * (wide if isinstance(wide, int) else 4 * hidden)
    return max(MIN_ROOM, max_bytes // (4 * int(text.num_hidden_layers) * per_layer))


@cache
def _trim() -> Callable[[int], object]:
    """glibc's own; another C library has nothing of the kind, and does not keep so much."""
    return getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)


def give_back(*, collect: bool = False) -> None:
    """Return what is free; with `collect` also what only circles of references hold."""
    if collect:
        gc.collect()
    _trim()(0)
