"""What bf16 keeps of an update, rounded stochastically or to nearest; and what the optimizer costs beside AdamW.

Kept: ten real steps of the trainer at one learning rate give the intended updates; the very same ones are added
with rounding to nearest to a second copy. Of each sum of written differences the share is its projection on the
sum of the intended ones; the cosine says how much rounding noise lies on top. Costs: one optimizer step on
given gradients, at this model's shapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import THREADS, Settings, alternate, examples, load, ratio, say, spread
from torch import Tensor

from secondnature.records import OptimizerSettings
from secondnature.train.apollo import Apollo
from secondnature.train.step import train_step

RATES = (5e-7, 1e-5, 1e-4)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _against(written: Sequence[Tensor], intended: Sequence[Tensor]) -> dict[str, float]:
    dot, square = _dot(written, intended), _dot(intended, intended)
    length = _dot(written, written)
    return {"kept": dot / square, "cosine": dot / (square * length) ** 0.5 if length else 0.0}


def _kept(settings: Settings, lr: float, num_steps: int) -> dict[str, Any]:
    """After one step and after all of them: the kept share of both ways of rounding."""
    arena, model, tokenizer = load(settings.model)
    batch = examples(tokenizer)
    optimizer = Apollo(model, OptimizerSettings(lr=lr))
    before = {n: t.float() for n, t in arena.tensors.items()}
    nearest = {n: t.clone() for n, t in arena.tensors.items()}
    sums: dict[str, Tensor] = {}
    found: dict[str, Any] = {"lr": lr}
    for step in range(1, num_steps + 1):
        train_step(model, optimizer, batch, "orpo", learned_loss=0.0)
        assert optimizer.task_vector is not None
        for name, total in optimizer.task_vector.items():
            update = total - sums[name] if name in sums else total
            nearest[name] = (nearest[name].float() + update).to(torch.bfloat16)
            sums[name] = total.clone()
        if step in (1, num_steps):
            names = list(sums)
            intended = [sums[n] for n in names]
            for way, now in (("stochastic", arena.tensors), ("nearest", nearest)):
                written = [now[n].float() - before[n] for n in names]
                found[f"{way}_{'first' if step == 1 else 'all'}"] = _against(written, intended)
    return found


class _Contender:
    """One optimizer on copies of the model's tensors and fixed gradients; only the step is timed."""

    def __init__(
        self, step: Callable[[dict[str, Tensor]], object], gradients: dict[str, Tensor], repeats: int
    ) -> None:
        self._step, self._gradients, self._repeats = step, gradients, repeats

    def __call__(self) -> float:
        seconds = 0.0
        for _ in range(self._repeats):
            mine = {n: g.clone() for n, g in self._gradients.items()}  # a step may use them up
            begun = time.perf_counter()
            self._step(mine)
            seconds += time.perf_counter() - begun
        return seconds / self._repeats


def _adamw(
    weights: dict[str, Tensor], dtype: torch.dtype, *, fused: bool
) -> tuple[torch.optim.AdamW, Callable[[dict[str, Tensor]], None]]:
    parameters = {n: torch.nn.Parameter(t.to(dtype, copy=True)) for n, t in weights.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-5, fused=fused, foreach=not fused)

    def step(gradients: dict[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            parameter.grad = gradients[name] if dtype == torch.float32 else gradients[name].to(dtype)
        optimizer.step()

    return optimizer, step


def _costs(settings: Settings) -> dict[str, Any]:
    """Seconds and bytes of state of one step, APOLLO beside AdamW."""
    arena, model, _ = load(settings.model)
    random = torch.Generator().manual_seed(0)
    gradients = {n: torch.randn(t.shape, generator=random) * 1e-3 for n, t in arena.tensors.items()}
    apollo = Apollo(model, OptimizerSettings(), track=False)
    peers = {
        "adamw_fused_fp32": _adamw(arena.tensors, torch.float32, fused=True),
        "adamw_foreach_fp32": _adamw(arena.tensors, torch.float32, fused=False),
        "adamw_fused_bf16": _adamw(arena.tensors, torch.bfloat16, fused=True),
    }
    steps: dict[str, Callable[[dict[str, Tensor]], object]] = {
        "apollo": apollo.step,
        **{k: step for k, (_, step) in peers.items()},
    }
    inner = 1 if settings.quick else 3
    seconds = alternate({k: _Contender(s, gradients, inner) for k, s in steps.items()}, settings.repeats)
    state = {"apollo": sum(t.nbytes for t in apollo.state_dict()[0].values())}
    for name, (optimizer, _) in peers.items():
        held = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        state[name] = sum(t.nbytes for t in held)
    model_bytes = sum(t.nbytes for t in arena.tensors.values())
    master = 2 * model_bytes  # the fp32 copy of the weights that fp32 AdamW needs beside bf16 ones
    extra = {k: master if k.endswith("fp32") else 0 for k in state}
    return {
        "seconds": {k: spread(v) for k, v in seconds.items()},
        "time_ratio": {k: ratio(seconds["apollo"], v) for k, v in seconds.items() if k != "apollo"},
        "state_bytes": state,
        "fp32_copy_bytes": extra,
        "model_bytes": model_bytes,
        "rank": apollo.settings.rank,
    }


def measure(settings: Settings) -> dict[str, Any]:
    """Kept shares at three learning rates; costs of a step."""
    torch.set_num_threads(THREADS)
    num_steps = 2 if settings.quick else 10
    rows: list[dict[str, Any]] = []
    for lr in RATES:
        rows.append(_kept(settings, lr, num_steps))
        kept = [rows[-1][f"{way}_all"]["kept"] for way in ("stochastic", "nearest")]
        say(f"lr {lr:g}: kept {kept[0]:.3f} stochastic, {kept[1]:.3f} nearest")
    return {"steps": num_steps, "rows": rows, "costs": _costs(settings)}
