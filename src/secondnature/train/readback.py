"""Numbers that are read back from the device, many at a time (trainer).

Each read of a number on a GPU waits for all that was launched before it: one for each of a model's 851 tensors
keeps the card idle between them. What has to be known of many tensors is therefore computed for all, and read at
once. On a CPU there is nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Reading", "floats", "together"]

_Result = TypeVar("_Result")
Reading = Generator[list[Tensor], list[float], _Result]
"""A computation that stops where it needs numbers: yields scalars, is sent their values, returns its result."""


def floats(scalars: Sequence[Tensor]) -> list[float]:
    """The values of scalars (each of one element, fp32 or wider), in one transfer where they lie on a device."""
    if not any(x.is_cuda for x in scalars):
        return [float(x) for x in scalars]
    return torch.cat([x.detach().reshape(1) for x in scalars]).tolist()


def together(readings: Iterable[Reading[_Result]], *, at_once: bool) -> list[_Result]:
    """The results of some computations, in order.

    `at_once`: each goes as far as its first numbers before any of these is read, and so on; all that they hold is
    in memory together. Else one runs to its end before the next begins.
    """
    if not at_once:
        return [_alone(reading) for reading in readings]
    running = list(enumerate(readings))
    found: dict[int, _Result] = {}
    answers: dict[int, list[float] | None] = {i: None for i, _ in running}
    while running:
        wanted: dict[int, list[Tensor]] = {}
        for i, reading in running:
            try:
                sent = answers[i]
                wanted[i] = next(reading) if sent is None else reading.send(sent)
            except StopIteration as end:
                found[i] = end.value
        running = [(i, reading) for i, reading in running if i in wanted]
        values = iter(floats([x for i, _ in running for x in wanted[i]]))
        answers = {i: [next(values) for _ in wanted[i]] for i, _ in running}
    return [found[i] for i in sorted(found)]


def _alone(reading: Reading[_Result]) -> _Result:
    try:
        wanted = next(reading)
        while True:
            wanted = reading.send(floats(wanted))
    except StopIteration as end:
        return end.value
