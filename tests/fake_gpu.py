"""A GPU's memory played by files: fakes of the two functions that talk to the driver, and of a stream.

`allocate` makes tensors in a file of their own, as cudaMalloc makes an allocation; `export` and `open_` do with
files what CUDA IPC does with allocations, the owner's refusal included. All else is the code that runs on a GPU.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from secondnature.errors import WeightsError
from secondnature.weights import ipc

UUID = "00000000-0000-0000-0000-000000000001"


def _mapped(path: str, nbytes: int) -> torch.UntypedStorage:
    found: Any = torch.UntypedStorage.from_file(path, True, nbytes)
    return found


class FakeGpu:
    """One card, as far as processes see it; `log` is what the device was asked to do, in order."""

    def __init__(self, folder: Path, uuid: str = UUID) -> None:
        self.folder = folder
        self.uuid = uuid
        self.log: list[str] = []
        self.broken = ""
        """What waiting for the device says."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """(nbytes), uint8: one allocation."""
        handle, path = tempfile.mkstemp(dir=self.folder)
        os.close(handle)
        return torch.empty(0, dtype=torch.uint8).set_(_mapped(path, nbytes))

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in an allocation of its own."""
        flat = self.allocate(tensor.nbytes).view(tensor.dtype)
        return flat.view(tensor.shape).copy_(tensor)

    def export(self, storage: torch.UntypedStorage) -> dict[str, Any]:
        if storage.filename is None:
            raise WeightsError("its memory is on cpu; expected a GPU's", "leave out what offloads weights")
        self.log.append("export")
        return {"uuid": self.uuid, "file": storage.filename, "size": storage.nbytes(), "pid": os.getpid()}

    def open_(self, exported: dict[str, Any]) -> torch.UntypedStorage:
        if exported["pid"] == os.getpid():
            raise WeightsError("the driver opens no handle where it was made (error 201)")
        if exported["uuid"] != self.uuid:
            raise WeightsError(f"the weights lie on GPU {exported['uuid']}; this process sees {self.uuid}")
        self.log.append("open")
        return _mapped(exported["file"], exported["size"])

    def synchronize(self) -> None:
        self.log.append("wait")
        if self.broken:
            raise RuntimeError(self.broken)


@contextmanager
def fake_gpu(folder: Path, uuid: str = UUID) -> Iterator[FakeGpu]:
    """While open, `weights.cuda` works on files."""
    gpu = FakeGpu(folder, uuid)
    with (
        mock.patch.object(ipc, "export", gpu.export),
        mock.patch.object(ipc, "open_", gpu.open_),
        mock.patch.object(torch.cuda, "current_stream", return_value=gpu),
    ):
        yield gpu


def together(gpu: FakeGpu, tensors: Sequence[torch.Tensor], gap: int = 8) -> list[torch.Tensor]:
    """The tensors in one allocation, as a caching allocator packs them: `gap` elements between two."""
    dtype = tensors[0].dtype
    flat = gpu.allocate(sum(t.nbytes + gap * dtype.itemsize for t in tensors)).view(dtype)
    placed: list[torch.Tensor] = []
    at = gap
    for tensor in tensors:
        placed.append(flat[at : at + tensor.numel()].view(tensor.shape).copy_(tensor))
        at += tensor.numel() + gap
    return placed
