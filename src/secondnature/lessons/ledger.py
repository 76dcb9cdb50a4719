"""The ledger: every correction that people gave, in order, durable before it is acknowledged (server).

One JSON line per correction, in the order of their coming. An end that a crash tore was never acknowledged. A whole
line that this version cannot read (a newer one wrote it, a hand changed it) stays where it is, is counted, and is
said: at the start in the server's log, by `GET /v1/corrections`, `secondnature doctor` and `learn`.
"""

from __future__ import annotations

import logging
import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from secondnature import storage
from secondnature.errors import DamagedFile, NotDurable, TooNew
from secondnature.records import Correction, describe, utc_now
from secondnature.records.migrations import migrate

LOG = logging.getLogger(__name__)


@dataclass
class _Read:
    corrections: list[Correction] = field(default_factory=list[Correction])
    num_torn: int = 0
    unreadable: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])


class Ledger:
    """The corrections of one home. Safe to use from several threads of one process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._found = _read(path)
        if self.num_torn:
            LOG.warning("%s: its end was torn by a crash, was never acknowledged, and is left out", path)
        for number, reason in self.unreadable:
            LOG.warning("%s, line %d cannot be read, and is left out: %s", path, number, reason)

    @property
    def num_torn(self) -> int:
        """1 if the file ended with half a line when it was opened."""
        return self._found.num_torn

    @property
    def unreadable(self) -> list[tuple[int, str]]:
        """(line number, reason) of whole lines that are no correction to this version; they stay in the file."""
        return self._found.unreadable

    def add(self, corrections: list[Correction]) -> list[Correction]:
        """Append corrections, all or none; they carry their id and time when this returns.

        Raises:
            StorageError: the disk refused; nothing was added.
            NotDurable: they were added, but a power loss may take them back.
        """
        stamped = [
            c.model_copy(
                update={"id": "cor-" + secrets.token_hex(8), "created_at": c.created_at or utc_now()}
            )
            for c in corrections
        ]
        with self._lock:
            try:
                storage.append_lines(self._path, [c.to_disk(exclude_none=True) for c in stamped])
            except NotDurable:
                self._found = _read(self._path)  # what is there is what is taught
                raise
            self._found.corrections.extend(stamped)
        return stamped

    def all(self) -> list[Correction]:
        """Every correction, oldest first."""
        with self._lock:
            return list(self._found.corrections)


def _read(path: Path) -> _Read:
    found, lines = _Read(), storage.read_lines(path)
    for line in lines.skipped:
        if line.torn:
            found.num_torn += 1
        else:
            found.unreadable.append((line.number, line.reason))
    for number, raw in lines.values:
        try:
            found.corrections.append(Correction.from_disk(migrate("correction", raw, "this line")))
        except ValidationError as e:
            found.unreadable.append((number, describe(e)))
        except (TooNew, DamagedFile) as e:
            found.unreadable.append((number, e.message))
    found.unreadable.sort()
    return found
