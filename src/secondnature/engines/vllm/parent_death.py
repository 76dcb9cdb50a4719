"""The engine core ends with the API server that started it, however that ends (vLLM's core).

vLLM's worker notices when its core is gone, but the core does not notice when the API server was killed: weights,
caches and a processor would be held for ever. Nothing here imports vLLM.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

__all__ = ["install"]

LOG = logging.getLogger("secondnature")
CORE = "EngineCore"
"""What the name begins with under which vLLM starts it."""
GRACE_S = 10.0

_watched: list[int] = []


def install() -> None:
    """In vLLM's core: watch the process that started it; later calls, and calls elsewhere, change nothing."""
    parent = multiprocessing.parent_process()
    if (
        parent is None
        or not multiprocessing.current_process().name.startswith(CORE)
        or os.getpid() in _watched
    ):
        return
    _watched.append(os.getpid())
    threading.Thread(target=_follow, args=(parent,), name="secondnature-orphan", daemon=True).start()


def _follow(parent: BaseProcess) -> None:
    """Wait for the parent's end, then end: first as vLLM does it, then at once."""
    wait([parent.sentinel])
    LOG.warning("secondnature: the API server (process %s) is gone; the engine ends", parent.pid)
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.kill(os.getpid(), number)
        time.sleep(GRACE_S)
