"""Deltas: the lossless difference of the weights before and after a lesson (engine).

The XOR of the two bit patterns: applied once it is the lesson, applied again it is the undo, and no rounding can
come between. Stored per changed tensor, low and high bytes apart (the high ones are nearly all zero), in zstd,
in a safetensors file whose header names the versions before and after. Reading validates names, sizes and the
base before a byte is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
import zstandard
from safetensors.numpy import save

from secondnature import storage
from secondnature.errors import BadDelta
from secondnature.weights.arena import content_id

FORMAT = "secondnature-delta/1"


@dataclass(frozen=True)
class Delta:
    """`base` XOR `result`: per changed tensor the bytes, as uint8, flat."""

    base: str
    result: str
    xor: Mapping[str, np.ndarray]


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """A flat uint8 view (no copy for contiguous tensors); writes go through to the tensor."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()


def between(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> Delta:
    """The difference of two states of the same weights."""
    xor: dict[str, np.ndarray] = {}
    for name, old in before.items():
        difference = np.bitwise_xor(_bytes_of(old), _bytes_of(after[name]))
        if difference.any():
            xor[name] = difference
    return Delta(content_id(before), content_id(after), xor)


def write(delta: Delta, path: Path) -> str:
    """Store a delta, durably; the sha256 of the file.

    Raises:
        StorageError: the disk refused; there is no file.
    """
    compressor = zstandard.ZstdCompressor(level=3)
    packed = {
        name: np.frombuffer(
            compressor.compress(x.reshape(-1, 2).T.tobytes() if x.size % 2 == 0 else x.tobytes()), np.uint8
        )
        for name, x in delta.xor.items()
    }
    sizes = {f"bytes:{name}": str(x.size) for name, x in delta.xor.items()}
    metadata = {"format": FORMAT, "base": delta.base, "result": delta.result, **sizes}
    data = save(packed or {"nothing": np.zeros(0, np.uint8)}, metadata=metadata)
    storage.write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def read(path: Path, sha256: str | None = None) -> Delta:
    """Load a delta and check it against its checksum.

    Raises:
        BadDelta: missing, damaged, or not a delta.
    """
    hint = "restore the lesson's directory from a backup"
    try:
        data = path.read_bytes()
    except OSError as e:
        raise BadDelta(f"{path}: {e.strerror}", hint) from None
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        raise BadDelta(f"{path}: checksum {found[:12]}; expected {sha256[:12]}", hint)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise BadDelta(f"{path}: format {metadata.get('format')}; expected {FORMAT}", hint)
            xor: dict[str, np.ndarray] = {}
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                size = int(metadata.get(f"bytes:{name}", "0"))
                if size:
                    raw = zstandard.ZstdDecompressor().decompress(
                        file.get_tensor(name).tobytes(), max_output_size=size
                    )
                    flat = np.frombuffer(raw, np.uint8)
                    if flat.size != size:
                        raise BadDelta(f"{path}: tensor {name} has {flat.size} bytes; expected {size}", hint)
                    xor[name] = (
                        np.ascontiguousarray(flat.reshape(2, -1).T).reshape(-1) if size % 2 == 0 else flat
                    )
    except (safetensors.SafetensorError, zstandard.ZstdError, ValueError) as e:
        raise BadDelta(f"{path}: {e}", hint) from None
    return Delta(metadata["base"], metadata["result"], xor)


def apply_(tensors: Mapping[str, torch.Tensor], delta: Delta) -> None:
    """XOR a delta into these weights, in place: base becomes result, result becomes base.

    Raises:
        BadDelta: a tensor is unknown or of another size; nothing was written.
    """
    for name, difference in delta.xor.items():
        if name not in tensors or tensors[name].nbytes != difference.size:
            raise BadDelta(f"the delta's tensor {name} does not fit these weights", "is it of another model?")
    for name, difference in delta.xor.items():
        mine = _bytes_of(tensors[name])
        np.bitwise_xor(mine, difference, out=mine)
