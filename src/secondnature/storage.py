"""Durable writes: write, fsync, rename, fsync the directory; and what may be torn when it is read (any process).

Nothing is acknowledged before it is on the disk, and a reader sees the old content or the new one, never half.
Files and directories are owner-only: they hold what people said to their model. A full or read-only disk is a
`StorageError`, and nothing was changed; `NotDurable` says that it was changed, but may not outlive a power loss.
Files that are only appended hold one JSON value a line, and come in two kinds. In a durable one every line was
acknowledged: the last may be torn, a broken one before it is damage (`read_durable`). One that is appended without
fsync (metrics) acknowledges nothing, and after a power loss any of its lines may be garbled (`read_lines`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path
from typing import Any

from secondnature.errors import DamagedFile, NotDurable, StorageError

__all__ = [
    "Lines",
    "Skipped",
    "append_line",
    "append_lines",
    "check_room",
    "clean",
    "make_dir",
    "read_durable",
    "read_lines",
    "storage_errors",
    "sync_dir",
    "sync_name",
    "temporary_name",
    "write_bytes",
    "write_text",
    "writing",
]

_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
_BORN = time.time()
"""When this process began to write: what has its number and is older is another's, of the same number."""


@contextlib.contextmanager
def storage_errors(path: Path) -> Generator[None]:
    """Turns an OSError on `path` into a StorageError that says what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as e:
        raise StorageError(
            f"{path}: {e.strerror or e}; nothing was changed",
            "free some space or mend the permissions, then repeat",
        ) from e


def sync_dir(path: Path) -> None:
    """Make a rename or a new file inside `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dir(path: Path) -> Path:
    """The directory, made if needed with those above it, readable by its owner only, durable.

    Raises:
        StorageError: the disk refused; what was made is gone again.
    """
    with storage_errors(path):
        for missing in reversed([p for p in (path, *path.parents) if not p.is_dir()]):
            missing.mkdir(mode=0o700, exist_ok=True)
            try:
                sync_dir(missing.parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    missing.rmdir()
                raise
    return path


def temporary_name(path: Path) -> Path:
    """Where this process writes what shall become `path`; `clean` knows such names."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def writing(path: Path) -> Generator[BufferedRandom]:
    """A new file, open for writing and reading, that takes the place of `path` as a whole at the end of the block.

    Durable when the block has ended. Where the block raises, the old content is still there and nothing else is.

    Raises:
        StorageError: the disk refused; the old content is still there.
        NotDurable: the new content is there, but the directory could not be synced.
    """
    temporary = temporary_name(path)
    with storage_errors(path):
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(fd, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    sync_name(path)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file as a whole; durable when this returns.

    Raises:
        StorageError: the disk refused; the old content is still there.
        NotDurable: the new content is there, but the directory could not be synced.
    """
    with writing(path) as file:
        file.write(data)


def check_room(directory: Path, nbytes: int) -> None:
    """Is there room for so many bytes more? Raises StorageError: there is not, or the disk does not say."""
    with storage_errors(directory):
        free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise StorageError(
            f"{directory}: {nbytes / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free; nothing was written",
            "free some space, or choose another place",
        )


def clean(directory: Path, name: str | None = None) -> int:
    """Remove the temporary files, links and folders in `directory` whose process no longer lives; how many.

    Only names that this module and the checkpoints give (`.NAME.PID.tmp`) are touched, nothing below them is looked
    at, and what cannot be removed stays. `name`: only what was to become this; None: all.
    """
    num_removed = 0
    for path in list(directory.iterdir()) if directory.is_dir() else []:
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or _is_being_written(path, int(found[1])):
            continue
        if name is not None and path.name != f".{name}.{found[1]}.tmp":
            continue
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            num_removed += 1
    return num_removed


def _is_being_written(path: Path, pid: int) -> bool:
    try:
        if pid == os.getpid():
            return path.lstat().st_mtime >= _BORN - 1
        os.kill(pid, 0)
    except (ProcessLookupError, FileNotFoundError, OverflowError):
        return False
    except OSError:  # a process of somebody else
        return True
    return True


def sync_name(path: Path) -> None:
    """Make a name that was just given durable. Raises NotDurable."""
    try:
        sync_dir(path.parent)
    except Exception as e:  # whatever it is, memory say: the name is given, and the caller has to know it
        why = (e.strerror if isinstance(e, OSError) else None) or str(e) or type(e).__name__
        raise NotDurable(
            f"{path}: written, but {why} while its directory was synced: a power loss may take it back",
            "mend the disk, then look whether it is there before repeating",
        ) from e


def write_text(path: Path, text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode())


def append_line(path: Path, line: str) -> None:
    """Append one line of JSON to a durable log; on the disk when this returns.

    A line that a crash tore (see `read_durable`) was never acknowledged and is cut off first; if the disk refuses,
    what was written of this line is cut off again.

    Raises:
        StorageError: the disk refused; the log is as before.
        NotDurable: it refused the line and the cut too; some of the line may be there.
    """
    with storage_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            size = os.fstat(fd).st_size
            whole, start = _whole_lines(fd, size)
            try:
                if whole < size:
                    os.ftruncate(fd, whole)
                _write_all(fd, start + line.encode() + b"\n")
                os.fsync(fd)
                if whole == 0:
                    sync_dir(path.parent)
            except BaseException as e:
                _cut(fd, whole, path, e)
                raise
        finally:
            os.close(fd)


def _cut(fd: int, size: int, path: Path, because: BaseException) -> None:
    """Take back what was appended after `size`. Raises NotDurable."""
    try:
        os.ftruncate(fd, size)
    except OSError as e:
        raise NotDurable(
            f"{path}: {because}; and a line that was refused could not be cut off again ({e.strerror or e})",
            "mend the disk, then look at the end of the file before repeating",
        ) from because


def _write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def _whole_lines(fd: int, size: int) -> tuple[int, bytes]:
    """(bytes that stay, what has to come before the next line) of a log that may end with half a line."""
    if size == 0 or os.pread(fd, 1, size - 1) == b"\n":
        return size, b""
    begin, tail = size, b""
    while begin > 0 and b"\n" not in tail:
        step = min(begin, 65_536)
        begin -= step
        tail = os.pread(fd, step, begin) + tail
    last = tail[tail.rfind(b"\n") + 1 :]
    if not _parse(last)[1]:  # somebody's editor left the newline out
        return size, b"\n"
    return size - len(last), b""


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append lines of JSON to a durable log, all or none, over a power loss too; on the disk when this returns.

    One line is appended. Several are written with what was there before into a new file that takes the log's name:
    the rename is the one moment at which all of them are there. So the log stays plain lines, with no marks of
    batches that a person or an older version would have to know; the price is that an import writes the log once
    more.

    Raises:
        StorageError: the disk refused; the log is as before.
        NotDurable: all are there, but a power loss may take all back.
    """
    if len(lines) == 1:
        append_line(path, lines[0])
    elif lines:
        with storage_errors(path):
            before, start = _read_whole(path)
        write_bytes(path, before + start + b"".join(line.encode() + b"\n" for line in lines))


def _read_whole(path: Path) -> tuple[bytes, bytes]:
    """The whole lines of a log, and what has to come before the next."""
    try:
        with path.open("rb") as file:
            whole, start = _whole_lines(file.fileno(), os.fstat(file.fileno()).st_size)
            return file.read(whole), start
    except FileNotFoundError:
        return b"", b""


@dataclass(frozen=True)
class Skipped:
    """A line that holds no JSON."""

    number: int
    reason: str
    torn: bool
    """It is the end of the file, without a newline: a crash, or a power loss, while it was written."""


@dataclass(frozen=True)
class Lines:
    """What a file of one JSON value a line holds."""

    values: list[tuple[int, Any]] = field(default_factory=list[tuple[int, Any]])
    """(line number, value), in order; lines that are blank are left out."""
    skipped: list[Skipped] = field(default_factory=list[Skipped])


def read_lines(path: Path) -> Lines:
    """Every line that holds JSON, and, named, every one that does not; empty where there is no file.

    For a file that is appended without fsync, and for whoever says himself what could not be read.
    """
    with storage_errors(path):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return Lines()
    found = Lines()
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            value, wrong = _parse(line)
            if wrong:
                found.skipped.append(Skipped(number, wrong, torn=number == len(lines)))
            else:
                found.values.append((number, value))
    return found


def _parse(line: bytes) -> tuple[Any, str]:
    """(the value, what is wrong with the line); nothing wrong: empty."""
    try:
        return json.loads(line.decode()), ""
    except json.JSONDecodeError as e:
        return None, f"not JSON ({e.msg}, column {e.colno})"
    except UnicodeDecodeError as e:
        return None, f"not UTF-8 text (byte {e.start})"
    except RecursionError:
        return None, "nested too deeply"
    except ValueError:  # more digits than Python reads
        return None, "a number with too many digits"


def read_durable(path: Path) -> Lines:
    """A file whose lines were all promised: the last may be torn, and is left out and named.

    Raises:
        DamagedFile: any other line holds no JSON.
    """
    found = read_lines(path)
    for line in found.skipped:
        if not line.torn:
            raise DamagedFile(
                f"{path}, line {line.number}: {line.reason}; expected one JSON value a line",
                "restore the file from a backup, or mend that line",
            )
    return found
