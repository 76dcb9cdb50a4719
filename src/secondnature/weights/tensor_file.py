"""Safetensors files, piece by piece: where each tensor's bytes lie, and headers for files written in a stream.

The safetensors library writes a file from memory that holds all of it, and maps the files that it reads, so that
tensors that are changed stay in memory until the last one is let go. Here a file is a header (checked by the
library) and ranges of bytes that are read and written a block at a time (any process with weights). Nothing is
ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import safetensors
import torch

from secondnature.weights.content import BLOCK_BYTES

__all__ = ["DTYPES", "Place", "header", "layout", "read_into", "read_places", "spans"]

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8"}
"""What we write, as the format names it."""
_PREFIX_BYTES = 8


@dataclass(frozen=True)
class Place:
    """Where one tensor lies in a file."""

    dtype: str
    """As the format names it."""
    shape: tuple[int, ...]
    start: int
    """First byte, from the start of the file."""
    nbytes: int


def read_places(path: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """(tensor name -> place, metadata) of a file; its header is read, and checked by the library.

    Raises:
        OSError, safetensors.SafetensorError: it cannot be read, or is not a whole safetensors file.
    """
    with safetensors.safe_open(path, framework="numpy"):  # offsets, sizes, duplicates, nothing left over
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_PREFIX_BYTES), "little")
        raw = json.loads(file.read(length))
    metadata = {str(k): str(v) for k, v in raw.pop("__metadata__", {}).items()}
    places: dict[str, Place] = {}
    for name, entry in raw.items():
        first, last = entry["data_offsets"]
        start = _PREFIX_BYTES + length + first
        places[name] = Place(entry["dtype"], tuple(entry["shape"]), start, last - first)
    return places, metadata


def header(
    places: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str], room: int = 0
) -> bytes:
    """The beginning of a file whose tensors (name -> dtype, shape, bytes) lie one after the other in this order.

    `room`: of so many bytes, filled with spaces, where it has to fit before what is already written.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, nbytes) in places.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    total = max(room, -(-(_PREFIX_BYTES + len(text)) // 8) * 8)  # tensors begin at multiples of eight bytes
    assert _PREFIX_BYTES + len(text) <= total, "the room was computed for these names"
    text = text.ljust(total - _PREFIX_BYTES)
    return len(text).to_bytes(_PREFIX_BYTES, "little") + text


def layout(tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> list[str]:
    """The order of a file's tensors, as the library has it: wide dtypes first, so that all are aligned."""
    width = {name: max(1, _width(dtype)) for name, (dtype, _, _) in tensors.items()}
    return sorted(tensors, key=lambda name: (-width[name], name))


def _width(dtype: str) -> int:
    """Bytes of an element: the digits of its name are bits (F8_E4M3: 8)."""
    digits = dtype.split("_", maxsplit=1)[0].lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    return int(digits or 8) // 8


def read_into(file: BinaryIO, start: int, target: memoryview) -> None:
    """Fill `target` with the bytes from `start` on.

    Raises:
        OSError: the file ends before.
    """
    file.seek(start)
    while target.nbytes:
        count = file.readinto(target)  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise OSError(f"ends at byte {file.tell()}")
        target = target[count:]


def spans(nbytes: int, step: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """(first, number) of bytes of each block of so many bytes."""
    for start in range(0, nbytes, step):
        yield start, min(step, nbytes - start)
