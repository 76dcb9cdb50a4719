"""Opening an arena of whichever kind its manifest is of: host memory, or a GPU's (trainer, API server, core)."""

from __future__ import annotations

import json
import os
from typing import Any

from secondnature.errors import WeightsError
from secondnature.weights import memory_file
from secondnature.weights.arena import Arena
from secondnature.weights.counters import HEADER_BYTES, Counters
from secondnature.weights.cuda import DeviceArena

__all__ = ["attach", "counters"]


def _plan(manifest: str) -> dict[str, Any]:
    try:
        plan = json.loads(manifest)
    except ValueError:
        plan = None
    if not isinstance(plan, dict):
        raise WeightsError("not an arena's manifest", "server and trainer differ in version?")
    return plan


def attach(manifest: str) -> Arena:
    """Map another process's arena, or one's own: no byte is copied.

    Raises:
        WeightsError: the owner is gone, the manifest does not fit, or this process does not see the owner's GPU.
    """
    return DeviceArena.open(manifest) if "storages" in _plan(manifest) else Arena.attach(manifest)


def counters(manifest: str) -> Counters:
    """Only the write counters of an arena, for who schedules: no weight is mapped, and no GPU needed.

    Raises:
        WeightsError: as `attach`.
    """
    plan = _plan(manifest)
    try:
        fd = memory_file.open_(int(plan["pid"]), int(plan["fd"]))
    except (KeyError, TypeError, ValueError) as e:
        raise WeightsError(
            f"not an arena's manifest: {e!r}", "server and trainer differ in version?"
        ) from None
    try:
        found = Counters(memoryview(memory_file.mapped(fd, HEADER_BYTES)))
    except (OSError, ValueError) as e:
        raise WeightsError(f"the mapped memory is not an arena: {e}", "restart the server") from None
    finally:
        os.close(fd)
    if not found.is_arena:
        raise WeightsError("the mapped memory is not an arena", "restart the server")
    return found
