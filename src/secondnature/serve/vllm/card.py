# pyright: reportMissingImports=false
"""On a GPU, what vLLM may not be told, and what its memory goes to (vLLM's API server).

vLLM's own default is nearly all of the card, before a trainer exists. Where the user does not say how much keys and
values may have, they get what the trainer leaves. Nothing here makes a context on the card.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secondnature.errors import WeightsError
from secondnature.serve import gpu

__all__ = ["plan_memory", "refusals"]

LOG = logging.getLogger("secondnature")
Refusal = tuple[bool, str, str]
"""(is it so, what was found, what to do)."""
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
ENGINE_BYTES = 2 << 30
"""Activations and graphs of vLLM; an estimate."""
NUM_CONTEXTS = 3
"""Engine, API server (which undoes) and trainer."""
KEYS_SHARE = 0.9
"""Of what is left, for keys and values: estimates are none to the byte."""
FOREIGN_FORMATS = frozenset({"ipc_cache", "modelexpress", "dummy"})
"""Of `--load-format`: weights that lie in another process's memory, or are none of the model's files."""


def refusals(arguments: Any, environ: Mapping[str, str]) -> tuple[Refusal, ...]:
    """Weights that the trainer cannot map, or that are not what the model computes with, by vLLM's arguments."""
    setting = next((n for n in ALLOCATOR if "expandable_segments:true" in environ.get(n, "").lower()), "")
    offloads = arguments.cpu_offload_gb > 0 or arguments.offload_group_size > 0
    return (
        (
            bool(setting),
            f"{setting}={environ.get(setting)}: expandable segments, which other processes cannot map",
            f"unset {setting}",
        ),
        (
            bool(arguments.enable_cumem_allocator),
            "the cumem allocator is on: its memory cannot be shared",
            "leave --enable-cumem-allocator out",
        ),
        (
            str(arguments.load_format) in FOREIGN_FORMATS,
            f"--load-format {arguments.load_format}: weights that are not the engine's own, or not the model's",
            "leave --load-format out",
        ),
        (
            offloads or arguments.offload_backend != "auto",
            "weights are offloaded to host memory",
            "leave --cpu-offload-gb, --offload-group-size and --offload-backend out",
        ),
        (bool(arguments.enable_eplb), "experts are moved while it runs", "leave --enable-eplb out"),
        (
            str(arguments.linear_backend).startswith("flashinfer"),
            f"--linear-backend {arguments.linear_backend} may keep its weights in a layout of its own",
            "leave --linear-backend out",
        ),
        (
            environ.get("CUDA_VISIBLE_DEVICES", "").upper().startswith("MIG-"),
            "the GPU is a MIG slice, whose memory other processes cannot map",
            "use a whole card, without MIG",
        ),
    )


def plan_memory(arguments: Any) -> None:
    """Say what the card's memory goes to, and leave the trainer its part where the user has not said how.

    vLLM's own default is nearly all of the card.

    Raises:
        WeightsError: there is not room for all.
    """
    from vllm.config import CacheConfig

    directory = Path(str(arguments.model))
    if not directory.is_dir():
        return

    free, total = _card()
    itemsize = 4 if str(arguments.dtype).removeprefix("torch.") in ("float32", "float") else 2
    keys = arguments.kv_cache_memory_bytes
    planned = gpu.budget(
        directory,
        free=free,
        total=total,
        num_processes=NUM_CONTEXTS,
        engine=ENGINE_BYTES,
        itemsize=itemsize,
        keys=keys,
    )
    share = float(arguments.gpu_memory_utilization)
    if keys is None and share != CacheConfig.gpu_memory_utilization:
        outside = planned.state + planned.working + (NUM_CONTEXTS - 1) * gpu.CONTEXT_BYTES
        LOG.info("secondnature: GPU memory: %s", planned)
        if total * (1 - share) < outside:
            LOG.warning(
                "secondnature: --gpu-memory-utilization %s leaves %.1f GB; the trainer may need %.1f",
                *(share, total * (1 - share) / 1e9, outside / 1e9),
            )
        return
    planned.check()
    LOG.info("secondnature: GPU memory: %s", planned)
    if keys is None:
        arguments.kv_cache_memory_bytes = int(KEYS_SHARE * planned.left)


def _card() -> tuple[int, int]:
    """(free, total) bytes of the card, without a context on it. Raises WeightsError."""
    from vllm.platforms import current_platform
    from vllm.third_party import pynvml

    try:
        pynvml.nvmlInit()
        try:
            number = current_platform.device_id_to_physical_device_id(0)
            found = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(number))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as e:
        raise WeightsError(
            f"the GPU's memory cannot be looked at: {e}", "does nvidia-smi run here?"
        ) from None
    return int(found.free), int(found.total)
