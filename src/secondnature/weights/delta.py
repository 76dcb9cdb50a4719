"""Deltas: the lossless difference of the weights before and after a lesson (engine).

The XOR of the two bit patterns: applied once it is the lesson, applied again it is the undo, and no rounding can
come between. A file holds it per changed tensor, block by block (`codec`), and names the versions before and
after; its checksum stands in the lesson. Files are written and read in a stream: at most one tensor is in memory,
beside blocks, and a chain of deltas is applied tensor by tensor.

On disk a delta is a safetensors file of bytes. Format 2, per tensor: of each block of 4 MiB the number of packed
bytes (4 bytes, little-endian; 0: nothing changed), then these. Format 1, of the first homes, is read too: one
packed frame per tensor.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import zstandard
from safetensors import SafetensorError

from secondnature import storage
from secondnature.errors import BadDelta
from secondnature.weights import codec
from secondnature.weights.content import BLOCK_BYTES, ContentHasher, Named
from secondnature.weights.tensor_file import Place, header, read_places, spans

__all__ = ["Link", "StoredDelta", "Written", "open_", "replayed", "write"]

FORMAT = "secondnature-delta/2"
_FORMAT_1 = "secondnature-delta/1"
_HINT = "restore the lesson's directory from a backup"
_LENGTH_BYTES = 4
_MAX_WINDOW_BYTES = 1 << 23
"""Of zstd: four times what packing uses."""


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
    sizes: dict[str, str] = {}
    packer = codec.Packer()
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
            start = file.tell()
            if _write_blocks(file, packer, old.passing(name, tensor), new.passing(name, now)):
                places[name] = ("U8", (file.tell() - start,), file.tell() - start)
                sizes[f"bytes:{name}"] = str(now.nbytes)
            else:
                file.seek(start)
            del tensor  # before the next one is made
        missing = next(expected, None)
        if missing is not None:
            raise BadDelta(f"the weights before have no tensor {missing}", "are they of the same model?")
        base, result = old.id(), new.id()
        file.truncate()
        file.seek(0)
        metadata = {"format": FORMAT, "base": base, "result": result, **sizes}
        file.write(header(places, metadata, room))
        sha256 = _sha256(file)
    return Written(base, result, sha256)


def _write_blocks(
    file: BinaryIO, packer: codec.Packer, before: Iterator[codec.Bytes], after: Iterator[codec.Bytes]
) -> bool:
    """One tensor's blocks; whether any has changed."""
    changed = False
    for was, is_ in zip(before, after, strict=True):
        packed = packer.difference(was, is_)
        changed = changed or bool(packed)
        file.write(len(packed).to_bytes(_LENGTH_BYTES, "little") + packed)
    return changed


def _room(names: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes that the header can have at most: as if everything had changed, and nothing could be packed."""
    worst: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name in names:
        nbytes = sum(
            _LENGTH_BYTES + codec.max_packed_bytes(count) for _, count in spans(tensors[name].nbytes)
        )
        worst[name] = ("U8", (nbytes,), nbytes)
    sizes = {f"bytes:{name}": str(tensors[name].nbytes) for name in names}
    return len(header(worst, {"format": FORMAT, "base": "x" * 32, "result": "x" * 32, **sizes}))


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
    except OSError as e:
        raise BadDelta(f"{path}: {e.strerror or e}", _HINT) from None
    except (SafetensorError, ValueError) as e:
        raise BadDelta(f"{path}: {e}", _HINT) from None
    if metadata.get("format") not in (FORMAT, _FORMAT_1):
        raise BadDelta(
            f"{path}: format {metadata.get('format')}; expected {FORMAT}",
            "upgrade secondnature, or restore the lesson's directory from a backup",
        )
    sizes: dict[str, int] = {}
    for name, place in places.items():
        size = metadata.get(f"bytes:{name}", "0")
        if place.dtype != "U8" or not size.isascii() or not size.isdigit():
            raise BadDelta(f"{path}: tensor {name} is {place.dtype} of {size!r} bytes; expected U8", _HINT)
        if int(size):
            sizes[name] = int(size)
    if "base" not in metadata or "result" not in metadata:
        raise BadDelta(f"{path}: does not say what it is the difference of", _HINT)
    return StoredDelta(
        path, metadata["format"], metadata["base"], metadata["result"], sizes, places, identity
    )


def _identity(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class StoredDelta:
    """A delta on disk, checked and not yet read: `base` XOR `result`."""

    path: Path
    format: str
    base: str
    """Content id of the weights before."""
    result: str
    """Content id of those after."""
    sizes: Mapping[str, int]
    """Of each changed tensor: its bytes."""
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
        if tensor.nbytes != self.sizes[name]:
            raise BadDelta(
                f"the delta's tensor {name} does not fit these weights: {self.sizes[name]:,} bytes; expected "
                f"{tensor.nbytes:,}",
                "is it of another model?",
            )

    @torch.no_grad()
    def apply_(self, name: str, tensor: torch.Tensor) -> bool:
        """XOR into this tensor (contiguous, in host memory), in place; whether the delta changes it.

        Once it is the lesson, twice it is the undo. Of a file without a checksum, damage may be met after some
        blocks were done: use it on a copy, as `replayed` does.

        Raises:
            BadDelta: the tensor is of another size (nothing was written), or the file was damaged or changed since.
        """
        if name not in self.sizes:
            return False
        self._check(name, tensor)
        target = tensor.detach().view(-1).view(torch.uint8).numpy()
        try:
            with self.path.open("rb") as file:
                if _identity(file) != self._identity:
                    raise BadDelta(f"{self.path}: was changed since it was checked", _HINT)
                if self.format == FORMAT:
                    self._apply_blocks(file, name, target)
                else:
                    self._apply_frame(file, name, target)
        except OSError as e:
            raise BadDelta(f"{self.path}: {e.strerror or e}", _HINT) from None
        return True

    def _apply_blocks(self, file: BinaryIO, name: str, target: codec.Bytes) -> None:
        place = self._places[name]
        end = place.start + place.nbytes
        file.seek(place.start)
        for start, count in spans(target.size):
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > codec.max_packed_bytes(count) or file.tell() + length > end:
                raise BadDelta(f"{self.path}: tensor {name}: a block of {length:,} bytes", _HINT)
            if length:
                split = codec.unpack(file.read(length), count)
                codec.xor_split_(target[start : start + count], split)
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
                    codec.xor_split_(target, codec.as_bytes(part), done)
                    done += len(part)
        except zstandard.ZstdError as e:
            raise BadDelta(f"{self.path}: tensor {name}: {e}", _HINT) from None
        if done != target.size:
            raise BadDelta(f"{self.path}: tensor {name} has {done:,} bytes; expected {target.size:,}", _HINT)


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
            digest = _add(hasher, name, tensor, None if link.delta.apply_(name, tensor) else digest)
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
