"""Files of any packing as rows, one at a time: found by content, never by the file's name (client).

JSONL, JSON arrays, `{"data": [...]}`, one object, gzip, zip, CSV and TSV, Parquet, Markdown; UTF-8 with or
without a byte order mark, UTF-16. Nothing is read whole but a single JSON value: a file of any length costs the
memory of a row.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib
import io
import json
import sys
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from secondnature.errors import BadRecord, TooLarge
from secondnature.importers.rows import Place, Row
from secondnature.records import FieldTwice, each_field_once

__all__ = ["Part", "find_parts"]

MAX_VALUE_BYTES = 256_000_000
"""One JSON value (a whole export in one object) that is longer is refused."""
CHUNK = 1 << 20
PEEK = 1 << 16
ZIP = b"PK\x03\x04"
MAX_PACKINGS = 4
"""Archives in archives, or gzip in gzip: there are files that unpack to themselves."""
LISTS = ("data", "rows", "items", "examples", "results", "samples", "feedbacks", "conversations")
"""Where an object that is only a wrapping keeps its rows."""
NOT_DATA = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".pdf", ".html", ".wav", ".mp3", ".dat", ".ds_store")


@dataclass
class Meter:
    """How far a part has been read."""

    total: int
    """Bytes, as they lie on the disk or in the archive; of Parquet: rows of them."""
    done: int = 0


class _Metered(io.RawIOBase):
    """A file that counts what is read of it."""

    def __init__(self, inner: IO[bytes], meter: Meter) -> None:
        super().__init__()
        self._inner, self._meter = inner, meter
        meter.done = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As of any raw file."""
        data = self._inner.read(len(buffer))
        buffer[: len(data)] = data
        self._meter.done += len(data)
        return len(data)

    def close(self) -> None:
        """The file below too."""
        self._inner.close()
        super().close()


@dataclass(frozen=True)
class Part:
    """One file, or one file inside an archive; `rows` reads it from the beginning."""

    name: str
    container: str
    """`JSONL`, `a JSON array`, `CSV`, ..."""
    rows: Callable[[], Iterator[Row]]
    meter: Meter


def find_parts(path: Path) -> list[Part]:
    """What a path holds: a file, what is in an archive, or every file of a folder.

    Raises:
        BadRecord: missing, unreadable, empty, or of no kind that is known.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".DS"))
        wanted = [
            p for p in files if p.suffix.lower() in (".jsonl", ".json", ".gz", ".zip", ".csv", ".parquet")
        ]
        if not wanted:
            raise BadRecord(f"{path}: no JSON, CSV, Parquet or archive in this folder", "name the files")
        return [part for p in wanted for part in find_parts(p)]
    try:
        with path.open("rb") as file:
            head = file.read(PEEK)
        meter = Meter(path.stat().st_size)
    except OSError as e:
        raise BadRecord(f"{path}: {e.strerror or e}", "check the path") from None
    if head[:4] == ZIP:
        return _members(str(path), lambda: path.open("rb"), 1)
    return [_part(str(path), lambda: path.open("rb"), head, meter)]


def _members(path: str, open_raw: Callable[[], IO[bytes]], depth: int) -> list[Part]:
    """The files of an archive, and of archives in it."""
    parts: list[Part] = []
    if depth > MAX_PACKINGS:
        raise BadRecord(f"{path}: archives in archives, more than {MAX_PACKINGS}", "unpack it first")
    try:
        with open_raw() as raw, zipfile.ZipFile(raw) as archive:
            for info in archive.infolist():
                name = info.filename
                hidden = name.startswith("__MACOSX") or name.rsplit("/", 1)[-1].startswith(".")
                if info.is_dir() or hidden or name.lower().endswith(NOT_DATA) or not info.file_size:
                    continue
                with archive.open(info) as file:
                    head = file.read(PEEK)
                opener = _member_opener(open_raw, name)
                try:
                    if head[:4] == ZIP:
                        parts += _members(f"{path}:{name}", opener, depth + 1)
                    else:
                        parts.append(_part(f"{path}:{name}", opener, head, Meter(info.file_size)))
                except BadRecord:
                    continue  # an export has files beside its data
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, zlib.error) as e:
        raise BadRecord(f"{path}: a zip archive that cannot be read ({e})", "is it whole?") from None
    if not parts:
        raise BadRecord(f"{path}: no JSON, CSV or Parquet in this archive", "is it the right file?")
    return parts


def _member_opener(open_raw: Callable[[], IO[bytes]], name: str) -> Callable[[], IO[bytes]]:
    def open_member() -> IO[bytes]:
        raw = open_raw()
        try:
            return _Member(raw, zipfile.ZipFile(raw).open(name))
        except BaseException:
            raw.close()
            raise

    return open_member


class _Member(io.BufferedReader):
    """A file of an archive; what is closed with it is the archive's own file."""

    def __init__(self, outer: IO[bytes], inner: IO[bytes]) -> None:
        super().__init__(cast("Any", inner))
        self._outer = outer

    def close(self) -> None:
        """The archive's file too."""
        super().close()
        self._outer.close()


