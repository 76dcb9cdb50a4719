"""Blocks of a difference: packed and taken either way to the bit, whatever the bits; small; believed in nothing."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secondnature.errors import BadDelta
from secondnature.weights import codec

INTEGERS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
SPECIAL = {
    "bfloat16": [
        0,
        0x8000,
        1,
        0x8001,
        0x7F80,
        0xFF80,
        0x7FC0,
        0x7F81,
        0xFFFF,
        0x007F,
        0x0080,
        0x3F80,
        0xBF80,
    ],
    "float16": [0, 0x8000, 1, 0x8001, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF, 0x03FF, 0x0400, 0x3C00, 0xBC00],
    "float32": [
        0,
        1 << 31,
        1,
        (1 << 31) + 1,
        0x7F800000,
        0xFF800000,
        0x7FC00000,
        0x7F800001,
        2**32 - 1,
        0x3F800000,
    ],
}
"""Zeros, denormals, infinities, NaNs of several payloads, the ends of binades, ones."""


def there_and_back(before: np.ndarray, after: np.ndarray, dtype: str) -> bytes:
    """Packed; seen to lead both ways, and to change nothing that it was made from."""
    old, new = (np.ascontiguousarray(x).view(np.uint8) for x in (before, after))
    kept = old.copy(), new.copy()
    packed = codec.pack(old, new, dtype)
    assert (old == kept[0]).all()
    assert (new == kept[1]).all()
    assert (packed == b"") == bool((old == new).all())
    assert len(packed) <= codec.max_packed_bytes(old.size)
    if packed:
        target = old.copy()
        codec.apply_(packed, target, dtype)
        assert target.tobytes() == new.tobytes()
        codec.apply_(packed, target, dtype, back=True)
        assert target.tobytes() == old.tobytes()
    return packed


@given(data=st.data(), dtype=st.sampled_from(sorted(INTEGERS)), size=st.integers(0, 700))
@settings(max_examples=300, deadline=None)
def test_any_bits_come_back_both_ways(data: st.DataObject, dtype: str, size: int) -> None:
    integer = INTEGERS[dtype]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    highest = np.iinfo(integer).max
    before = rng.integers(0, highest, size, dtype=integer, endpoint=True)
    special = rng.random(size) < data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    before[special] = rng.choice(np.array(SPECIAL[dtype], integer), int(special.sum()))
    step = data.draw(st.sampled_from([1, 3, 300, int(highest)]))
    change = rng.integers(0, step, size, dtype=integer, endpoint=True)
    change[rng.random(size) > data.draw(st.sampled_from([0.01, 0.3, 1.0]))] = 0
    signs = rng.choice(np.array([1, highest], integer), size)
    there_and_back(before, before + change * signs, dtype)


@pytest.mark.parametrize("dtype", sorted(INTEGERS))
def test_every_special_value_becomes_every_other(dtype: str) -> None:
    values = np.array(SPECIAL[dtype], INTEGERS[dtype])
    there_and_back(np.repeat(values, len(values)), np.tile(values, len(values)), dtype)


@pytest.mark.parametrize("dtype", sorted(INTEGERS))
def test_neighbouring_floats_are_neighbouring_integers(dtype: str) -> None:
    """Across zero and across every power of two; both zeros count."""
    kind = codec.DTYPES[dtype]
    if dtype != "float32":
        everything = np.arange(1 << 16, dtype=np.uint16)
        assert (kind.unordered(kind.ordered(everything)) == everything).all()
    ones = np.array([1.0, -1.0, 2.0, -2.0], np.float32)
    bits = {"bfloat16": (ones.view(np.uint32) >> 16).astype(np.uint16), "float32": ones.view(np.uint32)}.get(
        dtype, ones.astype(np.float16).view(np.uint16)
    )
    order = kind.ordered(bits).astype(np.int64)
    assert order[3] < order[1] < order[0] < order[2]
    above = kind.ordered(bits + np.array([1, 1, 1, 1], bits.dtype)).astype(np.int64)
    assert (above - order).tolist() == [1, -1, 1, -1]
    zeros = kind.ordered(np.array([0, kind.sign], bits.dtype)).astype(np.int64)
    assert zeros[0] - zeros[1] == 1


def test_small_changes_take_what_their_entropy_says() -> None:
    """Changes of one step, whose share falls by half from binade to binade: as stochastic rounding makes them."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.02, 1 << 20).astype(np.float32)
    before = (values.view(np.uint32) >> 16).astype(np.uint16)
    exponents = codec.DTYPES["bfloat16"].exponents(before)
    for rate in (2e-7, 1e-5):
        share = np.minimum(0.5, rate / 2.0 ** (exponents.astype(float) - 127 - 7))
        changed = rng.random(before.size) < share
        after = before + (changed * rng.choice(np.array([1, 0xFFFF], np.uint16), before.size)).astype(
            np.uint16
        )
        entropy = float((-share * np.log2(share) - (1 - share) * np.log2(1 - share) + share).sum()) / 8
        packed = there_and_back(before, after, "bfloat16")
        assert len(packed) < 1.1 * entropy, (rate, len(packed), entropy)


def test_rows_that_nothing_touched_cost_nothing() -> None:
    rng = np.random.default_rng(0)
    before = rng.integers(0x3B00, 0x3D00, (1000, 768), dtype=np.uint16)
    after = before.copy()
    after[[3, 500, 999]] += rng.integers(0, 2, (3, 768), dtype=np.uint16)
    assert len(there_and_back(before.ravel(), after.ravel(), "bfloat16")) < 3 * 768 / 8 * 1.25 + 100


def test_what_cannot_be_packed_is_stored() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 255, 1 << 16):
        before, after = (rng.integers(0, 1 << 16, size, dtype=np.uint16) for _ in range(2))
        assert len(there_and_back(before, after, "bfloat16")) <= 2 * size + 1


def test_damage_is_refused_or_gives_other_values_and_nothing_is_written_before_it_is_known() -> None:
    rng = np.random.default_rng(0)
    before = rng.integers(0x3B00, 0x3D00, 3000, dtype=np.uint16)
    after = before + (rng.random(3000) < 0.2).astype(np.uint16)
    packed = there_and_back(before, after, "bfloat16")
    refused = 0
    for i in range(len(packed)):
        for flip in (1, 0x10, 0x80, 0xFF):
            target = before.copy().view(np.uint8)
            try:
                codec.apply_(packed[:i] + bytes([packed[i] ^ flip]) + packed[i + 1 :], target, "bfloat16")
            except BadDelta:
                refused += 1
                assert (target.view(np.uint16) == before).all()
    assert refused > len(packed) / 3
    for bad in (
        b"",
        b"\7",
        b"\0",
        b"\1",
        packed[:-1],
        packed + b"\0",
        b"\1" + bytes(60),
        b"\1" + b"\xff" * 60,
    ):
        with pytest.raises(BadDelta, match="damaged"):
            codec.apply_(bad, before.copy().view(np.uint8), "bfloat16")


@given(noise=st.binary(max_size=300), size=st.integers(1, 600), back=st.booleans())
@settings(max_examples=300, deadline=None)
def test_anything_is_refused_or_read_within_the_block(noise: bytes, size: int, back: bool) -> None:
    target = np.zeros(2 * size, np.uint8)
    tracemalloc.start()
    try:
        codec.apply_(b"\1" + noise, target, "bfloat16", back=back)
    except BadDelta:
        assert not target.any()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1_000_000
