"""Freed memory goes back to the system (trainer).

glibc keeps what lies between things that live on, and a lesson's sums live on among the thousands of short-lived
tensors of a step: more was kept than was in use.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import cache

__all__ = ["give_back"]


@cache
def _trim() -> Callable[[int], object]:
    """glibc's own; another C library has nothing of the kind, and does not keep so much."""
    return getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)


def give_back(*, collect: bool = False) -> None:
    """Return what is free; with `collect` also what only circles of references hold."""
    if collect:
        gc.collect()
    _trim()(0)
