"""Durable writes: write, fsync, rename, fsync the directory (any process).

Nothing is acknowledged before it is on the disk, and a reader sees the old content or the new one, never half.
Files and directories are owner-only: they hold what people said to their model. A full or read-only disk is a
`StorageError`; a half-written temporary file is removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from secondnature.errors import StorageError

__all__ = [
    "append_line",
    "clean",
    "make_dir",
    "read_lines",
    "storage_errors",
    "sync_dir",
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
    """The directory, made if needed, readable by its owner only, durable."""
    with storage_errors(path):
        if not path.is_dir():
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_dir(path.parent)
    return path


def temporary_name(path: Path) -> Path:
    """Where this process writes what shall become `path`; `clean` knows such names."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def writing(path: Path) -> Generator[BinaryIO]:
    """A new file, open for writing and reading, that takes the place of `path` as a whole at the end of the block.

    Durable when the block has ended. Where the block raises, the old content is still there and nothing else is.

    Raises:
        StorageError: the disk refused; the old content is still there.
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
            sync_dir(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file as a whole; durable when this returns.

    Raises:
        StorageError: the disk refused; the old content is still there.
    """
    with writing(path) as file:
        file.write(data)


def clean(directory: Path) -> int:
    """Remove the temporary files, links and folders in `directory` whose process no longer lives; how many.

    Only names that this module and the checkpoints give (`.NAME.PID.tmp`) are touched, nothing below them is looked
    at, and what cannot be removed stays.
    """
    num_removed = 0
    for path in list(directory.iterdir()) if directory.is_dir() else []:
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or _is_being_written(path, int(found[1])):
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


def write_text(path: Path, text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode())


def append_line(path: Path, line: str) -> None:
    """Append one line to a log; durable when this returns.

    A torn line from a crash (no newline at the end) is closed off first, so it spoils nothing but itself; if the
    disk refuses, what was written of this line is cut off again.

    Raises:
        StorageError: the disk refused; the file is as before.
    """
    with storage_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            size = os.fstat(fd).st_size
            torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            data = (b"\n" if torn else b"") + line.encode() + b"\n"
            try:
                written = 0
                while written < len(data):
                    written += os.write(fd, data[written:])
                os.fsync(fd)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)
        if size == 0:
            sync_dir(path.parent)


def read_lines(path: Path) -> list[str]:
    """The whole lines of a log that `append_line` wrote; empty where there is none."""
    with storage_errors(path):
        try:
            text = path.read_bytes().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return []
    return [line for line in text.split("\n") if line.strip()]
