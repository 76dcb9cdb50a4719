"""The check of a home, for whoever holds its lock while it is read (a process of its own; no server runs)."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it

from secondnature.errors import HomeInUse
from secondnature.lessons.fsck import Found, OnProgress, read_home
from secondnature.lessons.home import take_lock

__all__ = ["check"]


def check(home: Path, on_progress: OnProgress) -> Found:
    """What is damaged in a home; nothing in it is changed. Raises HomeInUse: a server holds it."""
    try:
        lock = take_lock(home)
    except HomeInUse as e:
        raise HomeInUse(
            e.message, "stop that server first; `secondnature doctor` asks one that runs"
        ) from None
    with lock:
        return read_home(home, on_progress)
