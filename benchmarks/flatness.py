"""Is what APOLLO finds flatter than what AdamW finds? The loss around both, at the same training loss.

Sixteen corrections are taught by APOLLO (rank 16), APOLLO-Mini (rank 1), Adam with the same floors as ours (only
the projection tells it from APOLLO) and torch's AdamW, each from the same weights at the same learning rate, to the
same loss. Then the loss on the corrections and on other requests is measured along random directions, each row of a
matrix as long as that row of the weights (Li et al. 2018, arXiv 1712.09913), the same directions for all; and along
the optimizer's own update, backwards (-1 is the start) and beyond. Curvature: the second difference.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from common import THREADS, Settings, ratio, say, spread
from descent import Rows, Subject, Vector, descend_to

from secondnature.embedded.delta_rule import one_chunk_training
from secondnature.records import OptimizerSettings
from secondnature.train.apollo import Apollo

LR = 1e-4
"""Of all: APOLLO's updates are as long as Adam's by construction. A third of what the embedded model's card says,
so that the way down takes more than a few steps."""
RANK = 16
ARMS = ("apollo", "mini", "adam_floored", "adamw")
RANDOM_ALPHAS = (-0.2, -0.1, -0.05, 0.05, 0.1, 0.2)
RANDOM_H = 0.05
OWN_ALPHAS = (-1.0, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
OWN_H = 0.25
NUM_TAUGHT, NUM_OTHER, NUM_DIRECTIONS = 16, 24, 4


def _stepper(subject: Subject, arm: str, seed: int) -> Callable[[Vector], object]:
    """A function that makes one step of that optimizer from given gradients."""
    if arm == "adamw":
        parameters = dict(subject.model.named_parameters())
        adamw = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.0)

        def step(gradients: Vector) -> None:
            for name, parameter in parameters.items():
                parameter.grad = gradients[name]
            adamw.step()
            adamw.zero_grad()

        return step
    settings = OptimizerSettings(lr=LR, rank=1 if arm == "mini" else RANK)
    optimizer = Apollo(subject.model, settings, seed=seed, track=False)
    if arm == "adam_floored":
        optimizer.rules |= dict.fromkeys(optimizer.factored, "adam")
    return optimizer.step


def _random_direction(weights: Vector, seed: int) -> Vector:
    """Gaussian, each row as long as the weights' row; vectors (norms, biases) stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    found: Vector = {}
    for name, tensor in sorted(weights.items()):
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim < 2:
            found[name] = torch.zeros_like(tensor)
            continue
        rows = noise.flatten(1).norm(dim=1).clamp_min(1e-12)
        noise *= (tensor.flatten(1).norm(dim=1) / rows).view(-1, *[1] * (tensor.ndim - 1))
        found[name] = noise
    return found


def _along(
    subject: Subject, at: Vector, direction: Vector, alphas: tuple[float, ...], sets: dict[str, Rows]
) -> dict[str, list[float]]:
    """The loss on each set at `at` + alpha * `direction`."""
    found: dict[str, list[float]] = {name: [] for name in sets}
    for alpha in alphas:
        subject.set({n: t + alpha * direction[n] for n, t in at.items()})
        for name, rows in sets.items():
            found[name].append(subject.loss(rows))
    subject.set(at)
    return found


def _curvature(alphas: tuple[float, ...], losses: list[float], middle: float, h: float) -> float:
    """The second difference at 0."""
    at = dict(zip(alphas, losses, strict=True))
    return (at[h] + at[-h] - 2 * middle) / h**2


