# pyright: reportMissingImports=false
"""The engine core finds its worker's write counters, whose epoch its prefix cache follows (vLLM's engine core).

It needs no weight and, where these lie on a GPU, no GPU. With one rank on a GPU, core and worker are one process.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from secondnature.engines.vllm.cache import EPOCHS, PARTS
from secondnature.errors import WeightsError
from secondnature.weights.attach import counters

__all__ = ["install"]


def install() -> None:
    """Add to vLLM's engine core; later calls change nothing."""
    from vllm.v1.engine.core import EngineCore

    if hasattr(EngineCore, "secondnature_cache"):
        return
    # when the weights are loaded; not its constructor, which is what loads this plug-in
    start = EngineCore._initialize_kv_caches

    @functools.wraps(start)
    def start_and_watch(self: Any, *args: Any, **kwargs: Any) -> Any:
        manifests = self.collective_rpc("secondnature_manifest")
        if len(manifests) != 1:
            raise WeightsError(
                f"{len(manifests)} workers hold weights; expected 1", "start vLLM with one worker"
            )
        EPOCHS.watch(counters(json.dumps(json.loads(manifests[0])["arena"])))
        return start(self, *args, **kwargs)

    EngineCore._initialize_kv_caches = start_and_watch
    EngineCore.secondnature_cache = _cache


def _cache(self: Any) -> str:
    """A method for `call_utility`: the field `cache` of `wire.Wiring`."""
    if not self.vllm_config.cache_config.enable_prefix_caching:
        return "off"
    return "salted" if EPOCHS.parts == PARTS and EPOCHS.watching else "unsalted"
