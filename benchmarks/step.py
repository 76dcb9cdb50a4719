"""One training step: with the context frozen, against the same step over whole sequences (context labels -100).

Same model (bf16 in an arena, cast at use), same optimizer, same examples. The peer runs transformers' own loss,
the examples one by one, or as one batch. Memory is the peak of what torch has allocated during the step, above
what was there before it. A frozen context is a truncation: the cosine says how far its gradient is from the
full one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import (
    THREADS,
    Settings,
    alternate,
    fits,
    load,
    long_example,
    peak_bytes,
    ratio,
    say,
    spread,
    timed,
)
from torch import Tensor, nn

from secondnature.model.upcast import collect
from secondnature.records import Example, OptimizerSettings
from secondnature.train.apollo import Apollo
from secondnature.train.prefix import continuation_logps, freeze
from secondnature.train.step import train_step

SHAPES = ((16, 16), (128, 32), (512, 64))
"""(context, answer) tokens: as long as the embedded model's own corrections, and longer ones."""
BATCH = 4


def _whole_loss(model: Any, batch: Sequence[Example]) -> Tensor:
    """transformers' loss over whole sequences of one length; the context's labels are -100."""
    ids = torch.tensor([e.context_ids + e.continuation_ids for e in batch])
    labels = ids.clone()
    labels[:, : len(batch[0].context_ids)] = -100
    return model(input_ids=ids, labels=labels, use_cache=False).loss


def plain_step(model: nn.Module, optimizer: Apollo, batch: Sequence[Example], rows: int) -> None:
    """The usual loop: `rows` examples at a time, gradients summed, one optimizer step."""
    with collect(model) as gradients:
        for start in range(0, len(batch), rows):
            part = batch[start : start + rows]
            (_whole_loss(model, part) * (len(part) / len(batch))).backward()
    optimizer.step(gradients)


def _cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    names = a.keys() | b.keys()
    dot = sum(float((a[n] * b[n]).sum()) for n in names if n in a and n in b)
    norms = [math.sqrt(sum(float(t.square().sum()) for t in g.values())) for g in (a, b)]
    return dot / (norms[0] * norms[1])


def _gradient_cosine(model: nn.Module, batch: Sequence[Example]) -> float:
    """Between the batch's gradient with a frozen context and the full one."""
    with collect(model) as frozen:
        for example in batch:
            (logps,) = continuation_logps(
                model, freeze(model, example.context_ids), [example.continuation_ids]
            )
            (-logps.mean() / len(batch)).backward()
    with collect(model) as full:
        _whole_loss(model, batch).backward()
    return _cosine(frozen, full)


def measure(settings: Settings) -> dict[str, Any]:
    """Time, peak memory and gradient of the frozen step relative to the plain one, per (context, answer)."""
    torch.set_num_threads(THREADS)
    _, model, tokenizer = load(settings.model)
    # so small that the weights stay what they are, however often a step is made
    optimizer = Apollo(model, OptimizerSettings(lr=1e-9), track=False)
    rows: list[dict[str, Any]] = []
    for num_context, num_answer in SHAPES:
        if not fits(settings.model, num_context + num_answer):
            continue
        batch = [long_example(tokenizer, num_context, num_answer, start=i) for i in range(BATCH)]
        contenders: dict[str, Callable[[], object]] = {
            "frozen": partial(train_step, model, optimizer, batch, "sft", learned_loss=0.0),
            "whole": partial(plain_step, model, optimizer, batch, 1),
            "whole_batched": partial(plain_step, model, optimizer, batch, BATCH),
        }
        seconds = alternate({k: partial(timed, work) for k, work in contenders.items()}, settings.repeats)
        peaks = {k: peak_bytes(work) for k, work in contenders.items()}
        rows.append(
            {
                "context": num_context,
                "answer": num_answer,
                "seconds": {k: spread(v) for k, v in seconds.items()},
                "time_ratio": {k: ratio(seconds["frozen"], v) for k, v in seconds.items() if k != "frozen"},
                "peak_bytes": peaks,
                "memory_ratio": {k: peaks["frozen"] / v for k, v in peaks.items() if k != "frozen"},
                "gradient_cosine": _gradient_cosine(model, batch),
            }
        )
        median = rows[-1]["time_ratio"]["whole"]["median"]
        say(f"context {num_context}, answer {num_answer}: {median:.2f} of the time of a whole step")
    return {"batch": BATCH, "rows": rows}
