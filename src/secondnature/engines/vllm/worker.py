# pyright: reportMissingImports=false
"""The worker's side: after vLLM has loaded a model, its parameters become the arena (vLLM's worker).

Adds two methods to vLLM's worker, for `collective_rpc`: `secondnature_manifest` (where the weights lie) and
`secondnature_wiring` (is every parameter of the running model still the arena's memory?). Both answer JSON.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from typing import Any

import torch

from secondnature.engines.vllm import packing
from secondnature.engines.vllm.share import Shared, model_directory, share
from secondnature.errors import SecondnatureError, WeightsError
from secondnature.weights.cuda import DeviceArena

__all__ = ["install"]

LOG = logging.getLogger("secondnature")


def install() -> None:
    """Add to vLLM's worker class; later calls change nothing."""
    from vllm.v1.worker.gpu_worker import Worker

    if hasattr(Worker, "secondnature_manifest"):
        return
    load_model = Worker.load_model

    @functools.wraps(load_model)
    def load_and_share(self: Any, *args: Any, **kwargs: Any) -> None:
        load_model(self, *args, **kwargs)
        try:
            self.secondnature_shared = _share(self)
        except SecondnatureError as e:
            LOG.error("secondnature: %s", e)
            raise

    Worker.load_model = load_and_share
    Worker.secondnature_manifest = _manifest
    Worker.secondnature_wiring = _wiring


def _share(worker: Any) -> Shared:
    begun = time.perf_counter()
    config = worker.vllm_config
    shared = share(
        worker.model_runner.get_model(),
        model_directory(config),
        world_size=config.parallel_config.world_size,
        quantization=config.model_config.quantization,
    )
    LOG.info(
        "secondnature: %d parameters (%.1f MB) %s in %.3f s",
        len(shared.arena.tensors),
        shared.arena.nbytes / 1e6,
        "shared where they lie on the GPU"
        if isinstance(shared.arena, DeviceArena)
        else "moved into shared memory",
        time.perf_counter() - begun,
    )
    return shared


def _shared(worker: Any) -> Shared:
    shared = getattr(worker, "secondnature_shared", None)
    if shared is None:
        raise WeightsError("this worker's weights were not shared", "was the model loaded by vLLM's worker?")
    return shared


def _manifest(self: Any) -> str:
    return _shared(self).manifest()


@torch.no_grad()
def _wiring(self: Any) -> str:
    """What the running model computes with; the fields of `wire.Wiring` that only the worker knows."""
    arena = _shared(self).arena
    model = self.model_runner.get_model()
    problems: list[str] = []
    aliased = 0
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        slot = arena.tensors.get(name)
        if slot is None or slot.data_ptr() != parameter.data_ptr() or slot.stride() != parameter.stride():
            problems.append(f"{name} is not the arena's memory")
        else:
            aliased += 1
    problems += [f"{n or 'the model'} is packed" for n, m in model.named_modules() if not packing.is_plain(m)]
    return json.dumps(
        {
            "tensors": len(parameters),
            "aliased": aliased,
            "nbytes": arena.nbytes,
            "writes": arena.writes[0],
            "problems": problems,
        }
    )
