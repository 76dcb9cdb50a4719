"""Content ids: the same weights have the same name everywhere, also after an undo (any process with weights).

An id is the root of a tree: sha256 of every block of a tensor, of a tensor's header and its blocks, of all
tensors in the order of their names. So tensors can come one at a time and in any order, a part can be checked, or
sent, alone, and a tensor that did not change needs no second look (docs/decisions/content-ids-as-a-tree.md).
`w2-` and 16 hex digits name it. The blocks of a large tensor are hashed on several threads where there are cores
for it. Ids of the first kind, `w` and 16 digits, are one sha256 over everything in the
order of names; homes hold them, so they are still computed where something is compared with one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch

from secondnature.errors import WeightsError

__all__ = [
    "BLOCK_BYTES",
    "MAX_THREADS",
    "Bytes",
    "ContentHasher",
    "Named",
    "Weights",
    "blocks",
    "content_id",
    "is_flat",
    "named",
    "root_id",
    "tensor_digest",
]

BLOCK_BYTES = 1 << 22
"""Of a tensor's bytes, hashed (and packed, in a delta) at a time; the last block of a tensor is what is left."""
MAX_THREADS = max(1, min(8, len(os.sched_getaffinity(0)) // 4))
"""That hash one tensor: a quarter of the cores, for whoever answers meanwhile needs the others. sha256 of 54 GB (27
billion bf16 weights) takes one thread half a minute."""
_FLAT = re.compile(r"w[0-9a-f]{16}")
_TREE = re.compile(r"w2-[0-9a-f]{16}")
_HEX_DIGITS = 16

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
Named = tuple[str, torch.Tensor]
Weights = Mapping[str, torch.Tensor] | Iterable[Named]
"""Tensors by name: at hand, or one after the other."""


def named(weights: Weights) -> Iterable[Named]:
    """(name, tensor) of either."""
    if isinstance(weights, Mapping):
        return cast("Mapping[str, torch.Tensor]", weights).items()
    return weights


def blocks(tensor: torch.Tensor) -> Iterator[Bytes]:
    """The tensor's bytes in order, by blocks of `BLOCK_BYTES`.

    Views of a contiguous tensor in host memory; of one on a GPU, copies, one at a time.
    """
    flat = tensor.detach().contiguous().view(-1)
    step = BLOCK_BYTES // flat.element_size()
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].view(torch.uint8).cpu().numpy()


def _sha256(part: Bytes) -> bytes:
    return hashlib.sha256(part.data).digest()


def _digested(parts: Iterator[Bytes], whole: Any, num_threads: int) -> Iterator[Bytes]:
    """The blocks as they pass; their digests go into `whole`, in order. No more blocks are kept than threads."""
    if num_threads == 1:
        for part in parts:
            whole.update(_sha256(part))
            yield part
        return
    with ThreadPoolExecutor(num_threads) as pool:
        ahead: deque[Future[bytes]] = deque()
        for part in parts:
            ahead.append(pool.submit(_sha256, part))
            if len(ahead) > num_threads:
                whole.update(ahead.popleft().result())
            yield part
        for digest in ahead:
            whole.update(digest.result())


def is_flat(version: str) -> bool:
    """Is this an id of the first kind?

    Raises:
        WeightsError: it is a content id of neither kind.
    """
    if _FLAT.fullmatch(version):
        return True
    if _TREE.fullmatch(version):
        return False
    raise WeightsError(
        f"{version!r} is no content id; expected w2- or w and {_HEX_DIGITS} hex digits",
        "was it written by a newer version? then upgrade secondnature",
    )


def _header(name: str, tensor: torch.Tensor) -> bytes:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return json.dumps([name, dtype, list(tensor.shape), BLOCK_BYTES], separators=(",", ":")).encode() + b"\n"


def tensor_digest(name: str, tensor: torch.Tensor) -> bytes:
    """32 bytes: sha256 over name, dtype, shape and the sha256 of every block."""
    hasher = ContentHasher()
    hasher.add(name, tensor)
    return hasher.digests[name]


def root_id(digests: Mapping[str, bytes]) -> str:
    """The id of weights whose tensors have these digests."""
    root = hashlib.sha256(b"weights\n")
    for name in sorted(digests):
        root.update(digests[name])
    return "w2-" + root.hexdigest()[:_HEX_DIGITS]


class ContentHasher:
    """The content id of tensors that come one at a time.

    `like`: an id; the result is of its kind. None: the newest. An id of the first kind needs the tensors in the
    order of their names; for the others any order will do.

    Raises:
        WeightsError: `like` is no content id.
    """

    def __init__(self, like: str | None = None) -> None:
        self._flat = hashlib.sha256() if like is not None and is_flat(like) else None
        self.digests: dict[str, bytes] = {}
        """By name, as `tensor_digest`; empty bytes where the id is of the first kind, which has no parts."""
        self._last = ""

    @property
    def is_flat(self) -> bool:
        """Is the id of the first kind?"""
        return self._flat is not None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Read one tensor.

        Raises:
            WeightsError: a name came twice, or out of order where the order matters.
        """
        for _ in self.passing(name, tensor):
            pass

    def passing(self, name: str, tensor: torch.Tensor) -> Iterator[Bytes]:
        """The tensor's blocks, each read on its way: for callers that need the bytes too.

        The tensor counts when the last block was taken. Raises: as `add`.
        """
        if name in self.digests:
            raise WeightsError(f"tensor {name} came twice", "each tensor is read once")
        if self._flat is None:
            whole = hashlib.sha256(b"tensor\n" + _header(name, tensor))
            num_threads = max(1, min(MAX_THREADS, tensor.nbytes // BLOCK_BYTES))
            yield from _digested(blocks(tensor), whole, num_threads)
            self.digests[name] = whole.digest()
            return
        if self.digests and name <= self._last:
            raise WeightsError(
                f"tensor {name} came after {self._last}", "ids of the first kind need the order of names"
            )
        self._flat.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        for part in blocks(tensor):
            self._flat.update(part.data)
            yield part
        self.digests[name], self._last = b"", name

    def add_digest(self, name: str, digest: bytes) -> None:
        """As `add`, of a tensor whose digest is known. Not for ids of the first kind: they have no parts."""
        assert self._flat is None, "an id of the first kind has no parts"
        if name in self.digests:
            raise WeightsError(f"tensor {name} came twice", "each tensor is read once")
        self.digests[name] = digest

    def id(self) -> str:
        """The id of what was added."""
        if self._flat is None:
            return root_id(self.digests)
        return "w" + self._flat.hexdigest()[:_HEX_DIGITS]


def content_id(weights: Weights, like: str | None = None) -> str:
    """The version of these weights, in the kind of the id `like` (None: the newest).

    A mapping in any order; an iterable is read once, and must be in the order of names for an id of the first
    kind.

    Raises:
        WeightsError: `like` is no content id; a name came twice, or out of order where that matters.
    """
    hasher = ContentHasher(like)
    pairs = named(weights)
    for name, tensor in sorted(pairs, key=lambda x: x[0]) if isinstance(weights, Mapping) else pairs:
        hasher.add(name, tensor)
    return hasher.id()
