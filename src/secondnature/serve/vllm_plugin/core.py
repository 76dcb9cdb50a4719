# pyright: reportMissingImports=false
"""The engine core's side: it watches the weights' epoch, and its parent (vLLM's engine core).

vLLM's engine core does not notice when its API server is killed: it would go on holding the weights, with nobody to
ask it. So it ends with its parent, and its worker with it; the arena vanishes with the last of them.
"""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from typing import Any

from secondnature.errors import WeightsError
from secondnature.serve.vllm_plugin.cache import EPOCHS, PARTS
from secondnature.weights.arena import Arena

__all__ = ["install"]

LOG = logging.getLogger("secondnature")
GRACE_S = 10.0
"""What vLLM has, to end in order, after its parent died."""


def install() -> None:
    """Add to vLLM's engine core; later calls change nothing."""
    from vllm.v1.engine.core import EngineCore

    if hasattr(EngineCore, "secondnature_cache"):
        return
    start = (
        EngineCore._initialize_kv_caches
    )  # when the weights are loaded; its constructor loads this plug-in

    @functools.wraps(start)
    def start_and_watch(self: Any, *args: Any, **kwargs: Any) -> Any:
        _end_with_parent()
        manifests = self.collective_rpc("secondnature_manifest")
        if len(manifests) != 1:
            raise WeightsError(
                f"{len(manifests)} workers hold weights; expected 1", "start vLLM with one worker"
            )
        EPOCHS.watch(Arena.attach(json.dumps(json.loads(manifests[0])["arena"])))
        return start(self, *args, **kwargs)

    EngineCore._initialize_kv_caches = start_and_watch
    EngineCore.secondnature_cache = _cache


def _cache(self: Any) -> str:
    """A method for `call_utility`: the field `cache` of `wire.Wiring`."""
    if not self.vllm_config.cache_config.enable_prefix_caching:
        return "off"
    return "salted" if EPOCHS.parts == PARTS and EPOCHS.watching else "unsalted"


def _end_with_parent() -> None:
    """In a process of its own: end, in order if that is possible, when the process that started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return  # the engine runs in its caller's process

    def wait() -> None:
        parent.join()
        LOG.warning("secondnature: the API server is gone; the engine ends")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os._exit(1)

    threading.Thread(target=wait, name="secondnature-parent", daemon=True).start()
