"""Blocks of a difference: how far each value moved, in steps from float to float (any process with weights).

The bits of a float, read as an integer that grows with its value, count the floats below it; so a small change is a
small integer, also across zero, and any bits at all (NaN, -0.0) come back. How small depends on the value: one
learning rate moves a weight of 0.001 by more steps than one of 1. Changes are therefore coded by the exponent that
the value had before (their conditional entropy, docs/benchmarks.md), in classes of exponents that changed alike:
which are not 0; of these, which are not 1; and so on, as gaps between positions in Golomb's code with a power of
two (Rice 1979), whose parameter follows from the two counts. So there are no tables to send, which small tensors
would pay for, and everything is array arithmetic. Large changes (fp32) have their low bits stored as they are.

An undo knows the value after, not the one before. The few elements whose exponent changed are listed, so both
directions see the same classes. What is packed is believed in nothing: each count is checked against its bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from secondnature.errors import BadDelta

__all__ = ["DTYPES", "PACKED_BYTES", "Bytes", "apply_", "max_packed_bytes", "pack"]

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class _Float:
    """How a dtype's bits are cut."""

    integer: Any
    mantissa: int
    exponent: int
    """Bits of each."""

    @property
    def sign(self) -> int:
        """The sign's bit."""
        return 1 << (self.mantissa + self.exponent)

    def exponents(self, bits: Array) -> Array:
        """Of each element, as a byte."""
        return np.right_shift(bits, self.mantissa).astype(np.uint8) & np.uint8((1 << self.exponent) - 1)

    def ordered(self, bits: Array) -> Array:
        """Integers in the order of the floats: positive ones above, negative ones reversed below."""
        flips = bits.view(f"i{bits.itemsize}") >> (8 * bits.itemsize - 1)
        return bits ^ (flips.view(bits.dtype) | bits.dtype.type(self.sign))

    def unordered(self, integers: Array) -> Array:
        """The bits again."""
        flips = (~integers).view(f"i{integers.itemsize}") >> (8 * integers.itemsize - 1)
        return integers ^ (flips.view(integers.dtype) | integers.dtype.type(self.sign))


DTYPES = {
    "bfloat16": _Float(np.uint16, 7, 8),
    "float16": _Float(np.uint16, 10, 5),
    "float32": _Float(np.uint32, 23, 8),
}
"""Of weights, by the names that manifests have for them; their places are the numbers that files have for them."""
PACKED_BYTES = 1 << 19
"""So many bytes of a tensor are packed at a time: that takes some 30 times as many, a moment long."""
_STORED, _CODED = 0, 1
"""First byte of a packed block: the bytes' XOR as it is, or coded."""
_SEGMENT = 512
"""Elements that are left out together where nothing in them changed: rows of an embedding that no text touched."""
_SHIFTED = 32
"""Classes from here on store low bits as they are: class 32 + s, s bits. Those below: by the share of changes."""
_LEVELS = 40
"""Values above are stored as they are."""
_SAMPLED = 1 << 17
"""So many elements tell how to choose classes; it decides the size only."""
_HINT = "restore the lesson's directory from a backup"


def max_packed_bytes(nbytes: int) -> int:
    """The most bytes that a packed block of `nbytes` can have."""
    return nbytes + 1


def pack(before: Bytes, after: Bytes, dtype: str) -> bytes:
    """What makes of one block the other, either way; empty where they are equal.

    Args:
        before, after: bytes of as many whole elements.
        dtype: of `DTYPES`.
    """
    kind = DTYPES[dtype]
    old, new = before.view(kind.integer), after.view(kind.integer)
    change = kind.ordered(new) - kind.ordered(old)
    zigzag = (change << 1) ^ (change.view(f"i{change.itemsize}") >> (8 * change.itemsize - 1)).view(
        change.dtype
    )
    del change
    if not zigzag.any():
        return b""
    packed = _packed(kind, old, new, zigzag)
    if len(packed) >= before.size:
        return bytes([_STORED]) + np.bitwise_xor(before, after).tobytes()
    return bytes([_CODED]) + packed


