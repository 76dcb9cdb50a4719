"""One lesson as one file, for another server of the same base: written, and read with suspicion (server).

A lesson file is a safetensors file of bytes: each part (manifest, corrections, probes, evidence, delta, ...) is a
tensor of bytes under its name. So there are no paths, links, permissions or archives in it, and what may be in it
is a list. Every byte is accounted for: the header is the one that this code would write for what it says, it names
the checksum of the manifest, and the manifest those of the parts. Sizes are compared with the file and with the
model before anything is read, and what is packed is unpacked to sizes that the model decides (`weights.delta`).
Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import ValidationError

from secondnature import storage
from secondnature.errors import BadInput, SecondnatureError, TooLarge, TooNew
from secondnature.records import (
    LESSON_FILE_VERSION,
    Correction,
    Evidence,
    Imported,
    LessonManifest,
    LessonPart,
    PartName,
    Probe,
    describe,
    parse_json,
    parse_jsonl,
)
from secondnature.records.migrations import migrate
from secondnature.weights.tensor_file import header

__all__ = ["MAX_TEXT_BYTES", "LessonFile", "open_", "write"]

FORMAT = f"secondnature-lesson/{LESSON_FILE_VERSION}"
MAX_HEADER_BYTES = 1 << 16
MAX_TEXT_BYTES = 16_000_000
"""Of each part that is text: as much as one request may bring."""
PARTS: tuple[PartName, ...] = get_args(PartName)
MANIFEST: PartName = "manifest.json"
_BLOCK_BYTES = 1 << 22
_HINT = "get the file again from whoever exported it"


def write(path: Path, manifest: LessonManifest, parts: Mapping[PartName, Path | bytes]) -> None:
    """Write a lesson file whose manifest gets sizes and checksums of the parts.

    Raises:
        TooLarge: a part that is text is longer than is read.
        StorageError: the disk refused; there is no file.
    """
    with storage.storage_errors(path):
        about: dict[PartName, LessonPart] = {name: _measured(parts[name]) for name in PARTS if name in parts}
        for name, part in about.items():
            if not name.endswith(".safetensors") and part.nbytes > MAX_TEXT_BYTES:
                raise TooLarge(
                    f"{name} of the lesson has {part.nbytes:,} bytes; a lesson file takes {MAX_TEXT_BYTES:,}",
                    "export the adapter (--as lora), or the checkpoint",
                )
        text = manifest.model_copy(update={"parts": about}).to_disk().encode()
        sizes: dict[PartName, int] = {MANIFEST: len(text), **{n: part.nbytes for n, part in about.items()}}
        with storage.writing(path) as file:
            file.write(_header(sizes, hashlib.sha256(text).hexdigest()))
            file.write(text)
            for name in about:
                given = parts[name]
                if isinstance(given, bytes):
                    file.write(given)
                    continue
                with given.open("rb") as part:
                    while block := part.read(_BLOCK_BYTES):
                        file.write(block)


def _measured(part: Path | bytes) -> LessonPart:
    if isinstance(part, bytes):
        return LessonPart(nbytes=len(part), sha256=hashlib.sha256(part).hexdigest())
    with part.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return LessonPart(nbytes=file.tell(), sha256=sha256)


def _header(sizes: Mapping[PartName, int], manifest_sha256: str) -> bytes:
    places = {str(name): ("U8", (size,), size) for name, size in sizes.items()}
    return header(places, {"format": FORMAT, "manifest": manifest_sha256})


@dataclass(frozen=True)
class LessonFile:
    """A lesson file whose header and manifest were checked; the parts are checked when they are read."""

    path: Path
    manifest: LessonManifest
    sha256: str
    """Of the manifest, and so of everything in the file."""
    _starts: Mapping[PartName, int]

    def origin(self) -> Imported:
        """What the entry of the log says of where it is from."""
        lesson = self.manifest.lesson
        return Imported(
            lesson=lesson.id,
            model_name=self.manifest.model_name,
            sha256=self.sha256,
            parent=str(lesson.parent),
            version=str(lesson.version),
            delta_sha256=self.manifest.parts["delta.safetensors"].sha256,
            exported_at=self.manifest.exported_at,
        )

    def has(self, name: PartName) -> bool:
        """Is the part there?"""
        return name in self._starts

    def corrections(self) -> list[Correction]:
        """What was taught; empty where it was given as tokens. Raises BadInput, BadRecord."""
        return self._records("corrections.jsonl", Correction)

    def probes(self) -> list[Probe]:
        """What it was judged by. Raises BadInput, BadRecord."""
        return self._records("probes.jsonl", Probe)

    def evidence(self) -> Evidence | None:
        """Its certificate, where it was judged. Raises BadInput, BadRecord."""
        if not self.has("evidence.json"):
            return None
        raw = parse_json(self._bytes("evidence.json"), where=f"{self.path}: evidence.json")
        try:
            return Evidence.from_disk(raw)
        except ValidationError as e:
            raise BadInput(f"{self.path}: evidence.json: {describe(e)}", _HINT) from None

    def _records(self, name: PartName, kind: Any) -> list[Any]:
        if not self.has(name):
            return []
        return parse_jsonl(self._bytes(name), kind, source=f"{self.path}: {name}", own=True)

    def _bytes(self, name: PartName) -> bytes:
        """A part that is text. Its size was checked."""
        return b"".join(self._blocks(name))

    def check(self) -> None:
        """Read every part against its checksum. Raises BadInput: one is not as it was written."""
        for name in self._starts:
            if name != MANIFEST:
                for _ in self._blocks(name):
                    pass

    def copy(self, name: PartName, target: Path) -> None:
        """A part as a file of its own, checked on its way; there as a whole or not at all.

        Raises:
            BadInput: it is not as it was written, or has changed since.
            StorageError: the disk refused.
        """
        with storage.writing(target) as file:
            for block in self._blocks(name):
                file.write(block)

    def _blocks(self, name: PartName) -> Any:
        part, hasher = self.manifest.parts[name], hashlib.sha256()
        left = part.nbytes
        try:
            with self.path.open("rb") as file:
                file.seek(self._starts[name])
                while left:
                    block = file.read(min(left, _BLOCK_BYTES))
                    if not block:
                        raise _bad(self.path, f"{name} ends {left:,} bytes early")
                    left -= len(block)
                    hasher.update(block)
                    yield block
        except OSError as e:
            if isinstance(e, SecondnatureError):
                raise
            raise BadInput(f"{self.path}: {e.strerror or e}", _HINT) from None
        if hasher.hexdigest() != part.sha256:
            raise _bad(
                self.path, f"{name} has checksum {hasher.hexdigest()[:12]}; expected {part.sha256[:12]}"
            )


def _bad(path: Path, found: str) -> BadInput:
    return BadInput(f"{path}: {found}; nothing was written", _HINT)


def open_(path: Path) -> LessonFile:
    """A lesson file, its header and manifest read and checked; of the parts only the sizes.

    Raises:
        BadInput: it is none, or not whole, or not as it was written.
        TooNew: a newer version wrote it.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _bad(path, "not a file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if status.st_size < 8 or length > min(MAX_HEADER_BYTES, status.st_size - 8):
                raise _bad(
                    path, f"not a lesson file: a header of {length:,} bytes in a file of {status.st_size:,}"
                )
            head = file.read(length)
            sizes, sha256 = _read_header(path, head)
            starts: dict[PartName, int] = {}
            end = 8 + length
            for name, size in sizes.items():
                starts[name] = end
                end += size
            if end != status.st_size:
                raise _bad(path, f"{status.st_size:,} bytes; expected {end:,}")
            if sizes[MANIFEST] > MAX_TEXT_BYTES:
                raise _bad(path, f"a manifest of {sizes[MANIFEST]:,} bytes")
            text = file.read(sizes[MANIFEST])
    except OSError as e:
        if isinstance(e, SecondnatureError):
            raise
        raise BadInput(f"{path}: {e.strerror or e}", "check the path") from None
    if hashlib.sha256(text).hexdigest() != sha256:
        raise _bad(path, "the manifest is not as it was written")
    manifest = _read_manifest(path, text)
    if {name: part.nbytes for name, part in manifest.parts.items()} != {
        name: size for name, size in sizes.items() if name != MANIFEST
    }:
        raise _bad(path, "the manifest names other parts than the file has, or of other sizes")
    if "delta.safetensors" not in manifest.parts:
        raise _bad(path, "there is no delta in it")
    for name, part in manifest.parts.items():
        if not name.endswith(".safetensors") and part.nbytes > MAX_TEXT_BYTES:
            raise _bad(path, f"{name} has {part.nbytes:,} bytes; at most {MAX_TEXT_BYTES:,} are read")
    return LessonFile(path, manifest, sha256, starts)


def _read_header(path: Path, head: bytes) -> tuple[dict[PartName, int], str]:
    """(bytes of each part, in order; the checksum of the manifest)."""
    raw = parse_json(head, where=f"{path}: header", mend=_HINT)
    metadata = cast("dict[str, Any]", raw).get("__metadata__") if isinstance(raw, dict) else None
    found = cast("dict[str, Any]", metadata).get("format") if isinstance(metadata, dict) else None
    version = re.fullmatch(r"secondnature-lesson/(\d{1,9})", found) if isinstance(found, str) else None
    if version is None:
        raise _bad(path, "not a lesson file")
    if int(version[1]) != LESSON_FILE_VERSION:
        raise TooNew(
            f"{path}: a lesson file of version {version[1]}; known up to {LESSON_FILE_VERSION}",
            "upgrade",
        )
    sha256 = cast("dict[str, Any]", metadata).get("manifest")
    sizes: dict[PartName, int] = {}
    for name, entry in cast("dict[str, Any]", raw).items():
        if name == "__metadata__":
            continue
        shape = cast("dict[str, Any]", entry).get("shape") if isinstance(entry, dict) else None
        if name not in PARTS or not isinstance(shape, list) or len(cast("list[Any]", shape)) != 1:
            raise _bad(path, f"a part {name[:40]!r}, which no lesson file has")
        size = cast("list[Any]", shape)[0]
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**62:
            raise _bad(path, f"part {name} has no size")
        sizes[name] = size
    if list(sizes) != [name for name in PARTS if name in sizes] or MANIFEST not in sizes:
        raise _bad(path, "its parts are not those of a lesson file")
    if not isinstance(sha256, str) or _header(sizes, sha256)[8:] != head:
        raise _bad(path, "the header is not as it was written")
    return sizes, sha256


def _read_manifest(path: Path, text: bytes) -> LessonManifest:
    raw = parse_json(text, where=f"{path}: manifest", mend=_HINT)
    if not isinstance(raw, dict):
        raise _bad(path, "the manifest is no object")
    given = cast("dict[str, Any]", raw)
    if given.get("schema_version") != LESSON_FILE_VERSION:
        raise TooNew(f"{path}: manifest of version {str(given.get('schema_version'))[:20]}", "upgrade")
    try:
        lesson = migrate("lesson", given.get("lesson"), f"{path}: lesson")
        return LessonManifest.from_disk({**given, "lesson": lesson})
    except ValidationError as e:
        raise BadInput(f"{path}: manifest: {describe(e)}", _HINT) from None
