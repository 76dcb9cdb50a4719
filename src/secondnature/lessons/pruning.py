"""How far back an undo reaches, and the removal of what no undo within reach needs (server).

An undo needs the delta of its lesson and, to go on as before, the optimizer's state of then; the update goes with
the delta. A removal is said in the entry first: what is missing unsaid is damage.
"""

from __future__ import annotations

from collections.abc import Collection

from pydantic import BaseModel

from secondnature import storage
from secondnature.lessons.log import DELTA_FILE, OPTIMIZER_FILE, Log
from secondnature.records import OPEN_STATES, Lesson
from secondnature.weights.updates import UPDATE_FILE

__all__ = ["Pruned", "Pruning"]


class Pruned(BaseModel):
    """What `Pruning.prune` removed, or would remove."""

    removed: list[str] = []
    """Paths below the home's `lessons`."""
    nbytes: int = 0

    @property
    def files(self) -> int:
        """How many."""
        return len(self.removed)


class Pruning:
    """Of one log. Used by the thread that writes it."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def undoable(self, gone: Collection[str] = ()) -> tuple[list[str], list[str]]:
        """(ids of the entries that can be taken back, one after another from the newest on; those of them for
        which the optimizer's state of before is there too). `gone`: paths that count as removed, as in `Pruned`."""

        def is_there(lesson_id: str, name: str) -> bool:
            path = self._log.directory(self._log.get(lesson_id)) / name
            return f"{lesson_id}/{name}" not in gone and path.is_file()

        lessons: list[str] = []
        with_state: list[str] = []
        for lesson in reversed(self._log.in_force()):
            if not is_there(self._log.owner(lesson).id, DELTA_FILE):
                break
            lessons.append(lesson.id)
            before = lesson.optimizer_before
            if before is None or is_there(before, OPTIMIZER_FILE):
                with_state.append(lesson.id)
        return lessons, with_state

    def prune(self, keep_states: int, keep_deltas: int | None = None, *, dry_run: bool = False) -> Pruned:
        """Remove what no undo within reach needs: optimizer states; deltas and updates only where asked for.

        Args:
            keep_states: so many of the newest kept entries can be taken back with their optimizer's state.
            keep_deltas: so many can be taken back at all; never fewer than the working copy needs. None: all.
            dry_run: only say what would be removed.

        Raises:
            StorageError: the disk refused; what was removed is counted nowhere.
        """
        head = self._log.head()
        within = self._newest(keep_states)
        needed = {x for lesson in within for x in (lesson.optimizer_before, lesson.optimizer_after)}
        needed.add(head.optimizer_after if head is not None else None)
        removed = self._remove(OPTIMIZER_FILE, {x for x in needed if x is not None}, Pruned(), dry_run)
        if keep_deltas is not None:
            chain = {self._log.owner(x).id for x in self._log.chain()}
            reachable = {self._log.owner(x).id for x in self._newest(keep_deltas)}
            for name in (DELTA_FILE, UPDATE_FILE):  # what cannot be undone is neither merged nor scaled
                removed = self._remove(name, chain | reachable, removed, dry_run)
        return removed

    def _newest(self, number: int) -> list[Lesson]:
        """So many of the newest kept entries, and of those in force: an undo may be asked of either."""
        kept = [x for x in self._log.all() if x.state == "kept"]
        return [x for found in (kept, self._log.in_force()) for x in found[max(0, len(found) - number) :]]

    def _remove(self, name: str, needed: set[str], removed: Pruned, dry_run: bool) -> Pruned:
        for lesson in self._log.all():
            path = self._log.directory(lesson) / name
            if lesson.id in needed or lesson.state in OPEN_STATES:
                continue
            with storage.storage_errors(path):
                try:
                    size = path.stat().st_size
                    if not dry_run:
                        if name != OPTIMIZER_FILE:  # said before it is so: what is missing unsaid is damage
                            self._note_pruned(lesson)
                        path.unlink()
                except FileNotFoundError:
                    continue
            removed = Pruned(removed=[*removed.removed, f"{lesson.id}/{name}"], nbytes=removed.nbytes + size)
        return removed

    def _note_pruned(self, owner: Lesson) -> None:
        """Write down, in the entry of a delta and in those that go through it, that it is gone."""
        for lesson in self._log.all():
            is_its = lesson.state == "kept" and self._log.owner(lesson).id == owner.id
            if is_its and not lesson.delta_pruned:
                self._log.save(lesson.model_copy(update={"delta_pruned": True}))
