"""Asks an exported adapter the probes of its lesson, on a copy of the model (a process of its own; no server).

As peft computes: the model's own weights in fp32 and the adapter's product added, unrounded. The answers come from
the local engine, greedily, as the probes of a lesson do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it

import torch

from secondnature.engines.local.engine import Engine
from secondnature.lessons.prober import Prober
from secondnature.model import chat, load
from secondnature.records import Probe
from secondnature.weights import checkpoint, lora
from secondnature.wire import PhaseProgress

__all__ = ["passed"]


def passed(
    model: Path,
    adapter: Path | None,
    probes: list[Probe],
    on_progress: Callable[[str, PhaseProgress | None], None],
    *,
    threads: int = 1,
) -> dict[tuple[str, str], tuple[int, int]]:
    """(behaviour, side) -> (how many of its probes pass with the adapter, how many there are).

    Args:
        model: the directory of the model's own weights.
        adapter: None: without one.

    Raises:
        BadInput: the adapter is none of ours, or a probe does not fit the model.
        BadCheckpoint, UnsupportedModel: as the server at its start.
    """
    on_progress("loading", None)
    torch.set_num_threads(threads)
    own = ((name, tensor.float()) for name, tensor in checkpoint.stream(model))
    weights = dict(lora.applied(own, adapter) if adapter is not None else own)
    tokenizer = chat.read_tokenizer(model)
    engine = Engine(load.build(model, weights), tokenizer, threads=threads)
    try:
        prober = Prober(engine, tokenizer, context_limit=engine.limits.context)
        prober.check(probes)

        def count(done: int, total: int) -> None:
            on_progress("asking probes", PhaseProgress(done=done, total=max(1, total), unit="probes"))

        outcomes = prober.outcomes(probes, "adapter", count)
    finally:
        engine.close()
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for probe, outcome in zip(probes, outcomes, strict=True):
        right, n = found.get((probe.behaviour, probe.side), (0, 0))
        found[probe.behaviour, probe.side] = (right + outcome.passed, n + 1)
    return found
