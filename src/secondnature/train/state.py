"""The optimizer's state on disk: one safetensors file, written and read tensor by tensor (trainer).

For a large model the state has gigabytes, so no second copy of it is made in memory: the file's header follows from
names, shapes and dtypes alone, and the bytes go out as they lie there. They are hashed on their way, so that nobody
has to read the file again to name it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secondnature import storage
from secondnature.errors import BadCheckpoint
from secondnature.train.apollo import Apollo
from secondnature.train.phases import Each, unwatched

__all__ = ["load_optimizer", "save_optimizer"]

_DTYPES = {torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32"}
"""Of all that a state holds: what the format calls them, the widest first, as it has them in the file."""
_PIECE_BYTES = 2**24
"""Written at a time."""


def load_optimizer(optimizer: Apollo, path: Path, each: Each = unwatched) -> None:
    """Continue from a state on disk. Raises BadCheckpoint: damaged, or of another model or rank."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {}
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                each(len(tensors))
                tensors[name] = file.get_tensor(name)  # mapped, not read: `load_state` makes the one copy
            optimizer.load_state(tensors, file.metadata() or {})
    except (OSError, SafetensorError) as e:
        raise BadCheckpoint(f"{path}: {e}", "restore the lesson's directory from a backup") from None


def save_optimizer(optimizer: Apollo, path: Path, each: Each = unwatched) -> str:
    """Write the state, durably; the sha256 of the file, 64 hex digits.

    Raises:
        StorageError: the disk refused; what was there before is still there.
    """
    tensors, metadata = optimizer.state_dict()
    order = sorted(tensors, key=lambda name: (list(_DTYPES).index(tensors[name].dtype), name))
    hasher = hashlib.sha256()
    with storage.writing(path) as file:
        header = _header({name: tensors[name] for name in order}, metadata)
        hasher.update(header)
        file.write(header)
        for num_done, name in enumerate(order):
            each(num_done)
            whole = tensors[name].detach().cpu().contiguous().reshape(-1)
            for piece in whole.split(_PIECE_BYTES // whole.element_size()):
                data = piece.numpy().data
                hasher.update(data)
                file.write(data)
    return hasher.hexdigest()


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The format's beginning: the length of a JSON text, and the text, padded to 8 bytes."""
    about: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        about[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
