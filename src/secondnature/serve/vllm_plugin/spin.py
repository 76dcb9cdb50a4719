# pyright: reportMissingImports=false
"""vLLM's processes wait for each other without keeping a core busy, so that the trainer gets one.

On CPUs the engine core and its worker look for each other's messages in a loop around `sched_yield`: two cores at
full load while anything is generated, whoever else needs them. Linux 6.18 (until "sched/fair: Fix zero_vruntime
tracking fix", April 2026) even lets such a loop starve a process beside it for many seconds. Here the loop sleeps
between two looks.
"""

from __future__ import annotations

import time

__all__ = ["PAUSE_S", "install"]

PAUSE_S = 50e-6
"""Between two looks: far below a token's milliseconds on a CPU. Linux adds its timer slack, another 50 us."""


def install() -> None:
    """In this process (engine core, worker), on CPUs; harmless when called again."""
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        shm_broadcast.sched_yield = _pause


def _pause() -> None:
    time.sleep(PAUSE_S)
