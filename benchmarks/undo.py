"""What an undo costs: the size of a lesson's difference, and the time until the weights of before are back.

Real steps of the trainer on six corrections, written down as a kept lesson of a real log. The revert is the
server's own: apply the difference to each tensor in turn and check the content id, then once more and write; here
the id of what lies in the arena then is computed again. Beside it: applying the difference alone, and reading the
model's whole checkpoint, each checked by its id.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import THREADS, Settings, alternate, examples, load, ratio, say, spread, timed
from torch import Tensor

from secondnature.engines.stamps import Clock
from secondnature.lessons.home import Home
from secondnature.lessons.log import DELTA_FILE, Log
from secondnature.lessons.weights import ServedWeights
from secondnature.model.load import fingerprint
from secondnature.records import Lesson, OptimizerSettings
from secondnature.train.apollo import Apollo
from secondnature.train.step import train_step
from secondnature.weights import checkpoint, delta
from secondnature.weights.arena import Arena
from secondnature.weights.content import content_id

RATES = (1e-5, 1e-4)
STEPS = (1, 5, 20)


def _open_log(home: Home, directory: Path, version: str) -> Log:
    home.bind(directory, fingerprint(directory), version)
    return Log(home, directory, version)


def _revert(weights: ServedWeights, lesson: Lesson) -> None:
    """What `POST /v1/lessons/{id}/revert` does to the weights; the entry of the log is not written."""
    weights.take_back(lesson, lambda: lesson)
    assert content_id(weights.arena.tensors) == lesson.parent, "not undone to the byte"


def _apply(path: Path, sha256: str, weights: dict[str, Tensor], wanted: str) -> None:
    """The difference alone, on weights that are there."""
    stored = delta.open_(path, sha256)
    for name, tensor in weights.items():
        stored.apply_(name, tensor, back=True, check=False)
    assert content_id(weights) == wanted, "not undone to the byte"


def _reload(directory: Path, wanted: str) -> None:
    """The whole checkpoint."""
    assert content_id(checkpoint.read(directory)) == wanted


def _one(settings: Settings, before: dict[str, Tensor], arena: Arena) -> dict[str, Any]:
    """Sizes and times of one lesson; the arena is left with the lesson in it."""
    now = {n: t.clone() for n, t in arena.tensors.items()}
    base = content_id(before)
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder))
        log = _open_log(home, settings.model, base)
        lesson = log.create("train", "measured", parent=base)
        clock = Clock(arena, base)
        weights = ServedWeights(arena, clock, log)
        seconds_write = timed(lambda: weights.record(lesson))
        lesson = log.save(weights.record(lesson).model_copy(update={"state": "kept"}))
        path = log.directory(lesson) / DELTA_FILE
        assert lesson.delta_sha256 is not None
        sha256 = lesson.delta_sha256

        def revert() -> float:
            arena.write(now)
            clock.settle(str(lesson.version), arena.writes[0], trial=False)
            return timed(partial(_revert, weights, lesson))

        def apply() -> float:
            copies = {n: t.clone() for n, t in now.items()}
            return timed(partial(_apply, path, sha256, copies, base))

        found = alternate(
            {
                "revert": revert,
                "apply": apply,
                "reload": lambda: timed(partial(_reload, settings.model, base)),
                "content_id": lambda: timed(partial(content_id, now)),
            },
            settings.repeats,
        )
        size = path.stat().st_size
        home.close()
    arena.write(now)
    num_elements = sum(t.numel() for t in before.values())
    changed = sum(int((before[n].view(torch.int16) != t.view(torch.int16)).sum()) for n, t in now.items())
    return {
        "bytes": size,
        "share_of_model": size / sum(t.nbytes for t in before.values()),
        "changed_elements": changed / num_elements,
        "seconds_write": seconds_write,
        "seconds": {k: spread(v) for k, v in found.items()},
        "revert_over_reload": ratio(found["revert"], found["reload"]),
    }


def measure(settings: Settings) -> dict[str, Any]:
    """Per learning rate and number of steps: bytes of the difference, seconds of the undo."""
    torch.set_num_threads(THREADS)
    rows: list[dict[str, Any]] = []
    model_bytes = 0
    for lr in RATES:
        arena, model, tokenizer = load(settings.model)
        before = {n: t.clone() for n, t in arena.tensors.items()}
        model_bytes = sum(t.nbytes for t in before.values())
        optimizer = Apollo(model, OptimizerSettings(lr=lr))
        batch = examples(tokenizer)
        for step in range(1, (5 if settings.quick else max(STEPS)) + 1):
            train_step(model, optimizer, batch, "orpo", learned_loss=0.0)
            if step in STEPS:
                row = _one(settings, before, arena)
                rows.append({"lr": lr, "steps": step, **row})
                say(f"lr {lr:g}, {step} steps: {row['share_of_model']:.1%} of the model's bytes")
    return {"model_bytes": model_bytes, "rows": rows}
