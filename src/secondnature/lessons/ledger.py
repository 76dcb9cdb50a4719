"""The ledger: every correction that people gave, in order, durable before it is acknowledged (server).

One JSON line per correction, in the order of their coming; nothing is ever taken out of the file. A later line with
the same id is that correction amended; one with `deleted_at` and no correction takes it back. The newest line
counts, and what was there before is known as its history.

An end that a crash tore was never acknowledged. A whole line that this version cannot read (a newer one wrote it, a
hand changed it) stays where it is, is counted, and is said: at the start in the server's log, by
`GET /v1/corrections`, `secondnature doctor` and `learn`.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from secondnature import storage
from secondnature.errors import DamagedFile, Forbidden, NotDurable, NotFound, TooNew
from secondnature.records import Correction, describe, utc_now
from secondnature.records.migrations import migrate, newest

__all__ = ["Added", "Ledger", "Outcome"]

LOG = logging.getLogger(__name__)
FORM = f'{{"schema_version":{newest("correction")},'
"""How a line begins."""
Outcome = Literal["added", "amended", "known"]
"""`known`: it says what is there already, and nothing was written."""


@dataclass(frozen=True)
class Added:
    """What became of a correction that was given."""

    correction: Correction
    """As it is in the ledger now."""
    outcome: Outcome


@dataclass(frozen=True)
class _Entry:
    """A correction as it is now."""

    correction: Correction
    deleted: bool = False
    earlier: tuple[Correction, ...] = ()
    """What it was before, oldest first."""


@dataclass
class _Read:
    entries: dict[str, _Entry] = field(default_factory=dict[str, _Entry])
    """By id, in the order of their first coming."""
    num_torn: int = 0
    unreadable: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])

    def take(self, line: Correction) -> None:
        """A line with a correction, which carries its id."""
        before = self.entries.get(str(line.id))
        earlier = (*before.earlier, before.correction) if before is not None else ()
        self.entries[str(line.id)] = _Entry(line, earlier=earlier)

    def take_back(self, identifier: str) -> None:
        """A line that deletes one; of an entry that could not be read there is nothing to delete."""
        found = self.entries.get(identifier)
        if found is not None:
            self.entries[identifier] = _Entry(found.correction, deleted=True, earlier=found.earlier)


class Ledger:
    """The corrections of one home. Safe to use from several threads of one process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._found = _read(path)
        self._known: _Index | None = None
        """Made when it is first needed."""
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

    def add(self, corrections: list[Correction], *, by_key: Literal["correct"] | None = None) -> list[Added]:
        """Take corrections in, all or none; they carry their id and time when this returns.

        One with the id, or the completion's id, of one that is there replaces it. One that says what another says
        is that one: nothing is written, unless it confirms a candidate, or was deleted and a person says it again.

        Args:
            by_key: `correct`: they came with the key that may only correct, and amend none but its own.

        Raises:
            Forbidden: one of them would amend what another key added.
            StorageError: the disk refused; nothing was added.
            NotDurable: they were added, but a power loss may take them back.
        """
        with self._lock:
            index = self._index()
            try:
                found = [index.place(c, by_key) for c in corrections]
                new = [x.correction for x in found if x.outcome != "known"]
                if new:
                    self._append([FORM + c.to_disk(exclude_none=True)[1:] for c in new])
            except BaseException:
                self._known = None  # it is made anew from what is there
                raise
            for c in new:
                self._found.take(c)
        return found

    def delete(self, identifier: str, *, by_key: Literal["correct"] | None = None) -> Correction:
        """Take one back: it is taught no more, and its lines stay in the file. Again: nothing happens.

        Raises:
            NotFound: there is none of that id.
            Forbidden: another key added it.
            StorageError, NotDurable: see `add`.
        """
        with self._lock:
            found = self._found.entries.get(identifier)
            if found is None:
                raise NotFound(
                    f"no correction {identifier[:200]!r} in the ledger", "`GET /v1/corrections` has their ids"
                )
            _check_owner(found.correction, by_key)
            if not found.deleted:
                line = json.dumps({"id": identifier, "deleted_at": utc_now().isoformat()}, ensure_ascii=False)
                self._append([FORM + line[1:]])
                self._found.take_back(identifier)
                self._known = None
        return found.correction

    def _append(self, lines: list[str]) -> None:
        try:
            storage.append_lines(self._path, lines)
        except NotDurable:
            self._found, self._known = _read(self._path), None  # what is there is what is taught
            raise

    def all(self) -> list[Correction]:
        """Every correction as it is now, oldest first; candidates too, deleted ones not."""
        with self._lock:
            return [e.correction for e in self._found.entries.values() if not e.deleted]

    def confirmed(self) -> list[Correction]:
        """Those that may be taught: no candidates."""
        return [c for c in self.all() if c.state is None]

    def find(self, *, identifier: str | None = None, completion_id: str | None = None) -> Correction | None:
        """The one with this id, or of this completion; None: there is none, or it was deleted."""
        with self._lock:
            if identifier is None and completion_id is not None:
                identifier = self._index().completions.get(completion_id)
            found = self._found.entries.get(identifier or "")
            return None if found is None or found.deleted else found.correction

    def earlier(self, identifier: str) -> tuple[Correction, ...]:
        """What a correction was before it was amended, oldest first."""
        with self._lock:
            found = self._found.entries.get(identifier)
            return () if found is None else found.earlier

    def _index(self) -> _Index:
        if self._known is None:
            self._known = _Index({}, {}, {})
            for e in self._found.entries.values():
                self._known.note(e)
        return self._known


