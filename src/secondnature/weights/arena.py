"""The arena: the shared memory in which the engine's only copy of the weights lies (engine and trainer).

A file in memory (`memory_file`), allocated for real (`posix_fallocate`: a sparse file on a full tmpfs kills its
writer with SIGBUS). The engine owns it; the trainer opens the same file. The first page holds the write counters
(`counters`); each tensor lies at a 64-byte boundary. A JSON manifest says what lies where. Weights come in and
change one tensor at a time, so that nobody needs a second copy of them. Where the weights lie on a GPU, the arena
is a `cuda.DeviceArena`; who opens one of either kind asks `attach`.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from secondnature.errors import WeightsError
from secondnature.weights import memory_file
from secondnature.weights.content import Weights, named
from secondnature.weights.counters import HEADER_BYTES, Counters

__all__ = ["DTYPES", "HEADER_BYTES", "Arena", "Slot", "Spec", "dtype_name"]

ALIGN_BYTES = 64
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
"""Of weights, by the names that manifests have for them."""


class Spec(Protocol):
    """What an arena has to know of a tensor: itself, one on the meta device, or a `model.load.TensorSpec`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16, float32 or float16."""
        ...


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies."""

    name: str
    offset: int
    """Bytes from the start of the file."""
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def dtype_name(name: str, dtype: torch.dtype) -> str:
    """What a manifest calls the dtype of tensor `name`. Raises WeightsError: it is no weight's."""
    found = str(dtype).removeprefix("torch.")
    if found not in DTYPES:
        raise WeightsError(
            f"tensor {name}: dtype {found}; expected one of {sorted(DTYPES)}", "convert the model"
        )
    return found