def _part(name: str, open_raw: Callable[[], IO[bytes]], head: bytes, meter: Meter, depth: int = 1) -> Part:
    if depth > MAX_PACKINGS:
        raise BadRecord(f"{name}: gzip in gzip, more than {MAX_PACKINGS} times", "unpack it first")
    if head[:4] == ZIP or head[257:262] == b"ustar":
        kind = "zip" if head[:4] == ZIP else "tar"
        raise BadRecord(f"{name}: a {kind} archive in another packing", "unpack it, and give the folder")
    if head[:2] == b"\x1f\x8b":

        def open_gzip() -> IO[bytes]:
            return cast("IO[bytes]", gzip.GzipFile(fileobj=io.BufferedReader(_Metered(open_raw(), meter))))

        with _reading(name), open_gzip() as file:
            unpacked = _part(name, open_gzip, file.read(PEEK), Meter(0), depth + 1)
        return Part(name, unpacked.container, unpacked.rows, meter)
    if head[:4] == b"PAR1":
        return Part(name, "Parquet", lambda: _parquet(name, open_raw, meter), meter)
    encoding = _encoding(head)
    text = codecs.getincrementaldecoder(encoding)(errors="replace").decode(head).lstrip("\ufeff")
    start = text.lstrip()
    if not start:
        raise BadRecord(f"{name}: the file is empty", "is it the right file?")
    if "\x00" in text:
        raise BadRecord(f"{name}: a binary file of no kind that is read here", "see docs/importing.md")

    @contextmanager
    def lines(newline: str | None = None) -> Generator[io.TextIOWrapper]:
        with _reading(name), io.BufferedReader(_Metered(open_raw(), meter), CHUNK) as raw:
            yield io.TextIOWrapper(raw, encoding=encoding, errors="surrogateescape", newline=newline)

    if start[0] == "[":
        return Part(name, "a JSON array", lambda: _values(name, lines, array=True), meter)
    if start[0] == "{":
        first, newline, rest = start.partition("\n")
        second = rest.lstrip().partition("\n")[0]
        if _is_json(first) or (newline and _is_json(second)):  # one broken line is that line's fault
            return Part(name, "JSONL", lambda: _jsonl(name, lines), meter)
        return Part(name, "a JSON object", lambda: _values(name, lines, array=False), meter)
    if "aider chat started" in text[:2000]:
        return Part(name, "Markdown", lambda: _whole(name, lines), meter)
    delimiter = _delimiter(start)
    if delimiter:
        kind = "TSV" if delimiter == "\t" else "CSV"
        return Part(name, kind, lambda: _table(name, lines, delimiter), meter)
    raise BadRecord(
        f"{name}: no JSON, JSONL, CSV, TSV, Parquet or aider's history (it begins with {start[:30]!r})",
        "see docs/importing.md; YAML and the like: convert to JSON",
    )


