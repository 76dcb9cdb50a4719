"""How a step's time and memory grow: with the context, with the answers to it, with the model.

The trainer's step beside the usual one over whole rows (context labels -100), the same fp32 model, optimizer and
examples; the usual one is left out where a step of it has more than `MOST_TOKENS`. Memory is the peak of torch's
allocations during a step above its start.
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import models
import torch
from common import THREADS, Settings, peak_bytes, say, spread, timed, turns
from step import plain_step
from training import Ours, answers

ANSWER = 64
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
COUNTS = (1, 2, 4, 8, 16)
LONG, SHORT = 2048, 512
"""Context tokens of the series over answers, and over models."""
SIZES = (
    models.Size(hidden=128, layers=4, vocabulary=1024),
    models.Size(hidden=256, layers=4, vocabulary=2048),
    models.Size(hidden=384, layers=8),
    models.Size(hidden=512, layers=8),
    models.Size(hidden=768, layers=12),
    models.Size(hidden=1024, layers=16),
)
"""1 to 208 million parameters."""
MOST_TOKENS = 2200


def _point(ours: Ours, size: models.Size, context: int, count: int, repeats: int) -> dict[str, Any]:
    """Seconds and peak memory of both."""
    batch = answers(size, context, ANSWER, count)
    steps: dict[str, Callable[[], object]] = {"ours": partial(ours.step, batch)}
    if count * (context + ANSWER) <= MOST_TOKENS:
        steps["whole"] = partial(plain_step, ours.model, ours.optimizer, batch, count)

    def contender(step: Callable[[], object]) -> Callable[[], Mapping[str, float]]:
        return lambda: {"step": timed(step)}

    times = turns({n: contender(s) for n, s in steps.items()}, repeats, warm=False)
    found = {
        "context": context,
        "answers": count,
        "parameters": models.num_parameters(ours.model),
        "seconds": {n: spread(t["step"]) for n, t in times.items()},
        "peak_bytes": {n: peak_bytes(s) for n, s in steps.items()},
    }
    what = f"{found['parameters'] / 1e6:.0f}M, C {context}, k {count}"
    seconds = ", ".join(f"{n} {t['median']:.2f} s" for n, t in found["seconds"].items())
    say(f"{what}: {seconds}, {found['peak_bytes']['ours'] / 1e6:.0f} MB")
    return found


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent p of y ~ x^p, over the upper half of the points."""
    pairs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True)][len(x) // 2 :]
    middle = [sum(p[i] for p in pairs) / len(pairs) for i in (0, 1)]
    across = sum((a - middle[0]) ** 2 for a, _ in pairs)
    return sum((a - middle[0]) * (b - middle[1]) for a, b in pairs) / across if across else 0.0


def _series(points: Iterable[dict[str, Any]], key: str) -> dict[str, Any]:
    rows = list(points)
    x = [float(row[key]) for row in rows]
    exponents = {
        "seconds": slope(x, [row["seconds"]["ours"]["median"] for row in rows]),
        "peak_bytes": slope(x, [row["peak_bytes"]["ours"] for row in rows]),
    }
    return {"over": key, "rows": rows, "exponent": exponents}


def measure(settings: Settings) -> dict[str, Any]:
    """Three series of points."""
    torch.set_num_threads(THREADS)
    quick = settings.quick
    size = models.TINY if quick else models.SMALL
    contexts, counts = ((64, 128), (1, 2)) if quick else (CONTEXTS, COUNTS)
    long, short = (64, 64) if quick else (LONG, SHORT)
    sizes = (models.TINY, models.Size(hidden=192, layers=4, vocabulary=512)) if quick else SIZES
    repeats = settings.repeats
    most = max(contexts) + ANSWER
    found: dict[str, Any] = {"answer": ANSWER, "repeats": repeats}

    def opened(size: models.Size, folder: Path) -> Ours:
        gc.collect()
        ours = Ours(models.save(size, folder, max_tokens=most), torch.float32)
        ours.step(answers(size, 64, ANSWER, 1))  # what only a first step does
        return ours

    with tempfile.TemporaryDirectory() as place:
        ours = opened(size, Path(place) / "model")
        found["context"] = _series((_point(ours, size, c, 1, repeats) for c in contexts), "context")
        found["answers"] = _series((_point(ours, size, long, k, repeats) for k in counts), "answers")
        del ours
        found["model"] = _series(
            (_point(opened(s, Path(place) / str(i)), s, short, 1, repeats) for i, s in enumerate(sizes)),
            "parameters",
        )
    return found
