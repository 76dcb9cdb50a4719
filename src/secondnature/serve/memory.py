"""Freed memory of the engine goes back to the system while the server works (server).

glibc keeps it: in the arena of the engine's thread large buffers come and go between small things that live on. Of
a server of SmolLM2 (weights of 0.27 GB) that had held 1.5 GB for its own after some lessons, 1.2 lay in threads'
arenas. So the engine's thread looks now and then how much the process holds, and where that has grown returns what
is free. A look costs some microseconds; returning costs milliseconds, and the pages must be had again, so growth
has to be worth it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from secondnature.train.memory import give_back

__all__ = ["Growth", "anonymous_bytes"]

MIN_BYTES = 128 * 2**20
"""Growth since the last time that is worth returning memory for."""
LOOK_S = 0.25
"""Between two looks while requests are being answered."""


def anonymous_bytes() -> int:
    """What this process holds of its own: neither shared memory nor mapped files."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class Growth:
    """What the process holds above what it held when memory was returned last; for one thread."""

    def __init__(self, min_bytes: int = MIN_BYTES, look_s: float = LOOK_S) -> None:
        self._min_bytes = min_bytes
        self._look_s = look_s
        self._least = anonymous_bytes()
        self._looked = time.monotonic()

    def look(self, *, busy: bool) -> bool:
        """Give freed memory back if there may be enough of it; whether it was done. Not `busy`: look anyway."""
        now = time.monotonic()
        if busy and now - self._looked < self._look_s:
            return False
        self._looked = now
        held = anonymous_bytes()
        if held < self._least + self._min_bytes:
            self._least = min(self._least, held)
            return False
        give_back()
        self._least = anonymous_bytes()
        return True