def _layout(tensors: Mapping[str, Spec]) -> tuple[list[Slot], int]:
    slots: list[Slot] = []
    end = HEADER_BYTES
    for name, tensor in tensors.items():
        slot = Slot(name, end, tuple(tensor.shape), dtype_name(name, tensor.dtype))
        slots.append(slot)
        end += -(-slot.nbytes // ALIGN_BYTES) * ALIGN_BYTES
    return slots, end


class Arena:
    """The mapped weights: `tensors` are views (name -> tensor) of memory that every process shares.

    Make one with `create` or `reserve` (the engine), or `attach` (the trainer).
    """

    def __init__(
        self, counters: mmap.mmap, tensors: Mapping[str, torch.Tensor], manifest: Mapping[str, Any]
    ) -> None:
        """Around what is mapped already; `counters`: memory that begins with theirs."""
        self._memory = counters
        self.counters = Counters(memoryview(counters)[:HEADER_BYTES])
        self.tensors: dict[str, torch.Tensor] = dict(tensors)
        self.nbytes = int(manifest["nbytes"])
        self._manifest = dict(manifest)
        self._memories = {t.untyped_storage().data_ptr() for t in tensors.values()}

    @classmethod
    def _around(cls, fd: int, slots: list[Slot], manifest: Mapping[str, Any]) -> Self:
        """The whole file as memory."""
        memory = memory_file.mapped(fd, int(manifest["nbytes"]))
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        tensors = {
            s.name: whole[s.offset : s.offset + s.nbytes].view(DTYPES[s.dtype]).view(s.shape) for s in slots
        }
        arena = cls(memory, tensors, manifest)
        arena._fd = fd
        arena._slots = {slot.name: slot for slot in slots}
        return arena

    _fd: int
    """Of the file, where the arena has one."""
    _slots: dict[str, Slot]

    @classmethod
    def create(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Allocate an arena and copy the tensors in: the only copy that is kept.

        Raises:
            WeightsError: not enough memory, or a dtype that is not a weight's.
        """
        arena = cls.reserve(tensors)
        arena._allocate(0, arena.nbytes)
        for name, tensor in tensors.items():
            arena.tensors[name].copy_(tensor)
        return arena

    @classmethod
    def reserve(cls, tensors: Mapping[str, Spec]) -> Self:
        """An arena for such shapes and dtypes that has no memory yet; nothing may be touched before `fill`.

        Raises:
            WeightsError: a dtype that is not a weight's, or no file of this size.
        """
        slots, nbytes = _layout(tensors)
        fd = memory_file.make("secondnature-weights", nbytes, HEADER_BYTES)
        places = [{"name": s.name, "offset": s.offset, "shape": s.shape, "dtype": s.dtype} for s in slots]
        arena = cls._around(fd, slots, {"pid": os.getpid(), "fd": fd, "nbytes": nbytes, "tensors": places})
        arena.counters.format()
        return arena

    def fill(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Allocate one tensor's place and copy it in; gives the view. So weights can move one after the other.

        Raises:
            WeightsError: not enough memory; or no such tensor is expected: nothing was written.
        """
        self._check(name, tensor)
        slot = self._slots[name]
        self._allocate(slot.offset, slot.nbytes)
        return self.tensors[name].copy_(tensor)

    def _allocate(self, offset: int, nbytes: int) -> None:
        """For real: a sparse file on a full tmpfs would kill its writer."""
        if not nbytes:
            return
        try:
            os.posix_fallocate(self._fd, offset, nbytes)
        except OSError as e:
            raise memory_file.refused(self.nbytes, e) from e

    @classmethod
    def attach(cls, manifest: str) -> Self:
        """Map another process's arena: no byte is copied.

        Raises:
            WeightsError: the owner is gone, may not be opened, or the manifest does not fit the file.
        """
        try:
            plan: dict[str, Any] = json.loads(manifest)
            slots = [Slot(t["name"], t["offset"], tuple(t["shape"]), t["dtype"]) for t in plan["tensors"]]
            pid, owner_fd, nbytes = int(plan["pid"]), int(plan["fd"]), int(plan["nbytes"])
        except (ValueError, KeyError, TypeError) as e:
            raise WeightsError(
                f"not an arena's manifest: {e!r}", "server and trainer differ in version?"
            ) from None
        fd = memory_file.open_(pid, owner_fd)
        if os.fstat(fd).st_size != nbytes or any(s.offset + s.nbytes > nbytes for s in slots):
            os.close(fd)
            raise WeightsError("the manifest does not fit the weights in memory", "restart the server")
        arena = cls._around(fd, slots, plan)
        if not arena.counters.is_arena:
            raise WeightsError("the mapped memory is not an arena", "restart the server")
        return arena

    def manifest(self) -> str:
        """What `attach` needs, as JSON: owner, size, and per tensor name, offset, shape, dtype."""
        return json.dumps(self._manifest)

    @property
    def writes(self) -> tuple[int, int]:
        """(begun, done): equal when nobody is writing; never goes back, also not after an undo."""
        return self.counters.writes

    @property
    def load(self) -> int:
        """Requests that the server is answering now: the trainer gives way to them."""
        return self.counters.load

    @load.setter
    def load(self, requests: int) -> None:
        self.counters.load = requests

    def seen_as(self, views: Mapping[str, torch.Tensor]) -> None:
        """Have `tensors` be these views of the same memory: other names, other cuts. The manifest stays.

        Raises:
            WeightsError: a view is not of this memory.
        """
        for name, view in views.items():
            if view.untyped_storage().data_ptr() not in self._memories:
                raise WeightsError(f"tensor {name} is no view of the arena", "is it a copy?")
        self.tensors = dict(views)

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Brackets in-place writes, so that readers can tell what they overlapped with. Takes no lock."""
        return self.counters.writing()

    def close_torn_write(self) -> None:
        """After a writer died inside `writing`: counts its torn write as done. Call when nobody writes."""
        self.counters.close_torn_write()

    @torch.no_grad()
    def write(self, weights: Weights) -> None:
        """Put these values in place (names, shapes and dtypes as in the arena), in one bracket.

        Each tensor is checked before it is copied; those of a mapping, all before the first. Where an iterable
        raises, what came before is written: the bracket is closed and the exception passes on, and the weights
        are neither the old nor the new ones.

        Raises:
            WeightsError: a tensor that is not the arena's; of a mapping nothing was written then.
        """
        if isinstance(weights, Mapping):
            for name, value in named(weights):
                self._check(name, value)
        with self.writing():
            for name, value in named(weights):
                self._check(name, value)
                self.tensors[name].copy_(value)
                del value  # before the next one is made

    def _check(self, name: str, value: torch.Tensor) -> None:
        mine = self.tensors.get(name)
        if mine is None or mine.shape != value.shape or mine.dtype != value.dtype:
            raise WeightsError(f"tensor {name} does not fit the arena", "is it a file of another model?")
