"""Blocks of a difference in the formats before: XOR, low and high bytes apart, zstd; only read.

What a block unpacks to is decided by who reads it: a frame that announces another size is refused before it is
unpacked, because zstandard believes what a frame says of itself, and 1.5 kB can say 50 MB.
"""

from __future__ import annotations

import numpy as np
import zstandard

from secondnature.errors import BadDelta

__all__ = ["as_bytes", "max_packed_bytes", "unpack", "xor_split_"]

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
_HINT = "restore the lesson's directory from a backup"


def max_packed_bytes(nbytes: int) -> int:
    """The most bytes that a packed block of `nbytes` can have."""
    return nbytes + nbytes // 128 + 512


def _halves(joined: Bytes) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Bytes as they lie in a tensor, seen as (2, n): all low bytes, all high bytes. One row where they are odd."""
    return joined.reshape(-1, 2).T if joined.size % 2 == 0 else joined.reshape(1, -1)


def as_bytes(data: bytes) -> Bytes:
    """The same memory, as an array."""
    return np.frombuffer(data, np.uint8)


def unpack(packed: bytes, nbytes: int) -> Bytes:
    """The split bytes of a packed block that is known to be of `nbytes`.

    Raises:
        BadDelta: damaged, or of another size, which is seen before it is unpacked.
    """
    try:
        announced = zstandard.frame_content_size(packed)
        if announced != nbytes:
            found = "no size" if announced < 0 else f"{announced:,} bytes"
            raise BadDelta(f"a packed block announces {found}; expected {nbytes:,}", _HINT)
        # a frame may hold less than it announces; zstandard refuses that, and never writes more
        raw = zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise BadDelta(f"a packed block is damaged: {e}", _HINT) from None
    if len(raw) != nbytes:
        raise BadDelta(f"a packed block has {len(raw):,} bytes; expected {nbytes:,}", _HINT)
    return as_bytes(raw)


def xor_split_(target: Bytes, split: Bytes, start: int = 0) -> None:
    """XOR split bytes into `target` (as they lie in the tensor), in place.

    `target` are the bytes of the whole of which `split` is the part that begins at `start`: all low bytes come
    before all high ones.
    """
    halves = _halves(target)
    width = halves.shape[1]
    while split.size:
        row, column = divmod(start, width)
        part = split[: width - column]
        mine = halves[row, column : column + part.size]
        np.bitwise_xor(mine, part, out=mine)
        split, start = split[part.size :], start + part.size
