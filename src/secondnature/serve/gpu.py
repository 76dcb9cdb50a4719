"""What one card's memory goes to: planned, and said, before anything is loaded (server).

Engine and trainer share the card, and each process that uses it takes a context of its own. Weights and optimizer
state follow from the model's shapes; what a training step takes besides is an estimate from one that was measured
(docs/gpu.md), and so is a context. Keys and values get what is left, unless the user says how much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from secondnature.errors import WeightsError
from secondnature.model import load
from secondnature.records import OptimizerSettings
from secondnature.train.apollo import state_bytes

__all__ = ["MIN_KEYS_BYTES", "Budget", "budget"]

CONTEXT_BYTES = 512 << 20
"""Of one process on the card; expected, not measured."""
WORKING_SHARE = 0.22
"""Of the weights' bytes: activations, gradients and temporaries of a step. 11.4 of 53.8 GB were measured for a
model of 27 billion parameters with 8 answers of 64 tokens."""
MIN_WORKING_BYTES = 1 << 30
MIN_KEYS_BYTES = 256 << 20
"""With less for keys and values a start makes no sense."""


@dataclass(frozen=True)
class Budget:
    """Bytes of one card."""

    free: int
    """Before anything was loaded."""
    total: int
    weights: int
    state: int
    """Of the optimizer, after a lesson of the default rank."""
    working: int
    """What a training step takes besides."""
    contexts: int
    engine: int
    """Activations and graphs of the engine."""
    keys: int | None = None
    """Keys and values, where the user has said how much."""

    @property
    def taken(self) -> int:
        """By everything but keys and values."""
        return self.weights + self.state + self.working + self.contexts + self.engine

    @property
    def left(self) -> int:
        """For keys and values; below zero where not even the rest fits."""
        return self.free - self.taken

    def __str__(self) -> str:
        keys = max(0, self.left) if self.keys is None else self.keys
        parts = {
            "weights": self.weights,
            "optimizer state": self.state,
            "training steps (estimate)": self.working,
            "contexts (estimate)": self.contexts,
            "engine (estimate)": self.engine,
            "keys and values": keys,
        }
        sums = " + ".join(f"{name} {_gb(nbytes)}" for name, nbytes in parts.items() if nbytes)
        return f"{sums} = {_gb(self.taken + keys)} GB; {_gb(self.free)} of {_gb(self.total)} GB are free"

    def check(self) -> None:
        """Raises WeightsError: what is needed does not fit, keys and values included."""
        if self.left < (MIN_KEYS_BYTES if self.keys is None else self.keys):
            raise WeightsError(
                f"the GPU's memory does not hold it: {self}",
                "free memory on the card, leave less to keys and values, or serve a smaller model",
            )


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f}"


def budget(
    directory: Path,
    *,
    free: int,
    total: int,
    num_processes: int,
    engine: int,
    itemsize: int = 2,
    keys: int | None = None,
) -> Budget:
    """What serving and teaching the model of `directory` takes of a card; only its config.json is read.

    Args:
        free, total: bytes of the card.
        num_processes: that will have a context on it.
        engine: bytes that the engine needs besides weights, keys and values.
        itemsize: bytes of a weight.
        keys: bytes for keys and values, where that is settled.

    Raises:
        BadCheckpoint, UnsupportedModel: the config cannot be read.
    """
    model = load.skeleton(directory)
    weights = itemsize * sum(math.prod(shape) for shape in load.shapes(directory).values())
    return Budget(
        free=free,
        total=total,
        weights=weights,
        state=state_bytes(model, OptimizerSettings().rank),
        working=max(MIN_WORKING_BYTES, int(WORKING_SHARE * weights)),
        contexts=num_processes * CONTEXT_BYTES,
        engine=engine,
        keys=keys,
    )