def apply_(packed: bytes, target: Bytes, dtype: str, *, back: bool = False) -> None:
    """Make of the block before, in place, the one after; `back`: of the one after the one before.

    Raises:
        BadDelta: it is no packed block of this size; nothing was written.
    """
    try:
        if packed[0] == _STORED and len(packed) == target.size + 1:
            target ^= np.frombuffer(packed, np.uint8)[1:]
        elif packed[0] == _CODED:
            kind = DTYPES[dtype]
            bits = target.view(kind.integer)
            zigzag = _unpacked(kind, packed[1:], bits, back)
            change = (zigzag >> 1) ^ (-(zigzag & 1).view(f"i{zigzag.itemsize}")).view(zigzag.dtype)
            at = kind.ordered(bits)
            bits[:] = kind.unordered(at - change if back else at + change)
        else:
            raise ValueError("of no kind that is known")
    except (IndexError, ValueError, OverflowError) as e:
        raise BadDelta(f"a packed block is damaged: {e}", _HINT) from None


# ---------------------------------------------------------------------------------------------- the two directions


def _packed(kind: _Float, old: Array, new: Array, zigzag: Array) -> bytes:
    out = _Writer()
    exponents = kind.exponents(old)
    _write_crossings(out, kind, exponents, new)
    num_segments = -(-zigzag.size // _SEGMENT)
    whole = _padded(zigzag, num_segments)
    kept = whole.any(axis=1)
    few = 4 * int(kept.sum()) < 3 * num_segments
    out.number(few)
    if few:
        out.places(num_segments, np.flatnonzero(kept))
        zigzag, exponents = whole[kept].ravel(), _padded(exponents, num_segments)[kept].ravel()
    classes = _classes(out, exponents, zigzag)[exponents]
    order = np.argsort(classes, kind="stable")
    in_order = np.take(zigzag, order)
    del order
    begin = 0
    for number, count in enumerate(np.bincount(classes).tolist()):
        if count:
            _write_class(out, in_order[begin : begin + count], number)
            begin += count
    return out.bytes()


def _unpacked(kind: _Float, packed: bytes, bits: Array, back: bool) -> Array:
    """The zigzagged changes of a block whose bits are these."""
    source = _Reader(packed)
    exponents = kind.exponents(bits)
    _read_crossings(source, kind, exponents, bits, back)
    num_segments = -(-bits.size // _SEGMENT)
    kept: Array | None = None
    if source.number(1):
        kept = source.places(num_segments)
        exponents = _padded(exponents, num_segments)[kept].ravel()
    first, count = source.number(255), source.number(256)
    table = np.full(256, _SHIFTED - 1, np.uint8)
    table[first : first + count] = source.raw(count)
    classes = table[exponents]
    order = np.argsort(classes, kind="stable")
    in_order = np.empty(classes.size, kind.integer)
    begin = 0
    for number, size in enumerate(np.bincount(classes).tolist()):
        if size:
            in_order[begin : begin + size] = _read_class(source, size, number, kind.integer)
            begin += size
    source.end()
    found = np.empty_like(in_order)
    found[order] = in_order
    if kept is None:
        return found
    whole = np.zeros((num_segments, _SEGMENT), kind.integer)
    whole[kept] = found.reshape(-1, _SEGMENT)
    return whole.ravel()[: bits.size]


def _padded(values: Array, num_segments: int) -> Array:
    """(segments, elements); zeros after the end."""
    if values.size == num_segments * _SEGMENT:
        return values.reshape(num_segments, _SEGMENT)
    whole = np.zeros(num_segments * _SEGMENT, values.dtype)
    whole[: values.size] = values
    return whole.reshape(num_segments, _SEGMENT)


def _write_crossings(out: _Writer, kind: _Float, exponents: Array, new: Array) -> None:
    """Where the exponent after is another than before, and which it was where that cannot be guessed."""
    after = kind.exponents(new)
    places = np.flatnonzero(after != exponents)
    out.places(new.size, places)
    guessed, were = _neighbours(kind, after[places], new[places]), exponents[places]
    wrong = np.flatnonzero(guessed != were)
    out.places(places.size, wrong)
    out.raw(were[wrong])


def _read_crossings(source: _Reader, kind: _Float, exponents: Array, bits: Array, back: bool) -> None:
    """Make the exponents those before, where they are those after."""
    places = source.places(bits.size)
    wrong = source.places(places.size)
    were = source.raw(wrong.size)
    if back:
        guessed = _neighbours(kind, exponents[places], bits[places])
        guessed[wrong] = were
        exponents[places] = guessed


def _neighbours(kind: _Float, exponents: Array, bits: Array) -> Array:
    """From which exponent a small step would have come: from above where the mantissa is near its end."""
    half = (bits >> (kind.mantissa - 1)) & 1
    return exponents + (2 * half.astype(np.uint8) - 1).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- classes and levels


def _classes(out: _Writer, exponents: Array, zigzag: Array) -> Array:
    """(256): the class of each exponent, which is written too; the last of the rare ones where nothing changed."""
    step = max(1, zigzag.size // _SAMPLED)
    seen, values = exponents[::step], zigzag[::step]
    number = np.bincount(seen, minlength=256)
    changed = np.bincount(seen[values != 0], minlength=256)
    total = np.bincount(seen, weights=values, minlength=256)
    table = np.full(256, _SHIFTED - 1, np.uint8)
    known = np.flatnonzero(changed)
    for i in known.tolist():
        mean = float(total[i] / number[i])
        if mean > 2.9:
            table[i] = _SHIFTED + int(math.log2(0.7 * mean))
        else:
            table[i] = min(_SHIFTED - 1, round(-math.log2(changed[i] / number[i])))
    first, end = (int(known[0]), int(known[-1]) + 1) if known.size else (0, 0)
    out.number(first)
    out.number(end - first)
    out.raw(table[first:end])
    return table


def _write_class(out: _Writer, values: Array, number: int) -> None:
    """One class's values: level by level, which of those that are left are larger."""
    if number >= _SHIFTED:
        out.low(values, number - _SHIFTED)
        values = values >> (number - _SHIFTED)
    for _ in range(_LEVELS):
        larger = np.flatnonzero(values)
        if 2 * larger.size > values.size:
            out.places(values.size, np.flatnonzero(values == 0), inverted=True)
        else:
            out.places(values.size, larger, inverted=False)
        if not larger.size:
            return
        values = values[larger] - 1
    out.low(values, 8 * values.itemsize)


def _read_class(source: _Reader, size: int, number: int, integer: Any) -> Array:
    values = np.zeros(size, integer)
    shift = number - _SHIFTED if number >= _SHIFTED else 0
    if shift >= 8 * values.itemsize:
        raise ValueError(f"a class of {shift} low bits")
    low = source.low(size, shift)
    left: Array | None = None
    for _ in range(_LEVELS):
        places = source.either(size)
        left = places if left is None else left[places]
        size = left.size
        if not size:
            break
        values[left] += 1
    else:
        assert left is not None, "there is a level"
        values[left] += source.low(size, 8 * values.itemsize).astype(integer)
    return np.left_shift(values, shift) | low.astype(integer) if shift else values


# ---------------------------------------------------------------------------------------------- streams


def _parameter(size: int, number: int) -> int:
    """Of Golomb's code for `number` places in `size`: the least k with (1 - p)^(2^k) <= 0.618, in integers."""
    k = 0
    while (2000 * number << k) < 481 * (2 * size - number):
        k += 1
    return k


class _Writer:
    """Numbers, gaps and raw bytes, each in a stream of its own."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._unary: list[Array] = []
        self._bits: list[Array] = []
        self._bytes: list[bytes] = []

    def number(self, value: int) -> None:
        """Seven bits a byte, the lowest first."""
        value = int(value)
        while value > 127:
            self._head.append(value & 127 | 128)
            value >>= 7
        self._head.append(value)

    def raw(self, values: Array) -> None:
        """Bytes."""
        self._bytes.append(values.tobytes())

    def low(self, values: Array, count: int) -> None:
        """The lowest `count` bits of each: whole bytes first, each in a plane of its own."""
        for i in range(count // 8):
            self._bytes.append((values >> (8 * i)).astype(np.uint8).tobytes())
        rest = count % 8
        if rest:
            top = (values >> (count - rest)).astype(np.uint8)
            self._bits.append(np.unpackbits(top[:, None], axis=1, count=rest, bitorder="little").ravel())

    def places(self, size: int, places: Array, inverted: bool | None = None) -> None:
        """Ascending places below `size`. `inverted`: said too, where it is not None."""
        number = places.size
        self.number(number if inverted is None else 2 * number + inverted)
        if not number:
            return
        gaps = np.empty(number, np.int32)
        gaps[0] = places[0]
        np.subtract(places[1:], places[:-1], out=gaps[1:], casting="unsafe")
        gaps[1:] -= 1
        k = _parameter(size, number)
        self._unary.append((gaps >> k) + 1)
        self.low(gaps, k)

    def bytes(self) -> bytes:
        """All of it."""
        unary = np.zeros(0, np.uint8)
        if self._unary:
            ends = np.cumsum(np.concatenate(self._unary), dtype=np.int64)
            self._unary.clear()
            unary = np.zeros(int(ends[-1]), np.uint8)
            unary[ends - 1] = 1
            unary = np.packbits(unary)
        bits = np.packbits(np.concatenate(self._bits)).tobytes() if self._bits else b""
        body = _Writer()
        for part in (self._head, unary, bits):
            body.number(len(part))
        return bytes(body._head) + bytes(self._head) + unary.tobytes() + bits + b"".join(self._bytes)


class _Reader:
    """What a `_Writer` wrote, in the same order. Raises ValueError: it is not that."""

    def __init__(self, packed: bytes) -> None:
        self._data, self._at = np.frombuffer(packed, np.uint8), 0
        lengths = [self.number(len(packed)) for _ in range(3)]
        head = self._at
        parts = np.cumsum([head, *lengths]).tolist()
        if parts[-1] > len(packed):
            raise ValueError("its streams are longer than it is")
        self._end_of_head = parts[1]
        self._ends = np.flatnonzero(np.unpackbits(self._data[parts[1] : parts[2]])).astype(np.int64)
        self._ends_used, self._unary_at = 0, -1
        self._bits = np.unpackbits(self._data[parts[2] : parts[3]])
        self._bits_at = 0
        self._bytes_at = parts[3]

    def number(self, most: int) -> int:
        """A number that may not be above `most`."""
        value = shift = 0
        while True:
            byte = int(self._data[self._at])
            self._at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
            if shift > 63:
                raise ValueError("a number has no end")
        if value > most:
            raise ValueError(f"{value:,} where at most {most:,} can be")
        return value

    def raw(self, count: int) -> Bytes:
        """So many bytes."""
        found = self._data[self._bytes_at : self._bytes_at + count]
        self._bytes_at += count
        if found.size != count:
            raise ValueError("it ends too early")
        return found

    def low(self, number: int, count: int) -> Array:
        """`count` low bits of each of so many numbers (uint32)."""
        found = np.zeros(number, np.uint32)
        for i in range(count // 8):
            found |= self.raw(number).astype(np.uint32) << np.uint32(8 * i)
        rest = count % 8
        if rest:
            bits = self._bits[self._bits_at : self._bits_at + rest * number]
            self._bits_at += rest * number
            if bits.size != rest * number:
                raise ValueError("it ends too early")
            top = np.packbits(bits.reshape(number, rest), axis=1, bitorder="little").ravel()
            found |= top.astype(np.uint32) << np.uint32(count - rest)
        return found

    def places(self, size: int) -> Array:
        """Ascending places below `size`."""
        return self._places(size, self.number(size))

    def either(self, size: int) -> Array:
        """The same, where it is said whether they are those, or all others."""
        number, inverted = divmod(self.number(2 * size + 1), 2)
        places = self._places(size, number)
        if not inverted:
            return places
        others = np.ones(size, bool)
        others[places] = False
        return np.flatnonzero(others)

    def _places(self, size: int, number: int) -> Array:
        if not number:
            return np.zeros(0, np.int64)
        ends = self._ends[self._ends_used : self._ends_used + number]
        self._ends_used += number
        if ends.size != number:
            raise ValueError("it ends too early")
        k = _parameter(size, number)
        gaps = np.diff(ends, prepend=self._unary_at) - 1
        self._unary_at = int(ends[-1])
        found = np.cumsum((gaps << k) + self.low(number, k) + 1) - 1
        if int(found[-1]) >= size:
            raise ValueError(f"place {int(found[-1]):,} of {size:,}")
        return found

    def end(self) -> None:
        """Nothing may be left."""
        whole = self._at == self._end_of_head and self._bytes_at == self._data.size
        if not whole or self._ends_used != self._ends.size or self._bits.size - self._bits_at >= 8:
            raise ValueError("it has more than it says")
