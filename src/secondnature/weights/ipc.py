"""A GPU's memory, told to another process in JSON: CUDA IPC, by two functions (engine, trainer, API server).

torch says of an allocation what another process needs to map it (`_share_cuda_`: eight ints, bools and bytes) and
maps what it is told (`_new_shared_cuda`). Nothing is pickled on the way (law 6). The calls are private in torch and
the same since 1.x; what they give is checked. A card is named by its UUID, for its number is each process's own
(CUDA_VISIBLE_DEVICES). Tests on CPUs fake these two functions, and nothing else.
"""

from __future__ import annotations

import base64
import os
from typing import Any

import torch

from secondnature.errors import WeightsError

__all__ = ["export", "open_"]

_NUM_VALUES = 8
_HANDLE_BYTES = 66
"""torch's handle: its version, the kind of memory, and 64 bytes of the driver."""
_CUDA_MALLOC, _EXPANDABLE = b"c", b"e"
_CONFIGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_OTHER_TORCH = "install the torch that this version was made with (2.6 to 2.13)"


def export(storage: torch.UntypedStorage) -> dict[str, Any]:
    """What `open_` needs of one allocation, in another process, as plain values.

    Raises:
        WeightsError: its memory cannot be shared; says why and what to do.
    """
    if storage.device.type != "cuda":
        raise WeightsError(
            f"its memory is on {storage.device.type}; expected a GPU's",
            "leave out what offloads weights to host memory (--cpu-offload-gb, --offload-backend)",
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES", "").upper().startswith("MIG-"):
        raise WeightsError(
            "the GPU is a MIG slice, whose memory other processes cannot map", "use a whole card, without MIG"
        )
    try:
        values = storage._share_cuda_()
    except RuntimeError as e:
        raise WeightsError(
            f"its memory cannot be shared: {_first_line(e)}",
            "leave out sleep mode, --enable-cumem-allocator, and load formats that map foreign memory (ipc_cache)",
        ) from e
    if len(values) != _NUM_VALUES:
        raise WeightsError(
            f"torch {torch.__version__} tells of shared memory in {len(values)} values; expected {_NUM_VALUES}",
            _OTHER_TORCH,
        )
    _, handle, size, offset, counter, counter_at, event, wait = values
    if handle[1:2] == _EXPANDABLE:
        found = ", ".join(f"{name}={os.environ[name]}" for name in _CONFIGS if name in os.environ)
        raise WeightsError(
            "its memory is one of the allocator's expandable segments, which other processes cannot map",
            f"start it without expandable_segments:True (found {found or 'it set by a program'})",
        )
    if handle[1:2] != _CUDA_MALLOC or len(handle) != _HANDLE_BYTES:
        raise WeightsError(
            f"torch {torch.__version__} names shared memory by {len(handle)} bytes of kind {handle[1:2]!r}; "
            f"expected {_HANDLE_BYTES} of kind {_CUDA_MALLOC!r}",
            _OTHER_TORCH,
        )
    return {
        "uuid": _uuid(storage.device.index),
        "handle": base64.b64encode(handle).decode(),
        "size": size,
        "offset": offset,
        "counter": counter.decode(),
        "counter_at": counter_at,
        "event": base64.b64encode(event).decode(),
        "wait": wait,
    }


def open_(exported: dict[str, Any]) -> torch.UntypedStorage:
    """Map an allocation of another process; the driver opens none where it was made.

    Raises:
        WeightsError: no such card is seen here, or the driver refuses.
    """
    index = _index(str(exported["uuid"]))
    try:
        torch.cuda.init()  # the next call kills the process without it
        return torch.UntypedStorage._new_shared_cuda(
            index,
            base64.b64decode(exported["handle"]),
            exported["size"],
            exported["offset"],
            exported["counter"].encode(),
            exported["counter_at"],
            base64.b64decode(exported["event"]),
            exported["wait"],
        )
    except RuntimeError as e:
        raise WeightsError(
            f"the weights on GPU {exported['uuid']} cannot be mapped: {_first_line(e)}",
            "is the server alive, in the same container (IPC namespace), and CUDA IPC allowed there?",
        ) from e


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


def _index(uuid: str) -> int:
    """This process's number of the card. Raises WeightsError."""
    try:
        seen = [_uuid(index) for index in range(torch.cuda.device_count())]
    except RuntimeError as e:
        raise WeightsError(f"no GPU can be used in this process: {_first_line(e)}", "see nvidia-smi") from e
    if uuid not in seen:
        raise WeightsError(
            f"the weights lie on GPU {uuid}; this process sees {', '.join(seen) or 'none'}",
            "give server and trainer the same CUDA_VISIBLE_DEVICES, and no MIG slices",
        )
    return seen.index(uuid)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
