"""Deltas: the lossless difference of the weights before and after a lesson (engine).

How far each value moved in steps between floats (`codec`): forwards it is the lesson, backwards the undo, and no
rounding can come between. A file holds it per changed tensor, block by block, and names the versions before and
after; its checksum stands in the lesson. Each tensor has the digests of its content before and after, so that a
part can be checked, or sent, alone, and weights that a delta is not of are refused by the name of the tensor. Files
are written and read in a stream, blocks on several threads: at most one tensor is in memory, beside blocks, and a
chain of deltas is applied tensor by tensor.

On disk a delta is a safetensors file of bytes. Format 3, per tensor: a head (`_HEAD`), then of each 512 KiB the
number of packed bytes (4 bytes, little-endian; 0: nothing changed) and these. Format 2 has no heads and packs
XORs of 4 MiB (`xor`); format 1, of the first homes, one frame per tensor. Both are read.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import torch
import zstandard
from safetensors import SafetensorError

from secondnature import storage
from secondnature.errors import BadDelta
from secondnature.weights import codec, xor
from secondnature.weights.arena import dtype_name
from secondnature.weights.content import BLOCK_BYTES, MAX_THREADS, ContentHasher, Named, tensor_digest
from secondnature.weights.tensor_file import Place, header, read_places, spans

__all__ = ["Link", "StoredDelta", "Written", "open_", "replayed", "write"]

FORMAT = "secondnature-delta/3"
_FORMAT_1, _FORMAT_2 = "secondnature-delta/1", "secondnature-delta/2"
_HINT = "restore the lesson's directory from a backup"
_LENGTH_BYTES = 4
_MAX_WINDOW_BYTES = 1 << 23
"""Of zstd: four times what packing used."""
_HEAD = struct.Struct("<BQ32s32s")
"""Of a tensor: its dtype (place in `codec.DTYPES`), its bytes, its digest before and after (`tensor_digest`; zeros
where the version before was named in the first kind, which has no parts)."""
_UNKNOWN = bytes(32)
T = TypeVar("T")


class Written(NamedTuple):
    """What `write` wrote."""

    base: str
    """Content id of the weights before."""
    result: str
    """Of those after, of the newest kind."""
    sha256: str
    """Of the file."""


def write(
    path: Path, before: Iterable[Named], after: Mapping[str, torch.Tensor], like: str | None = None
) -> Written:
    """Store what became of the weights, durably; both are read once, block by block.

    Args:
        path: the file.
        before: all tensors of the weights before, in the order of their names.
        after: the weights after (views of the arena, say).
        like: an id; `base` is of its kind (None: the newest).

    Raises:
        BadDelta: the two differ in their tensors, or `before` is out of order; there is no file.
        StorageError: the disk refused; there is no file.
    """
    names = sorted(after)
    room = _room(names, after)
    old, new = ContentHasher(like), ContentHasher()
    places: dict[str, tuple[str, tuple[int, ...], int]] = {}
    with storage.writing(path) as file:
        file.write(bytes(room))
        expected = iter(names)
        for name, tensor in before:
            wanted = next(expected, None)
            now = after.get(name)
            if name != wanted or now is None or _unlike(tensor, now):
                raise BadDelta(
                    f"the weights before have tensor {name} where those after have {wanted or 'no more'}",
                    "are they of the same model, in the order of names?",
                )
            start, dtype = file.tell(), dtype_name(name, now.dtype)
            file.write(bytes(_HEAD.size))
            if _write_blocks(file, dtype, old.passing(name, tensor), new.passing(name, now)):
                end = file.tell()
                file.seek(start)
                number = list(codec.DTYPES).index(dtype)
                file.write(_HEAD.pack(number, now.nbytes, old.digests[name] or _UNKNOWN, new.digests[name]))
                file.seek(end)
                places[name] = ("U8", (end - start,), end - start)
            else:
                file.seek(start)
            del tensor  # before the next one is made
        missing = next(expected, None)
        if missing is not None:
            raise BadDelta(f"the weights before have no tensor {missing}", "are they of the same model?")
        base, result = old.id(), new.id()
        file.truncate()
        file.seek(0)
        file.write(header(places, {"format": FORMAT, "base": base, "result": result}, room))
        sha256 = _sha256(file)
    return Written(base, result, sha256)


def _write_blocks(
    file: BinaryIO, dtype: str, before: Iterator[codec.Bytes], after: Iterator[codec.Bytes]
) -> bool:
    """One tensor's blocks; whether any has changed."""
    changed = False
    pairs = (
        (codec.pack, was[start : start + count], is_[start : start + count], dtype)
        for was, is_ in zip(before, after, strict=True)
        for start, count in spans(was.size, codec.PACKED_BYTES)
    )
    for packed in _in_threads(pairs):
        changed = changed or bool(packed)
        file.write(len(packed).to_bytes(_LENGTH_BYTES, "little") + packed)
    return changed


