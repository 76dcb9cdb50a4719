"""The sums of the intended updates, twice the size of bf16 weights: in memory, or in a mapped file (trainer).

They only tell how far each tensor was meant to move, so they must not decide whether a lesson fits the machine.
Of a large model they lie in a file without a name in the lesson's directory: its pages are the system's to write
out and to drop when memory is short, and the file is gone with the process, however that ends. Places are
allocated for real: on a full disk a sparse file would kill whoever writes into its memory. What the disk refuses
stays in memory.
"""

from __future__ import annotations

import logging
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["MIN_MAPPED_BYTES", "Sums"]

LOG = logging.getLogger("secondnature.trainer")
MIN_MAPPED_BYTES = 256 * 1024 * 1024
"""Sums that are smaller, all tensors together, stay in memory: no disk is worth so little."""


class Sums:
    """fp32 tensors that begin at zero."""

    def __init__(self, folder: Path | None, min_bytes: int = MIN_MAPPED_BYTES) -> None:
        """`folder`: where a file may lie; None: everything stays in memory."""
        self._folder = folder
        self._min_bytes = min_bytes
        self._fd: int | None = None
        self._end = 0

    def zeros(self, like: Tensor, total_bytes: int) -> Tensor:
        """Zeros (fp32) of the shape of `like`, which is one of `total_bytes` of sums that are to come."""
        mappable = self._folder is not None and like.device.type == "cpu" and like.numel() > 0
        if mappable and total_bytes >= self._min_bytes:
            try:
                return self._mapped(4 * like.numel()).view(like.shape)
            except OSError as e:
                LOG.warning("sums of updates stay in memory: %s: %s", self._folder, e.strerror or e)
                self._folder = None
        return torch.zeros_like(like, dtype=torch.float32)

    def _mapped(self, nbytes: int) -> Tensor:
        assert self._folder is not None, "asked for before"
        if self._fd is None:
            self._fd = os.open(self._folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        begin, room = self._end, -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        os.posix_fallocate(self._fd, begin, room)
        memory = mmap.mmap(self._fd, nbytes, mmap.MAP_SHARED, offset=begin)
        self._end += room
        return torch.frombuffer(memory, dtype=torch.float32)

    def close(self) -> None:
        """No further tensor is asked for; those that were given live on."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __del__(self) -> None:
        self.close()