@contextmanager
def _reading(name: str) -> Generator[None]:
    """Raises BadRecord: what the disk or an archive refuses."""
    try:
        yield
    except UnicodeError as e:  # of UTF-16, in which one lost byte spoils all that follow
        raise BadRecord(f"{name}: not text of its encoding ({e})", "save it as UTF-8") from None
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, NotImplementedError) as e:
        raise BadRecord(f"{name}: {e}", "is the file whole?") from None


def _encoding(head: bytes) -> str:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if len(head) >= 4 and head[0] and not head[1] and head[2] and not head[3]:
        return "utf-16-le"
    return "utf-8-sig"


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


Lines = Callable[..., Any]
"""Opens the text of a part."""


def parse(text: str) -> Any:
    """One JSON value. Raises ValueError, with what is wrong."""
    try:
        return json.loads(text, parse_constant=_not_finite, object_pairs_hook=each_field_once)
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON ({e.msg}, column {e.colno})") from None
    except FieldTwice:
        raise
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        raise ValueError(f"a whole number of more than {sys.get_int_max_str_digits():,} digits") from None


def _not_finite(_: str) -> None:
    return None


def _garbled(text: str) -> bool:
    """Whether bytes were no text of this encoding."""
    if text.isascii():
        return False
    return any("\udc80" <= c <= "\udcff" for c in text)


NOT_TEXT = "not UTF-8 text (save it as UTF-8)"


def _jsonl(name: str, lines: Lines) -> Iterator[Row]:
    with lines() as file:
        number = 0
        while line := file.readline(MAX_VALUE_BYTES):
            number += 1
            if not line.strip():
                continue
            place = Place(name, number)
            if _garbled(line):
                yield Row(place, problem=NOT_TEXT)
                continue
            try:
                value = parse(line)
            except ValueError as e:
                yield Row(place, problem=str(e))
                continue
            yield from _unwrapped(place, value) if number == 1 else (Row(place, value),)


def _unwrapped(place: Place, value: Any) -> Iterator[Row]:
    """The rows of a wrapping: `{"data": [...]}`, `{"rows": [{"row": ...}]}`; else the value itself."""
    found = inner_list(value)
    if found is None:
        yield Row(place, value)
        return
    for i, one in enumerate(found, start=1):
        row = cast("dict[str, Any]", one).get("row", one) if isinstance(one, dict) else one
        yield Row(Place(place.source, i, "row"), row)


def inner_list(value: Any) -> list[Any] | None:
    """The list of objects of an object that is only a wrapping."""
    if not isinstance(value, dict):
        return None
    outer = cast("dict[str, Any]", value)
    for key in LISTS:
        inner = outer.get(key)
        if isinstance(inner, dict) and key == "results":  # promptfoo: beside the results lie its prompts
            return inner_list({key: cast("dict[str, Any]", inner).get(key)})
        if isinstance(inner, list):
            items = cast("list[Any]", inner)
            others = any(isinstance(v, list) for k, v in outer.items() if k not in (key, "features"))
            turns = any(isinstance(i, dict) and ("from" in i or "role" in i) for i in items)
            if items and all(isinstance(i, dict) for i in items) and not turns and not others:
                return items
    return None