def _mean(curves: list[list[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*curves, strict=True)]


def _one(
    subject: Subject, arm: str, seed: int, sets: dict[str, Rows], target: float, settings: Settings
) -> dict[str, Any]:
    """One optimizer, one seed: train, and look around."""
    steps = descend_to(
        subject, sets["taught"], _stepper(subject, arm, seed), target, seed=seed, max_steps=400
    )
    end = subject.copy()
    update = {n: t - subject.start[n] for n, t in end.items()}
    distance = sum(float(t.square().sum()) for t in update.values()) ** 0.5
    looked = {k: sets[k] for k in ("taught", "others")}
    here = {k: subject.loss(rows) for k, rows in looked.items()}
    with torch.no_grad():
        now = torch.log_softmax(subject.logits(sets["others"])[0], dim=-1)
        subject.set(subject.start)
        base = torch.log_softmax(subject.logits(sets["others"])[0], dim=-1)
        subject.set(end)
    drawn = [
        _along(subject, end, _random_direction(end, 1000 * seed + k), RANDOM_ALPHAS, looked)
        for k in range(1 if settings.quick else NUM_DIRECTIONS)
    ]
    own = _along(subject, end, update, OWN_ALPHAS, looked)
    found: dict[str, Any] = {
        "steps": steps,
        "distance": distance,
        "untaught_loss": subject.loss(sets["untaught"]),
        "kl": float((base.exp() * (base - now)).sum(dim=-1).mean()),
    }
    for name in looked:
        random_curve = _mean([d[name] for d in drawn])
        found[f"{name}_loss"] = here[name]
        found[f"{name}_random"] = random_curve
        found[f"{name}_own"] = own[name]
        found[f"{name}_random_curvature"] = _curvature(RANDOM_ALPHAS, random_curve, here[name], RANDOM_H)
        found[f"{name}_own_curvature"] = _curvature(OWN_ALPHAS, own[name], here[name], OWN_H)
        found[f"{name}_own_curvature_per_length"] = found[f"{name}_own_curvature"] / distance**2
    return found


def _sets(subject: Subject, seed: int) -> dict[str, Rows]:
    """What is taught, directions like it that are not, and other requests; drawn by the seed."""
    draw = random.Random(seed)
    directions = draw.sample(subject.directions(), 2 * NUM_TAUGHT)
    return {
        "taught": Rows(directions[:NUM_TAUGHT]),
        "untaught": Rows(directions[NUM_TAUGHT:]),
        "others": Rows(draw.sample(subject.others(), NUM_OTHER)),
    }


def measure(settings: Settings) -> dict[str, Any]:
    """Per optimizer and seed: distance, KL, curvatures, and the curves; and ratios to APOLLO, seed by seed."""
    torch.set_num_threads(THREADS)
    subject = Subject(settings.model)
    share = 0.9 if settings.quick else 0.05
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    targets: list[float] = []
    with one_chunk_training():
        for seed in range(2 if settings.quick else 5):
            sets = _sets(subject, seed)
            subject.set(subject.start)
            targets.append(share * subject.loss(sets["taught"]))
            for arm in ARMS:
                runs[arm].append(_one(subject, arm, seed, sets, targets[-1], settings))
                last = runs[arm][-1]
                say(
                    f"seed {seed}, {arm}: {last['steps']} steps, distance {last['distance']:.2f}, curvature "
                    f"{last['taught_random_curvature']:.3g} random, {last['taught_own_curvature']:.3g} own"
                )
    return {
        "lr": LR,
        "rank": RANK,
        "seeds": len(targets),
        "num_taught": NUM_TAUGHT,
        "num_other": NUM_OTHER,
        "num_directions": NUM_DIRECTIONS,
        "target": spread(targets),
        "random_alphas": list(RANDOM_ALPHAS),
        "own_alphas": list(OWN_ALPHAS),
        "arms": {arm: _summary(found, runs["apollo"]) for arm, found in runs.items()},
    }


def _summary(runs: list[dict[str, Any]], apollo: list[dict[str, Any]]) -> dict[str, Any]:
    """Spreads of all figures over the seeds, their ratios to APOLLO's, and the curves with their spread."""
    figures: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for key, value in runs[0].items():
        values = [r[key] for r in runs]
        if isinstance(value, list):
            curves[key] = [spread(list(at)) for at in zip(*values, strict=True)]
        else:
            figures[key] = spread(values)
            ratios[key] = ratio(values, [r[key] for r in apollo])
    return {"figures": figures, "ratio_to_apollo": ratios, "curves": curves}
