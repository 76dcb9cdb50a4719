"""What crashes leave behind, and who may take it away (server, while it holds the home's lock).

Half-written files and directories `.NAME.PID.tmp` in the home, announcements of servers that are gone, private
directories of sockets in the temporary directory, and logs that only grow. Taken away is what carries our name and
belongs to a process that is dead, or to this one before it began; everything else is somebody's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["MAX_LOG_BYTES", "clean_home", "clean_private_directories", "private_directory", "rotate"]

MAX_LOG_BYTES = 5_000_000
"""A log that is longer when it is opened becomes `NAME.1`, and the one before it goes."""
PREFIX = "secondnature-"
_TEMPORARY = re.compile(r"\..+\.(\d{1,10})\.tmp")


def clean_home(home: Path) -> list[Path]:
    """Remove what dead writers left in a home; what was removed. Call it with the lock held, before writing."""
    removed: list[Path] = []
    for directory in _directories_written_into(home):
        for path in directory.iterdir():
            found = _TEMPORARY.fullmatch(path.name)
            if found and not _is_somebody_else(int(found[1])):
                _remove(path)
                removed.append(path)
    announcement = home / "server.json"
    if announcement.exists():  # whoever wrote it does not hold the lock
        announcement.unlink()
        removed.append(announcement)
    for log in home.glob("*.log"):
        rotate(log)
    return removed


def _directories_written_into(home: Path) -> Iterator[Path]:
    yield home
    for parent in (home / "lessons", home / "model"):
        if parent.is_dir():
            yield parent
    if (home / "lessons").is_dir():
        yield from (p for p in (home / "lessons").iterdir() if p.is_dir() and not p.is_symlink())


def _is_somebody_else(pid: int) -> bool:
    """Whether another process of that number lives: it may be a trainer that is just ending."""
    return pid != os.getpid() and _lives(pid)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def rotate(log: Path, max_bytes: int = MAX_LOG_BYTES) -> None:
    """Set a log that has grown too long aside, as `NAME.1`. Call it before the log is opened."""
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > max_bytes:
            log.replace(log.with_name(f"{log.name}.1"))


def private_directory() -> Path:
    """A fresh owner-only directory for sockets, marked as this process's; remove it when it is done with."""
    directory = Path(tempfile.mkdtemp(prefix=PREFIX))
    (directory / "pid").write_text(f"{os.getpid()} {_started(os.getpid())}\n", encoding="ascii")
    return directory


def _started(pid: int) -> str:
    """When a process was started, in the kernel's ticks: numbers come again, a number and its start do not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]


def clean_private_directories() -> list[Path]:
    """Remove the private directories whose process is dead; what was removed.

    Only this user's own directories that carry the mark of `private_directory` are touched.
    """
    removed: list[Path] = []
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            status = directory.lstat()
            pid, _, started = (directory / "pid").read_text(encoding="ascii").strip().partition(" ")
            number = int(pid)
        except (OSError, ValueError):  # not ours, gone meanwhile, or not marked yet
            continue
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and number > 0
        if ours and not (_lives(number) and started in ("", _started(number))):
            shutil.rmtree(directory, ignore_errors=True)
            removed.append(directory)
    return removed
