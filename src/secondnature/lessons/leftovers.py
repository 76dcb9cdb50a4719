"""What crashes leave behind, and who may take it away (server, while it holds the home's lock).

Half-written files and directories `.NAME.PID.tmp` in the home, announcements of servers that are gone, private
directories of sockets in the temporary directory, and logs that only grow. Taken away is what carries our name and
belongs to a process that is dead; everything else is somebody's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from secondnature import storage

__all__ = ["MAX_LOG_BYTES", "clean_home", "clean_private_directories", "rotate"]

MAX_LOG_BYTES = 5_000_000
"""A log that is longer when it is opened becomes `NAME.1`, and the one before it goes."""


def clean_home(home: Path) -> int:
    """Remove what dead writers left in a home; how many. Call it with the lock held, before anything is written."""
    lessons = home / "lessons"
    entries = [p for p in lessons.iterdir() if p.is_dir() and not p.is_symlink()] if lessons.is_dir() else []
    removed = sum(map(storage.clean, [home, home / "model", lessons, *entries]))
    announcement = home / "server.json"
    if announcement.exists():  # whoever wrote it does not hold the lock
        announcement.unlink()
        removed += 1
    for log in home.glob("*.log"):
        rotate(log)
    return removed


def rotate(log: Path, max_bytes: int = MAX_LOG_BYTES) -> None:
    """Set a log that has grown too long aside, as `NAME.1`. Call it before the log is opened."""
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > max_bytes:
            log.replace(log.with_name(f"{log.name}.1"))


def clean_private_directories() -> int:
    """Remove the directories of sockets whose server is dead; how many.

    Only this user's own `secondnature-*` with a file `pid`, as trainers get them, are touched.
    """
    removed = 0
    for root in {Path(tempfile.gettempdir()), Path("/tmp")}:  # noqa: S108  (where a long TMPDIR makes us go)
        for directory in root.glob("secondnature-*"):
            try:
                status = directory.lstat()
                pid = int((directory / "pid").read_text(encoding="ascii"))
            except (OSError, ValueError):  # not ours, gone meanwhile, or not marked yet
                continue
            ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and pid > 0
            if ours and not _lives(pid):
                shutil.rmtree(directory, ignore_errors=True)
                removed += 1
    return removed


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
