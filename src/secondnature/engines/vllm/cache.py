# pyright: reportMissingImports=false
"""Nothing computed before a write is reused after it: the prefix cache follows the epoch (vLLM's core; law 5).

vLLM keeps the keys, values and recurrent states of prompts by a hash of their tokens, fixed when a request is
made. A salt that a client chooses is hashed with them, but cannot help: a request that waits, or that runs into a
write, would leave blocks of other weights under it. So all is done here, where blocks are looked up and kept:

    salt    a request is born in an epoch, and the first block's hash holds it
    lookup  a request whose epoch is over finds nothing
    store   a request whose epoch is over, or that was born while somebody wrote, leaves nothing

The epoch counts the beginnings and the ends of writes, so it is odd while somebody writes; it is never reused,
also not after an undo or a restart (a nonce). Blocks of an epoch that is over are never hit; they age out.
"""

from __future__ import annotations

import functools
import secrets
from typing import Any

from secondnature.weights.counters import Counters

__all__ = ["EPOCHS", "PARTS", "Epochs", "install"]


PARTS = frozenset({"salt", "lookup", "store"})


class Epochs:
    """Which epoch it is, in the process that schedules."""

    def __init__(self) -> None:
        self._counters: Counters | None = None
        self._nonce = secrets.token_hex(8)
        self.parts = set(PARTS)
        """What is done; a test takes one away to see that it matters."""

    @property
    def watching(self) -> bool:
        """Are the weights known?"""
        return self._counters is not None

    def watch(self, counters: Counters) -> None:
        """From now on, the epoch of the weights that these count."""
        self._counters = counters

    def now(self) -> int:
        """Even: nobody writes. Never goes back. 0 before the weights are known."""
        if self._counters is None:
            return 0
        begun, done = self._counters.writes
        return 2 * begun - (begun != done)

    def salt(self, epoch: int, given: str | None) -> str:
        """What is hashed into the first block of a request that was born in `epoch`; `given`: the client's own."""
        return f"{self._nonce}.{epoch}" + (f".{given}" if given else "")

    def fresh(self, request: Any) -> bool:
        """Was everything that this request computed so far computed with the weights as they are?"""
        born = getattr(request, "secondnature_epoch", 0)
        return born % 2 == 0 and born == self.now()


EPOCHS = Epochs()


def install() -> None:
    """Change vLLM's request, lookup and store; later calls change nothing."""
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request

    if hasattr(KVCacheManager, "secondnature"):
        return
    KVCacheManager.secondnature = True
    make = Request.from_engine_core_request.__func__
    enabled = KVCacheManager.prefix_cache_lookup_enabled
    store = KVCacheCoordinator.cache_blocks

    @functools.wraps(make)
    def make_salted(cls: type, request: Any, block_hasher: Any) -> Any:
        epoch = EPOCHS.now()
        if "salt" in EPOCHS.parts:
            request.cache_salt = EPOCHS.salt(epoch, request.cache_salt)
        made = make(cls, request, block_hasher)
        made.secondnature_epoch = epoch
        return made

    @functools.wraps(enabled)
    def enabled_if_fresh(self: Any, request: Any) -> bool:
        return enabled(self, request) and ("lookup" not in EPOCHS.parts or EPOCHS.fresh(request))

    @functools.wraps(store)
    def store_if_fresh(self: Any, request: Any, num_computed_tokens: int) -> None:
        if "store" not in EPOCHS.parts or EPOCHS.fresh(request):
            store(self, request, num_computed_tokens)

    Request.from_engine_core_request = classmethod(make_salted)
    KVCacheManager.prefix_cache_lookup_enabled = enabled_if_fresh
    KVCacheCoordinator.cache_blocks = store_if_fresh
