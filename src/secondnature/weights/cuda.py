"""The arena on a GPU: the engine's own allocations, which other processes map by CUDA IPC (engine and trainer).

Nothing is moved: a parameter stays where the engine put it (`adopt`), so addresses that CUDA graphs hold stay right
and no second copy is ever needed. The local engine, under which nobody else allocates, puts its weights into one
allocation of its own (`reserve_on`, `fill`). The manifest is JSON: one export for each allocation (`ipc`), and
where in it each tensor lies. The write counters are in host memory, as ever: who schedules reads them at every
request and must not wait for a device. A write is begun, computed, *waited for*, and done.
(docs/decisions/adopted-where-they-lie.md)
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import weakref
from collections.abc import Generator, Mapping
from typing import Any, Self

import torch

from secondnature.errors import WeightsError
from secondnature.weights import ipc, memory_file
from secondnature.weights.arena import DTYPES, HEADER_BYTES, Arena, Spec, dtype_name

__all__ = ["DeviceArena"]

ALIGN_BYTES = 256
"""Of the slots of `reserve_on`: what cudaMalloc itself aligns to, at least."""


class DeviceArena(Arena):
    """Weights in a GPU's memory; make one with `adopt` or `reserve_on` (the engine), or `open` (everybody else)."""

    def __init__(
        self, counters: mmap.mmap, tensors: Mapping[str, torch.Tensor], manifest: Mapping[str, Any]
    ) -> None:
        super().__init__(counters, tensors, manifest)
        self.device = next(iter(tensors.values())).device
        self._under = dict(tensors)
        """Under the manifest's names, whatever they are seen as."""

    @classmethod
    def adopt(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Share these tensors as they lie; they live as long as the arena.

        Raises:
            WeightsError: memory that cannot be shared, several GPUs, or no weight's dtype; names the tensor.
        """
        if not tensors:
            raise WeightsError("the model has no tensors", "was it loaded?")
        storages: list[dict[str, Any]] = []
        numbers: dict[int, int] = {}
        places: list[dict[str, Any]] = []
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            number = numbers.get(storage.data_ptr())
            if number is None:
                try:
                    exported = ipc.export(storage)
                except WeightsError as e:
                    raise WeightsError(f"tensor {name}: {e.message}", e.hint) from e
                if storages and exported["uuid"] != storages[0]["uuid"]:
                    raise WeightsError(
                        f"tensor {name} lies on GPU {exported['uuid']}, others on {storages[0]['uuid']}",
                        "serve the model on one GPU",
                    )
                number = numbers[storage.data_ptr()] = len(storages)
                storages.append(exported)
            places.append(
                {
                    "name": name,
                    "storage": number,
                    "offset": tensor.storage_offset(),
                    "shape": list(tensor.shape),
                    "stride": list(tensor.stride()),
                    "dtype": dtype_name(name, tensor.dtype),
                }
            )
        fd = memory_file.make("secondnature-counters", HEADER_BYTES, HEADER_BYTES)
        arena = cls(
            memory_file.mapped(fd, HEADER_BYTES),
            tensors,
            {
                "pid": os.getpid(),
                "fd": fd,
                "nbytes": sum(tensor.nbytes for tensor in tensors.values()),
                "storages": storages,
                "tensors": places,
            },
        )
        arena.counters.format()
        arena._wait()
        _OWN[os.getpid(), fd] = arena
        return arena

    @classmethod
    def reserve_on(cls, device: torch.device, tensors: Mapping[str, Spec]) -> Self:
        """An arena for such shapes and dtypes, in one allocation on `device`; `fill` puts the values in.

        Raises:
            WeightsError: a dtype that is not a weight's, or the GPU has not that much memory free.
        """
        places: dict[str, int] = {}
        end = 0
        for name, spec in tensors.items():
            dtype_name(name, spec.dtype)  # refuses before anything is allocated
            places[name] = end
            end += -(-torch.Size(spec.shape).numel() * spec.dtype.itemsize // ALIGN_BYTES) * ALIGN_BYTES
        try:
            whole = torch.empty(end, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            free, total = torch.cuda.mem_get_info(device)
            raise WeightsError(
                f"the weights need {end:,} bytes; {free:,} of {total:,} are free on {device}",
                "free the GPU's memory, or serve a smaller model",
            ) from None
        views: dict[str, torch.Tensor] = {}
        for name, spec in tensors.items():
            nbytes = torch.Size(spec.shape).numel() * spec.dtype.itemsize
            part = whole[places[name] : places[name] + nbytes]
            views[name] = part.view(spec.dtype).view(tuple(spec.shape))
        return cls.adopt(views)

    def fill(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Copy one tensor to its place; gives the view.

        Raises:
            WeightsError: no such tensor is expected: nothing was written.
        """
        self._check(name, tensor)
        return self.tensors[name].copy_(tensor)

    @classmethod
    def open(cls, manifest: str) -> Self:
        """The arena of a manifest. In another process no byte is copied; in the owner's it is the owner's tensors.

        Raises:
            WeightsError: the owner is gone, the manifest is none, or this process does not see that GPU.
        """
        try:
            plan: dict[str, Any] = json.loads(manifest)
            pid, fd = int(plan["pid"]), int(plan["fd"])
            own = _OWN.get((pid, fd)) if pid == os.getpid() else None
            if own is not None:
                return cls(own._memory, own._under, plan)
            page = memory_file.open_(pid, fd)
            storages = [ipc.open_(exported) for exported in plan["storages"]]
            tensors = {t["name"]: _view(storages[t["storage"]], t) for t in plan["tensors"]}
        except (ValueError, KeyError, TypeError, IndexError) as e:
            raise WeightsError(
                f"not an arena's manifest: {e!r}", "server and trainer differ in version?"
            ) from None
        try:
            arena = cls(memory_file.mapped(page, HEADER_BYTES), tensors, plan)
        finally:
            os.close(page)
        if not arena.counters.is_arena:
            raise WeightsError("the mapped memory is not an arena", "restart the server")
        return arena

    @contextlib.contextmanager
    def writing(self) -> Generator[None]:
        """Brackets writes: begun is seen before any kernel of theirs, done when the device has ended all of them.

        Raises:
            WeightsError: the device failed. The write then stays begun, which is what is true of these weights.
        """
        begun = self.counters.begin()
        try:
            yield
        finally:
            self._wait()
            self.counters.end(begun)

    def _wait(self) -> None:
        try:
            torch.cuda.current_stream(self.device).synchronize()
        except RuntimeError as e:
            said = (str(e).splitlines() or [type(e).__name__])[0]
            raise WeightsError(
                f"the GPU failed while weights were written: {said}",
                "restart the server: the home is whole, and the weights are made from it again",
            ) from e


def _view(storage: torch.UntypedStorage, place: Mapping[str, Any]) -> torch.Tensor:
    empty = torch.empty(0, dtype=DTYPES[place["dtype"]], device=storage.device)
    return empty.set_(storage, place["offset"], place["shape"], place["stride"])


_OWN: weakref.WeakValueDictionary[tuple[int, int], DeviceArena] = weakref.WeakValueDictionary()
"""Arenas that this process owns, by process and descriptor: the driver opens no handle where it was made."""