def _in_threads(calls: Iterable[tuple[Callable[..., T], *tuple[object, ...]]]) -> Iterator[T]:
    """What (function, arguments) give, in order; no more of them are held than there are threads."""
    if MAX_THREADS == 1:
        for function, *arguments in calls:
            yield function(*arguments)
        return
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        ahead: deque[Future[T]] = deque()
        for function, *arguments in calls:
            ahead.append(pool.submit(function, *arguments))
            if len(ahead) > MAX_THREADS:
                yield ahead.popleft().result()
        for future in ahead:
            yield future.result()


def _room(names: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes that the header can have at most: as if everything had changed, and nothing could be packed."""
    worst: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name in names:
        nbytes = _HEAD.size + sum(
            _LENGTH_BYTES + codec.max_packed_bytes(count)
            for _, count in spans(tensors[name].nbytes, codec.PACKED_BYTES)
        )
        worst[name] = ("U8", (nbytes,), nbytes)
    return len(header(worst, {"format": FORMAT, "base": "x" * 32, "result": "x" * 32}))


def _unlike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape != other.shape or one.dtype != other.dtype


def _sha256(file: BinaryIO) -> str:
    """Of a whole file, read block by block."""
    hasher = hashlib.sha256()
    file.seek(0)
    while block := file.read(BLOCK_BYTES):
        hasher.update(block)
    return hasher.hexdigest()


def open_(path: Path, sha256: str | None = None) -> StoredDelta:
    """A stored delta, checked against its checksum; its tensors are read when they are applied.

    Raises:
        BadDelta: missing, damaged, or not a delta.
    """
    try:
        with path.open("rb") as file:
            identity = _identity(file)
            if sha256 is not None:
                found = _sha256(file)
                if found != sha256:
                    raise BadDelta(f"{path}: checksum {found[:12]}; expected {sha256[:12]}", _HINT)
            places, metadata = read_places(path)
            heads = _heads(file, places) if metadata.get("format") == FORMAT else {}
    except OSError as e:
        raise BadDelta(f"{path}: {e.strerror or e}", _HINT) from None
    except (SafetensorError, ValueError) as e:
        raise BadDelta(f"{path}: {e}", _HINT) from None
    if metadata.get("format") not in (FORMAT, _FORMAT_1, _FORMAT_2):
        raise BadDelta(
            f"{path}: format {metadata.get('format')}; expected {FORMAT}",
            "upgrade secondnature, or restore the lesson's directory from a backup",
        )
    sizes = {name: head.nbytes for name, head in heads.items()}
    for name, place in places.items() if not heads else ():
        size = metadata.get(f"bytes:{name}", "0")
        if place.dtype != "U8" or not size.isascii() or not size.isdigit():
            raise BadDelta(f"{path}: tensor {name} is {place.dtype} of {size!r} bytes; expected U8", _HINT)
        if int(size):
            sizes[name] = int(size)
    if "base" not in metadata or "result" not in metadata:
        raise BadDelta(f"{path}: does not say what it is the difference of", _HINT)
    return StoredDelta(
        path, metadata["format"], metadata["base"], metadata["result"], sizes, heads, places, identity
    )


class Head(NamedTuple):
    """What a delta says of one of its tensors."""

    dtype: str
    nbytes: int
    base: bytes
    """Digest before; empty: not known."""
    result: bytes
    """And after."""


def _heads(file: BinaryIO, places: Mapping[str, Place]) -> dict[str, Head]:
    found: dict[str, Head] = {}
    kinds = list(codec.DTYPES)
    for name, place in places.items():
        file.seek(place.start)
        raw = file.read(_HEAD.size) if place.nbytes >= _HEAD.size else b""
        number, nbytes, base, result = _HEAD.unpack(raw) if raw else (len(kinds), 0, b"", b"")
        if place.dtype != "U8" or number >= len(kinds) or not nbytes:
            raise ValueError(f"tensor {name} has no head")
        found[name] = Head(kinds[number], nbytes, b"" if base == _UNKNOWN else base, result)
    return found


def _identity(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class StoredDelta:
    """A delta on disk, checked and not yet read: between `base` and `result`."""

    path: Path
    format: str
    base: str
    """Content id of the weights before."""
    result: str
    """Content id of those after."""
    sizes: Mapping[str, int]
    """Of each changed tensor: its bytes."""
    heads: Mapping[str, Head]
    """Of each; empty in the formats before."""
    _places: Mapping[str, Place]
    _identity: tuple[int, ...]

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Can it be applied to these weights?

        Raises:
            BadDelta: a changed tensor is unknown there, or of another size.
        """
        for name in self.sizes:
            if name not in tensors:
                raise BadDelta(
                    f"the delta's tensor {name} does not fit these weights", "is it of another model?"
                )
            self._check(name, tensors[name])

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        head = self.heads.get(name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.nbytes != self.sizes[name] or (head is not None and head.dtype != dtype):
            raise BadDelta(
                f"the delta's tensor {name} does not fit these weights: {self.sizes[name]:,} bytes"
                f"{f' of {head.dtype}' if head else ''}; expected {tensor.nbytes:,} of {dtype}",
                "is it of another model?",
            )

    def check_digest(self, name: str, digest: bytes, *, after: bool) -> None:
        """Is this the content of the tensor (`tensor_digest`) that the delta leads from, or (`after`) to?

        Raises:
            BadDelta: it is another.
        """
        head = self.heads.get(name)
        wanted = b"" if head is None else head.result if after else head.base
        if wanted and digest and digest != wanted:
            raise BadDelta(
                f"{self.path}: tensor {name} has the content {digest.hex()[:16]}; expected {wanted.hex()[:16]}",
                "is it of other weights? nothing was written" if not after else _HINT,
            )

    @torch.no_grad()
    def apply_(self, name: str, tensor: torch.Tensor, *, back: bool = False, check: bool = True) -> bool:
        """Bring this tensor (contiguous, in host memory) from `base` to `result`, in place.

        Where a file has no checksum, damage may be met after some blocks were done: use it on a copy, as
        `replayed` does.

        Args:
            name: the tensor's.
            tensor: its content.
            back: from `result` to `base`: the undo.
            check: compare the content with what the delta says it is, before and after.

        Returns:
            Whether the delta changes it.

        Raises:
            BadDelta: it is not the tensor that the delta is of (nothing was written), or the file was damaged or
                changed since.
        """
        if name not in self.sizes:
            return False
        self._check(name, tensor)
        if check:
            self.check_digest(name, tensor_digest(name, tensor), after=back)
        target = tensor.detach().view(-1).view(torch.uint8).numpy()
        try:
            with self.path.open("rb") as file:
                if _identity(file) != self._identity:
                    raise BadDelta(f"{self.path}: was changed since it was checked", _HINT)
                if self.format == _FORMAT_1:
                    self._apply_frame(file, name, target)
                else:
                    self._apply_blocks(file, name, target, back)
        except OSError as e:
            raise BadDelta(f"{self.path}: {e.strerror or e}", _HINT) from None
        if check:
            self.check_digest(name, tensor_digest(name, tensor), after=not back)
        return True

    def _apply_blocks(self, file: BinaryIO, name: str, target: codec.Bytes, back: bool) -> None:
        place, head = self._places[name], self.heads.get(name)
        end = place.start + place.nbytes
        file.seek(place.start + (_HEAD.size if head else 0))

        def parts() -> Iterator[tuple[Callable[..., None], *tuple[object, ...]]]:
            for start, count in spans(target.size, codec.PACKED_BYTES if head else BLOCK_BYTES):
                length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
                most = codec.max_packed_bytes(count) if head else xor.max_packed_bytes(count)
                if length > most or file.tell() + length > end:
                    raise BadDelta(f"{self.path}: tensor {name}: a block of {length:,} bytes", _HINT)
                if length:
                    yield _apply_block, file.read(length), target[start : start + count], head, back

        for _ in _in_threads(parts()):
            pass
        if file.tell() != end:
            raise BadDelta(f"{self.path}: tensor {name} has bytes after its last block", _HINT)

    def _apply_frame(self, file: BinaryIO, name: str, target: codec.Bytes) -> None:
        place, done = self._places[name], 0
        file.seek(place.start)
        start = file.read(min(place.nbytes, 18))  # zstd: a frame's header has 18 bytes at most
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        try:
            announced = zstandard.frame_content_size(start)
            if announced != target.size:
                raise BadDelta(
                    f"{self.path}: tensor {name} announces {announced:,} bytes; expected {target.size:,}",
                    _HINT,
                )
            with decompressor.stream_reader(start + file.read(place.nbytes - len(start))) as reader:
                while part := reader.read(BLOCK_BYTES):
                    if done + len(part) > target.size:
                        break
                    xor.xor_split_(target, xor.as_bytes(part), done)
                    done += len(part)
        except zstandard.ZstdError as e:
            raise BadDelta(f"{self.path}: tensor {name}: {e}", _HINT) from None
        if done != target.size:
            raise BadDelta(f"{self.path}: tensor {name} has {done:,} bytes; expected {target.size:,}", _HINT)


def _apply_block(packed: bytes, target: codec.Bytes, head: Head | None, back: bool) -> None:
    if head is None:
        xor.xor_split_(target, xor.unpack(packed, target.size))
    else:
        codec.apply_(packed, target, head.dtype, back=back)


@dataclass(frozen=True)
class Link:
    """One entry of a chain: a delta, and which way it is gone."""

    delta: StoredDelta
    before: str
    """Content id of the weights that it is applied to."""
    after: str
    """And of those that result; a revert has the delta's `result` before and its `base` after."""
    name: str = ""
    """For errors: whose delta it is."""

    @property
    def is_back(self) -> bool:
        """Whether it is gone from the delta's `result` to its `base`."""
        return self.before != self.delta.base

    def __str__(self) -> str:
        return self.name or str(self.delta.path)


def replayed(
    source: Iterable[Named], links: Sequence[Link] = (), *, source_id: str | None = None, check: bool = True
) -> Iterator[Named]:
    """The weights at the end of a chain of deltas, tensor by tensor, in the order of names.

    Args:
        source: the weights at its beginning, in the order of names; its tensors are changed in place, as
            `checkpoint.stream` gives them.
        links: what follows, oldest first.
        source_id: content id of the source, where it is known; without it the first link's `before` is.
        check: compute the content id at every link. Without it only names and sizes are checked, for callers that
            compute the id of what they get.

    Raises:
        BadDelta: a delta is not of these weights. What the files say is raised before the first tensor;
            what needs all bytes, after the last: until then, take them for unchecked.
    """
    version = source_id
    for link in links:
        if {link.before, link.after} != {link.delta.base, link.delta.result}:
            raise BadDelta(
                f"{link}: its delta leads from {link.delta.base} to {link.delta.result}; expected "
                f"{link.before} to {link.after}",
                "restore the home from a backup",
            )
        if version is not None and link.before != version:
            raise BadDelta(
                f"{link} starts from {link.before}; what is before it ends at {version}",
                "restore the home from a backup",
            )
        version = link.after
    return _replayed(source, links, source_id, check)


def _replayed(
    source: Iterable[Named], links: Sequence[Link], source_id: str | None, check: bool
) -> Iterator[Named]:
    wanted = [source_id or (links[0].before if links else None), *(link.after for link in links)]
    hashers = [ContentHasher(version) if check and version else None for version in wanted]
    unseen = {name: link for link in reversed(links) for name in link.delta.sizes}
    last = ""
    for name, tensor in source:
        if last and name <= last:
            raise BadDelta(f"tensor {name} came after {last}", "give the weights in the order of names")
        last = name
        unseen.pop(name, None)
        digest = _add(hashers[0], name, tensor, None)
        for link, hasher in zip(links, hashers[1:], strict=True):
            if digest and name in link.delta.sizes:
                link.delta.check_digest(name, digest, after=link.is_back)
            changed = link.delta.apply_(name, tensor, back=link.is_back, check=False)
            digest = _add(hasher, name, tensor, None if changed else digest)
        yield name, tensor
        del tensor  # whoever has taken it, has it: the next one needs the room
    for name, link in unseen.items():
        raise BadDelta(f"{link}: its tensor {name} does not fit these weights", "is it of another model?")
    for i, (version, hasher) in enumerate(zip(wanted, hashers, strict=True)):
        found = hasher.id() if hasher is not None else version
        if found != version:
            where = f"{links[i - 1]} ends at {found}" if i else f"the chain starts from {found}"
            raise BadDelta(f"{where}; expected {version}", "restore the home from a backup")


def _add(hasher: ContentHasher | None, name: str, tensor: torch.Tensor, known: bytes | None) -> bytes | None:
    """Count a tensor in; its digest, where the id has parts. `known`: the digest that it still has."""
    if hasher is None:
        return known
    if known and not hasher.is_flat:
        hasher.add_digest(name, known)
    else:
        hasher.add(name, tensor)
    return hasher.digests[name] or None
