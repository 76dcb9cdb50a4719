"""The ledger: every correction that people gave, in order, durable before it is acknowledged (engine).

One JSON line per correction, appended with fsync. A line torn by a crash was never acknowledged and is skipped;
nothing is ever rewritten.
"""

from __future__ import annotations

import secrets
import threading
from pathlib import Path

from pydantic import ValidationError

from secondnature import storage
from secondnature.records import Correction, utc_now


class Ledger:
    """The corrections of one home. Safe to use from several threads of one process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._corrections, self.num_torn = _read(path)

    def add(self, corrections: list[Correction]) -> list[Correction]:
        """Append corrections, all or none; they carry their id and time when this returns.

        Raises:
            StorageError: the disk refused; nothing was added.
        """
        stamped = [
            c.model_copy(
                update={"id": "cor-" + secrets.token_hex(8), "created_at": c.created_at or utc_now()}
            )
            for c in corrections
        ]
        with self._lock:
            storage.append_line(self._path, "\n".join(c.model_dump_json(exclude_none=True) for c in stamped))
            self._corrections.extend(stamped)
        return stamped

    def all(self) -> list[Correction]:
        """Every correction, oldest first."""
        with self._lock:
            return list(self._corrections)


def _read(path: Path) -> tuple[list[Correction], int]:
    corrections: list[Correction] = []
    num_torn = 0
    for line in storage.read_lines(path):
        try:
            corrections.append(Correction.model_validate_json(line))
        except ValidationError:
            num_torn += 1
    return corrections, num_torn
