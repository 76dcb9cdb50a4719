"""Blocks of the formats before: read to the bit, and never to more than was expected."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from secondnature.errors import BadDelta
from secondnature.weights import xor


def packed_xor(before: np.ndarray, after: np.ndarray) -> bytes:
    """A block as format 2 had it: all low bytes, all high ones, zstd; empty where they are equal."""
    joined = np.bitwise_xor(before, after)
    if not joined.any():
        return b""
    split = joined.reshape(-1, 2).T if joined.size % 2 == 0 else joined
    return zstandard.ZstdCompressor(level=3).compress(split.tobytes())


@given(data=st.data(), size=st.integers(0, 700))
@settings(max_examples=200, deadline=None)
def test_a_block_and_its_difference_give_the_other_block(data: st.DataObject, size: int) -> None:
    before, mask = (
        np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8) for _ in range(2)
    )
    after = np.bitwise_xor(before, mask if data.draw(st.booleans()) else mask & np.uint8(1))
    packed = packed_xor(before, after)
    assert len(packed) <= xor.max_packed_bytes(size)
    if packed:
        split = xor.unpack(packed, size)
        target = before.copy()
        xor.xor_split_(target, split)
        assert (target == after).all()
        step = data.draw(st.integers(1, size))
        for start in range(0, size, step):  # in parts, as a whole tensor's frame is read
            xor.xor_split_(target, split[start : start + step], start)
        assert (target == before).all()


def test_a_frame_that_announces_another_size_is_refused_before_it_is_unpacked() -> None:
    bomb = zstandard.ZstdCompressor(level=3).compress(bytes(50_000_000))
    assert len(bomb) < 5_000
    tracemalloc.start()
    with pytest.raises(BadDelta, match=r"announces 50,000,000 bytes; expected 4,096"):
        xor.unpack(bomb, 4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4096))
    with pytest.raises(BadDelta, match="announces no size"):
        xor.unpack(silent, 4096)


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    """The size stands in the frame's header: made smaller or larger than what is packed."""
    for told, held in ((4096, 50_000_000), (4096, 300)):
        frame = bytearray(zstandard.ZstdCompressor(level=3).compress(np.zeros(held, np.uint8).data))
        single = zstandard.ZstdCompressor(level=3).compress(bytes(told))
        header = zstandard.frame_header_size(single)
        crafted = single[:header] + bytes(frame[zstandard.frame_header_size(bytes(frame)) :])
        assert zstandard.frame_content_size(crafted) == told
        with pytest.raises(BadDelta, match="damaged"):
            xor.unpack(crafted, told)


def test_damage_is_refused() -> None:
    packed = packed_xor(np.zeros(1000, np.uint8), np.ones(1000, np.uint8))
    for bad in (b"", b"1234", packed[:-1], b"\0" + packed[1:]):
        with pytest.raises(BadDelta):
            xor.unpack(bad, 1000)