def _values(name: str, lines: Lines, *, array: bool) -> Iterator[Row]:
    """Values one after another, in an array or not, each decoded as soon as it is whole."""
    decoder = json.JSONDecoder(parse_constant=_not_finite, object_pairs_hook=each_field_once)
    with lines() as file:
        text, at, number, ended, wanted = "", 0, 1, False, CHUNK
        inside = not array
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                number += text[at] == "\n"
                at += 1
            if at < len(text) and not inside and text[at] == "[":
                inside, at = True, at + 1
                continue
            if at < len(text) and text[at] == "]" and array:
                return
            if at >= len(text) and ended:
                if array:
                    yield Row(Place(name, number), problem="the array does not end: is the file whole?")
                return
            place = Place(name, number)
            try:
                value, end = decoder.raw_decode(text, at)
            except RecursionError:
                yield Row(place, problem="nested too deeply")
                return
            except ValueError as e:
                twice = _after_twice(text, at) if isinstance(e, FieldTwice) else None
                if twice is not None:
                    yield Row(place, problem=str(e))
                    number += text.count("\n", at, twice)
                    at, wanted = twice, CHUNK
                    continue
                if ended:
                    what = e.msg if isinstance(e, json.JSONDecodeError) else "a number of too many digits"
                    yield Row(place, problem=f"not JSON ({what})")
                    return
                if len(text) - at > MAX_VALUE_BYTES:
                    raise TooLarge(
                        f"{place}: one value of over {MAX_VALUE_BYTES:,} characters", "split the file"
                    ) from None
                more = file.read(wanted)
                text, at, ended = text[at:] + more, 0, len(more) < wanted
                wanted = CHUNK if not ended else wanted
                wanted = max(CHUNK, len(text))  # a long value is tried again only when it has doubled
                continue
            piece = text[at:end]
            if _garbled(piece):
                yield Row(place, problem=NOT_TEXT)
            elif array:
                yield Row(place, value)
            else:
                yield from _unwrapped(place, value)
            number += piece.count("\n")
            at, wanted = end, CHUNK


def _after_twice(text: str, at: int) -> int | None:
    """Where a value ends in which a field stands twice; None: it does not end yet."""
    try:
        return json.JSONDecoder().raw_decode(text, at)[1]
    except (ValueError, RecursionError):
        return None


def _whole(name: str, lines: Lines) -> Iterator[Row]:
    with lines() as file:
        text = file.read(MAX_VALUE_BYTES)
    yield Row(Place(name, 1), problem=NOT_TEXT) if _garbled(text) else Row(Place(name, 1), text)


def _delimiter(start: str) -> str:
    """What separates the columns of the first line; nothing: it is no table."""
    first = start.partition("\n")[0]
    counts = {d: first.count(d) for d in "\t;,"}
    best = max(counts, key=lambda d: counts[d])
    names = [n.strip().strip('"') for n in first.split(best)]
    plain = all(n and len(n) <= 60 and "\x00" not in n for n in names) and len(set(names)) == len(names)
    return best if counts[best] and plain else ""


def _table(name: str, lines: Lines, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_VALUE_BYTES)
    with lines("") as file:
        reader = csv.reader(file, delimiter=delimiter)
        header: list[str] = []
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as e:
                yield Row(Place(name, number), problem=f"not {delimiter!r}-separated values ({e})")
                return
            if not header:
                header = [c.strip() for c in cells]
            elif any(c.strip() for c in cells):
                place = Place(name, number)
                if _garbled("".join(cells)):
                    yield Row(place, problem=NOT_TEXT)
                elif len(cells) > len(header):
                    yield Row(
                        place, problem=f"{len(cells)} cells; the first line names {len(header)} columns"
                    )
                else:
                    yield Row(
                        place, dict(zip(header, [*cells, *[""] * (len(header) - len(cells))], strict=True))
                    )


def _parquet(name: str, open_raw: Callable[[], IO[bytes]], meter: Meter) -> Iterator[Row]:
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise BadRecord(
            f"{name}: a Parquet file, and pyarrow is not installed", "pip install 'secondnature[import]'"
        ) from None
    number = 0
    with _reading(name), open_raw() as raw:
        try:
            file = parquet.ParquetFile(raw)
            for batch in file.iter_batches(batch_size=1000):
                meter.done = int(meter.total * number / max(1, file.metadata.num_rows))
                for value in batch.to_pylist():
                    number += 1
                    yield Row(Place(name, number, "row"), value)
        except (arrow.ArrowException, ValueError) as e:
            raise BadRecord(f"{name}: a Parquet file that cannot be read ({e})", "is it whole?") from None
