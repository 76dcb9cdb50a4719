# pyright: reportMissingImports=false
"""vLLM's processes wait for each other without keeping a core busy, so that the trainer gets one.

On CPUs the engine core and its worker look for each other's messages in a loop around `sched_yield`: two cores at
full load while anything is generated, whoever else needs them. On Linux 6.18 such a loop was seen to starve a
process beside it for up to 17 s (docs/decisions/waiting-without-a-core.md). Here it sleeps between two looks.
"""

from __future__ import annotations

import time

__all__ = ["PAUSE_S", "install"]

PAUSE_S = 50e-6
"""Between two looks: far below a token's milliseconds on a CPU. Linux adds its timer slack, another 50 us."""


def install() -> None:
    """Replace `sched_yield` in this process (engine core, worker), on CPUs; later calls change nothing."""
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        shm_broadcast.sched_yield = _pause


def _pause() -> None:
    time.sleep(PAUSE_S)
