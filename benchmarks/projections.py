"""What APOLLO loses by projecting with signs where the paper has Gaussians: the scales, and where training ends.

A channel's scale s_j = ||Adam step of the projection|| / ||projection|| stands for the full-rank one. Ten gradients
in a row, of the embedded model's matrices on real corrections, and random ones of low rank, are projected by both
kinds, many seeds each; measured is alpha * s_j over the exact scale after the tenth. At rank 1 there is one scale
per matrix. Then the same corrections are trained on with both kinds, seed by seed.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import THREADS, Settings, examples, say, spread
from descent import Rows, Subject, mini_batches
from scipy import stats
from torch import Tensor

from secondnature.embedded.delta_rule import one_chunk_training
from secondnature.records import OptimizerSettings
from secondnature.train import update
from secondnature.train.apollo import Apollo, highest_rank

RANKS = (1, 8, 16, 64)
TRAINED_RANKS = (1, 16)
NUM_GRADIENTS = 10
LR = 1e-4
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8

signs = update.projection


def gaussians(seed: int, name: str, epoch: int, rank: int, size: int) -> Tensor:
    """The paper's: N(0, 1) / sqrt(rank)."""
    key = hashlib.sha256(f"{seed} {name} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
    return torch.randn(rank, size, generator=generator) / rank**0.5


KINDS: dict[str, Callable[[int, str, int, int, int], Tensor]] = {"signs": signs, "gaussians": gaussians}


def _adam(gradients: list[Tensor]) -> Tensor:
    """The bias-corrected Adam step after these gradients."""
    m, v = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    for gradient in gradients:
        m = torch.lerp(m, gradient, 1 - BETA1)
        v = BETA2 * v + (1 - BETA2) * gradient.square()
    count = len(gradients)
    return m / (1 - BETA1**count) / ((v / (1 - BETA2**count)).sqrt() + EPS)


def _scales(step: Tensor, last: Tensor, *, whole: bool) -> Tensor:
    """Length of the step over that of the gradient: per channel, or of the whole matrix."""
    return (step.norm() / last.norm()).view(1) if whole else step.norm(dim=0) / last.norm(dim=0)


def _ratios(
    gradients_MN: list[Tensor], kind: Callable[..., Tensor], name: str, rank: int, num_seeds: int
) -> list[np.ndarray]:
    """Per seed: alpha * s_j / exact s_j of every channel that has a gradient."""
    size = len(gradients_MN[0])
    alive = gradients_MN[-1].norm(dim=0) > 0
    exact = _scales(_adam(gradients_MN), gradients_MN[-1], whole=rank == 1)
    found: list[np.ndarray] = []
    for seed in range(num_seeds):
        p_RM = kind(seed, name, 0, rank, size)
        projected = [p_RM @ g for g in gradients_MN]
        got = (size / rank) ** 0.5 * _scales(_adam(projected), projected[-1], whole=rank == 1)
        ratio = got / exact
        found.append((ratio if rank == 1 else ratio[alive]).numpy())
    return found


def _real(subject: Subject, rows: Rows, count: int, rank: int) -> dict[str, list[Tensor]]:
    """Gradients (M, N), rank < M <= N, of one matrix of each kind along a descent by APOLLO."""
    subject.set(subject.start)
    optimizer = Apollo(subject.model, OptimizerSettings(lr=LR), track=False)
    kinds: dict[str, str] = {}  # one of each: the last layer that has it
    for name, rule in optimizer.rules.items():
        if rule == "apollo" and min(optimizer.parameters[name].shape) > rank:
            kinds[".".join(name.split(".")[-3:])] = name
    found: dict[str, list[Tensor]] = {name: [] for name in kinds.values()}
    batches = mini_batches(len(rows.ids), 3, 0)
    for _ in range(count):
        gradients = subject.gradients(rows.part(next(batches)))
        for name, seen in found.items():
            gradient = gradients[name].detach()
            seen.append((gradient.T if gradient.shape[0] > gradient.shape[1] else gradient).clone())
        optimizer.step(gradients)
    return found


def _random(count: int, num_matrices: int) -> dict[str, list[Tensor]]:
    """Gradients of rank 4 with a common part, at the size of an MLP's matrix."""
    generator = torch.Generator().manual_seed(0)

    def low_rank() -> Tensor:
        return torch.randn(192, 4, generator=generator) @ torch.randn(4, 512, generator=generator)

    found: dict[str, list[Tensor]] = {}
    for i in range(num_matrices):
        common = low_rank()
        found[f"random {i}"] = [common + low_rank() for _ in range(count)]
    return found


def _compare(matrices: dict[str, list[Tensor]], rank: int, num_seeds: int) -> dict[str, Any]:
    """Distribution and error of the scales by both kinds of projection."""
    row: dict[str, Any] = {"rank": rank, "matrices": len(matrices), "seeds": num_seeds}
    errors: dict[str, list[float]] = {}
    for kind, projection in KINDS.items():
        by_matrix = [_ratios(g, projection, name, rank, num_seeds) for name, g in matrices.items()]
        per_seed = [
            statistics.fmean(float(np.abs(of_one[seed] - 1).mean()) for of_one in by_matrix)
            for seed in range(num_seeds)
        ]
        everything = np.concatenate([r for of_one in by_matrix for r in of_one])
        low, middle, high = (float(q) for q in np.quantile(everything, (0.05, 0.5, 0.95)))
        row[kind] = {"error": spread(per_seed), "q05": low, "q50": middle, "q95": high}
        errors[kind] = per_seed
    row["difference"] = _interval([a - b for a, b in zip(errors["signs"], errors["gaussians"], strict=True)])
    return row


def _interval(differences: list[float]) -> dict[str, float]:
    """Mean of paired differences with its 95 % interval (Student)."""
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    reach = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "n": len(differences)}


