"""A home with served weights and no server: entries whose change is a few bytes, made in milliseconds.

Everything is the product's own (home, log, arena, clock, served weights) but the trainer, whose place a write in
the arena takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secondnature.engines.stamps import Clock
from secondnature.lessons.home import Home
from secondnature.lessons.log import DELTA_FILE, Log
from secondnature.lessons.weights import ServedWeights, fill_kept
from secondnature.model.load import fingerprint
from secondnature.records import Correction, Lesson, to_jsonl, utc_now
from secondnature.weights import checkpoint
from secondnature.weights.arena import Arena
from secondnature.weights.content import content_id


@dataclass
class Served:
    """What a server holds of its home."""

    home: Home
    log: Log
    arena: Arena
    clock: Clock
    weights: ServedWeights

    @property
    def found(self) -> str:
        """Version of what lies in the arena now, computed from its bytes."""
        return content_id(self.arena.tensors)

    def write(self, value: float = 0.5) -> None:
        """What a trainer's step is: some bytes, in a bracket."""
        with self.arena.writing():
            first = next(iter(self.arena.tensors.values()))
            first.view(-1)[:7].fill_(value)

    def begin(self, name: str = "use", *, corrections: list[Correction] | None = None) -> Lesson:
        """An entry that runs and has written nothing yet."""
        files = {"corrections.jsonl": to_jsonl(corrections)} if corrections else None
        entry = self.log.create("train", name, files=files)
        self.weights.begin(entry)
        running = {"state": "running", "parent": self.log.kept_version(), "started_at": utc_now()}
        return self.log.save(entry.model_copy(update=running))

    def on_trial(self, value: float = 0.5, **given: Any) -> Lesson:
        """An entry that has written, on trial."""
        entry = self.begin(**given)
        self.write(value)
        entry = self.weights.record(entry)
        return self.log.save(entry.model_copy(update={"state": "on_trial"}))

    def kept(self, value: float = 0.5, **given: Any) -> Lesson:
        """A kept entry."""
        entry = self.log.save(self.on_trial(value, **given).model_copy(update={"state": "kept"}))
        self.weights.keep()
        return entry

    def delta(self, lesson: Lesson) -> Path:
        """Where its difference lies."""
        return self.log.directory(lesson) / DELTA_FILE


def serve(path: Path, model: Path, dtypes: dict[str, torch.dtype] | None = None) -> Served:
    """Open a home, as the servers do. Close it with `home.close()`. `dtypes`: of tensors that are not bf16."""
    home = Home(path)
    try:
        arena = Arena.create(checkpoint.read(model, dtypes))
        base = content_id(arena.tensors)
        home.bind(model, fingerprint(model), base)
        log = Log(home, model, base, dtypes)
        fill_kept(arena, log)
    except BaseException:
        home.close()
        raise
    clock = Clock(arena, log.kept_version())
    return Served(home, log, arena, clock, ServedWeights(arena, clock, log))
