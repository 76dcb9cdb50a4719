"""The arithmetic difference of the weights before and after a lesson, in fp32 (engine).

A delta gives a lesson back where the weights are those that it started from. Where they are others, the lesson is
added: what it wrote, after minus before, in fp32, and the sum is rounded to the nearest value of the dtype. The
file holds that difference for whoever cannot compute it, having other weights than those before: per changed
tensor, block by block, the four bytes of each number apart, packed. Bounded as in `delta`: what a block unpacks to
is decided by who reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zstandard
from safetensors import SafetensorError
from torch import Tensor

from secondnature import storage
from secondnature.errors import BadDelta, NonFinite
from secondnature.weights import xor
from secondnature.weights.tensor_file import Place, header, read_places, spans

__all__ = ["StoredDifference", "between", "open_", "plus", "write"]

FORMAT = "secondnature-difference/1"
_HINT = "get the file again"
_LENGTH_BYTES = 4
_LEVEL = 3


def between(before: Tensor, after: Tensor) -> Tensor:
    """after - before, fp32."""
    return after.float() - before.float()


def plus(name: str, tensor: Tensor, change: Tensor) -> Tensor:
    """A new tensor of the same dtype, on the host: the sum in fp32, rounded to nearest; no change, the same bits.

    Raises:
        NonFinite: the sum does not fit into the dtype.
    """
    mine = tensor.detach().to("cpu")
    total = (mine.float() + change).to(mine.dtype)
    if not bool(torch.isfinite(total).all()):
        raise NonFinite(
            f"tensor {name}: the sum with the lesson's difference is not finite", "is it of another model?"
        )
    return torch.where(change == 0, mine, total)


def write(path: Path, pairs: Iterable[tuple[str, Tensor, Tensor]], sizes: Mapping[str, int]) -> str:
    """Store after - before, durably; the sha256 of the file.

    Args:
        pairs: (name, before, after), one at a time; those that are equal may be left out.
        sizes: elements of every tensor that may come.

    Raises:
        StorageError: the disk refused; there is no file.
    """
    worst = {
        name: sum(_LENGTH_BYTES + xor.max_packed_bytes(n) for _, n in spans(4 * size))
        for name, size in sizes.items()
    }
    counts = {f"elements:{name}": str(size) for name, size in sizes.items()}
    room = len(header({n: ("U8", (b,), b) for n, b in worst.items()}, {"format": FORMAT, **counts}))
    places: dict[str, tuple[str, tuple[int, ...], int]] = {}
    metadata = {"format": FORMAT}
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    with storage.writing(path) as file:
        file.write(bytes(room))
        for name, before, after in pairs:
            start, changed = file.tell(), False
            numbers = between(before, after).contiguous().view(-1).numpy().view(np.uint8)
            for first, count in spans(numbers.size):
                part = numbers[first : first + count]
                packed = b""
                if part.any():
                    packed = compressor.compress(np.ascontiguousarray(part.reshape(-1, 4).T).data)
                changed = changed or bool(packed)
                file.write(len(packed).to_bytes(_LENGTH_BYTES, "little") + packed)
            if changed:
                places[name] = ("U8", (file.tell() - start,), file.tell() - start)
                metadata[f"elements:{name}"] = str(before.numel())
            else:
                file.seek(start)
            del before, after, numbers  # before the next ones are made
        file.truncate()
        file.seek(0)
        file.write(header(places, metadata, room))
        hasher = hashlib.sha256()
        file.seek(0)
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def open_(path: Path) -> StoredDifference:
    """A stored difference; its tensors are read when they are asked for. Raises BadDelta: it is none, or
    damaged."""
    try:
        places, metadata = read_places(path)
    except OSError as e:
        raise BadDelta(f"{path}: {e.strerror or e}", _HINT) from None
    except (SafetensorError, ValueError, LookupError, TypeError) as e:
        raise BadDelta(f"{path}: {e}", _HINT) from None
    if metadata.get("format") != FORMAT:
        raise BadDelta(f"{path}: format {metadata.get('format')}; expected {FORMAT}", "upgrade secondnature")
    for name, place in places.items():
        if place.dtype != "U8" or not metadata.get(f"elements:{name}", "").isdecimal():
            raise BadDelta(f"{path}: tensor {name} is not what a difference holds", _HINT)
    return StoredDifference(path, {n: int(metadata[f"elements:{n}"]) for n in places}, places)


@dataclass(frozen=True)
class StoredDifference:
    """A difference on disk."""

    path: Path
    sizes: Mapping[str, int]
    """Elements of each changed tensor."""
    _places: Mapping[str, Place]

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Could it be added to these weights? Raises BadDelta: a tensor is unknown there, or of another size."""
        for name in self.sizes:
            self._check(name, tensors.get(name))

    def _check(self, name: str, tensor: Tensor | None) -> None:
        if tensor is None or tensor.numel() != self.sizes[name]:
            found = "none" if tensor is None else f"{tensor.numel():,}"
            raise BadDelta(
                f"the difference of tensor {name} has {self.sizes[name]:,} numbers; the model's has {found}",
                "is it of another model?",
            )

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """The fp32 difference of a changed tensor, in the shape of `tensor`. Raises BadDelta: damaged."""
        self._check(name, tensor)
        place = self._places[name]
        end = place.start + place.nbytes
        found = np.empty(4 * tensor.numel(), np.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(place.start)
                for start, count in spans(found.size):
                    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
                    if length > xor.max_packed_bytes(count) or file.tell() + length > end:
                        raise BadDelta(f"{self.path}: tensor {name}: a block of {length:,} bytes", _HINT)
                    part = found[start : start + count]
                    if length:
                        part.reshape(-1, 4)[:] = xor.unpack(file.read(length), count).reshape(4, -1).T
                    else:
                        part[:] = 0
                if file.tell() != end:
                    raise BadDelta(f"{self.path}: tensor {name} has bytes after its last block", _HINT)
        except OSError as e:
            raise BadDelta(f"{self.path}: {e.strerror or e}", _HINT) from None
        return torch.from_numpy(found.view(np.float32)).view(tensor.shape)