def _uncached(projection: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As the optimizer asks for one: with the device it is for."""
    return lambda *key: projection(*key[:-1])


def _trained(subject: Subject, rows: Rows, rank: int, num_seeds: int, num_steps: int) -> dict[str, Any]:
    """The loss after some steps with both kinds, the same batches and seed."""
    losses: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for seed in range(num_seeds):
        for kind, projection in KINDS.items():
            subject.set(subject.start)
            optimizer = Apollo(subject.model, OptimizerSettings(lr=LR, rank=rank), seed=seed, track=False)
            batches = mini_batches(len(rows.ids), 3, seed)
            with mock.patch.object(update, "_kept_projection", side_effect=_uncached(projection)) as used:
                for _ in range(num_steps):
                    optimizer.step(subject.gradients(rows.part(next(batches))))
            assert used.called, "the optimizer projects elsewhere"
            losses[kind].append(subject.loss(rows))
        say(f"rank {rank}, seed {seed}: loss {losses['signs'][-1]:.4g} signs, {losses['gaussians'][-1]:.4g}")
    logs = [float(np.log(a / b)) for a, b in zip(losses["signs"], losses["gaussians"], strict=True)]
    by_log = _interval(logs)
    return {
        "rank": rank,
        "losses": {kind: spread(found) for kind, found in losses.items()},
        "ratio": {k: float(np.exp(by_log[k])) for k in ("mean", "low", "high")} | {"n": num_seeds},
    }


def measure(settings: Settings) -> dict[str, Any]:
    """Scales on real and random gradients at four ranks; final losses at two."""
    torch.set_num_threads(THREADS)
    subject = Subject(settings.model)
    rows = Rows([(e.context_ids, e.continuation_ids) for e in examples(subject.tokenizer)])
    count, num_seeds = (2, 3) if settings.quick else (NUM_GRADIENTS, 24)
    with one_chunk_training():
        subject.set(subject.start)
        start = subject.loss(rows)
        ranks = [r for r in RANKS if r <= highest_rank(subject.model)]
        real = _real(subject, rows, count, max(ranks))
        found: dict[str, Any] = {"gradients": count, "lr": LR, "start_loss": start, "rows": {}}
        for name, matrices in (("real", real), ("random", _random(count, 1 if settings.quick else 4))):
            found["rows"][name] = [_compare(matrices, rank, num_seeds) for rank in ranks]
            say(f"{name}: {len(matrices)} matrices compared")
        steps, repeats = (2, 2) if settings.quick else (10, 10)
        found["steps"] = steps
        found["trained"] = [_trained(subject, rows, r, repeats, steps) for r in TRAINED_RANKS]
    return found