@dataclass
class _Index:
    """By what a correction is known again."""

    entries: dict[str, _Entry]
    completions: dict[str, str]
    """Id of a completion -> id."""
    identities: dict[str, str]
    """`Correction.identity` -> id."""

    def note(self, entry: _Entry) -> None:
        """One that is in the ledger."""
        c = entry.correction
        self.entries[str(c.id)] = entry
        if c.completion_id is not None:
            self.completions[c.completion_id] = str(c.id)
        self.identities[c.identity()] = str(c.id)

    def place(self, given: Correction, by_key: Literal["correct"] | None) -> Added:
        """What becomes of one; it is noted. Raises Forbidden."""
        there = self._there(given)
        outcome: Outcome = "added" if there is None else "amended"
        if there is None:
            identifier = given.id or "cor-" + secrets.token_hex(8)
            stamps: dict[str, Any] = {"created_at": given.created_at or utc_now()}
        else:
            before = there.correction
            same = before.identity() == given.identity()
            if given.state == "candidate":  # a program takes back nothing that a person has decided
                decided = there.deleted or before.state is None or same
            else:
                decided = not there.deleted and before.state is None and same
            if decided:
                return Added(before, "known")
            _check_owner(before, by_key)
            identifier = str(before.id)
            stamps = {"created_at": before.created_at, "amended_at": utc_now()}
            if before.provenance is not None and before.provenance.by_key and given.provenance is not None:
                owned = {"by_key": before.provenance.by_key}  # whoever amends it, it stays whose it was
                stamps["provenance"] = given.provenance.model_copy(update=owned)
        found = given.model_copy(update={"id": identifier, **stamps})
        self.note(_Entry(found))
        return Added(found, outcome)

    def _there(self, given: Correction) -> _Entry | None:
        """What a correction amends, or repeats."""
        named = given.id if given.id in self.entries else self.completions.get(given.completion_id or "")
        if named is not None:
            return self.entries[named]
        told = given.identity()
        found = self.entries.get(self.identities.get(told, ""))
        return found if found is not None and found.correction.identity() == told else None


def _check_owner(correction: Correction, by_key: str | None) -> None:
    """Raises Forbidden: the key that may only correct changes what came with it."""
    owner = correction.provenance.by_key if correction.provenance is not None else None
    if by_key is not None and owner != by_key:
        raise Forbidden(
            f"correction {str(correction.id)[:200]} was not added with this key",
            "use the server's own key",
        )


def _read(path: Path) -> _Read:
    found, lines = _Read(), storage.read_lines(path)
    for line in lines.skipped:
        if line.torn:
            found.num_torn += 1
        else:
            found.unreadable.append((line.number, line.reason))
    for number, raw in lines.values:
        try:
            read = read_line(raw)
        except ValidationError as e:
            found.unreadable.append((number, describe(e)))
        except (TooNew, DamagedFile) as e:
            found.unreadable.append((number, e.message))
        else:
            if isinstance(read, str):
                found.take_back(read)
            else:
                found.take(read if read.id else read.model_copy(update={"id": f"line-{number}"}))
    found.unreadable.sort()
    return found


def read_line(raw: Any) -> Correction | str:
    """A correction of the ledger, or the id of one that is taken back.

    Raises:
        ValidationError, DamagedFile, TooNew: it is neither, to this version.
    """
    present = migrate("correction", raw, "this line")
    if "deleted_at" in present and "prompt" not in present:
        identifier = present.get("id")
        if isinstance(identifier, str):
            return identifier
        raise DamagedFile("this line deletes a correction and does not say which", "mend that line")
    present.pop("schema_version", None)
    return Correction.from_disk(present)
