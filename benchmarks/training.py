"""A step of the trainer against TRL's trainers, the usual loop, and the limit of what any such step must do.

One random 15M-parameter hybrid, the same fp32 weights, examples and thread for all; k answers to one context are k
rows of TRL's batch. Every turn times each of:

ours           `train_step` with APOLLO on an fp32 arena; `ours_bf16`: on a bf16 one, as a server holds it;
               `ours_recomputed`: with the layers recomputed in backward, as TRL's defaults do
trl            SFTTrainer's (DPOTrainer's) own `training_step` in fp32 without gradient checkpointing, its fastest;
               then AdamW (fused), and APOLLO in its dense form, on the same gradients, each timed alone
trl_default    the same with TRL's defaults: bf16 autocast and gradient checkpointing, its smallest
plain          transformers' own loss on whole rows (context labels -100), backward, AdamW (fused)
parts          what the limit is the sum of, each alone: reading the context without gradients, forward and
               backward of the answers on the state after it, the update; in transformers' plain way (dense
               gradients) and in ours (factors), of which the faster counts. Also with fused AdamW as the update,
               which keeps a state of the weights' size twice over

Memory is the peak of torch's allocations during a step above its start; weights and optimizer state exist before.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import models
import torch
import trl_peer
from common import THREADS, Settings, peak_bytes, ratio, say, spread, timed, total, turns
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from secondnature.model.upcast import collect
from secondnature.records import Example, OptimizerSettings
from secondnature.train.apollo import Apollo
from secondnature.train.optimizer import ApolloOptimizer
from secondnature.train.prefix import continuation_logps, freeze
from secondnature.train.step import references, train_step

POINTS = ((512, 64, 1), (2048, 64, 1), (2048, 64, 4), (2048, 64, 8))
"""(context tokens, answer tokens, answers to that context)."""
PAIRS = ((512, 64), (2048, 64))
QUICK_POINTS, QUICK_PAIRS = ((96, 32, 1), (96, 32, 2)), ((96, 32),)
TINY_RATE = 1e-9
"""So small that the weights stay what they are, however often a step is made."""

Times = dict[str, dict[str, list[float]]]


def answers(
    size: models.Size, context: int, answer: int, count: int, *, pairs: bool = False
) -> list[Example]:
    """`count` answers (pairs of answers) to one context, all of random tokens."""
    ids = partial(models.random_ids, size.vocabulary)
    context_ids = ids(context, seed=1)
    return [
        Example(
            context_ids=context_ids,
            continuation_ids=ids(answer, seed=2 + 2 * i),
            rejected_ids=ids(answer, seed=3 + 2 * i) if pairs else None,
        )
        for i in range(count)
    ]


class Ours:
    """The trainer's step on an arena."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.arena, self.model = models.in_arena(directory, dtype)
        self.optimizer = Apollo(self.model, OptimizerSettings(lr=TINY_RATE), track=False)

    def step(
        self, batch: Sequence[Example], objective: Any = "sft", before: Any = None, *, recompute: bool = False
    ) -> None:
        options: dict[str, Any] = {"references": before, "learned_loss": 0.0, "recompute": recompute}
        train_step(self.model, self.optimizer, batch, objective, **options)


class _Dense:
    """A model of transformers' own with gradients in `grad`; AdamW and dense APOLLO step on the same ones."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(True)
        parameters = list(model.parameters())
        self._adamw = torch.optim.AdamW(parameters, lr=TINY_RATE, fused=True)
        tied = [(n, p) for n, p in model.named_parameters() if n.endswith("embed_tokens.weight")]
        rest = [(n, p) for n, p in model.named_parameters() if not n.endswith("embed_tokens.weight")]
        groups: list[dict[str, Any]] = [{"params": rest}, {"params": tied, "rule": "floored"}]
        self._apollo = ApolloOptimizer(groups, lr=TINY_RATE, rank=OptimizerSettings().rank)

    def turn(self, gradients: Callable[[], object], optimizers: Sequence[str]) -> dict[str, float]:
        """Seconds of the gradients, and of each optimizer's step on them."""
        self.clear()
        found = {"gradients": timed(gradients)}
        for name in optimizers:
            found[name] = timed(self._adamw.step if name == "adamw" else self._apollo.step)
        self.clear()
        return found

    def peak_bytes(self, gradients: Callable[[], object]) -> float:
        """Of the gradients and AdamW's step."""
        self.clear()

        def work() -> None:
            gradients()
            self._adamw.step()

        found = peak_bytes(work)
        self.clear()
        return found

    def make_state(self) -> None:
        """AdamW's, by a step of no length."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._adamw.step()
        self.clear()

    def clear(self) -> None:
        """No gradients in memory."""
        for parameter in self.model.parameters():
            parameter.grad = None


def whole_loss(model: Any, batch: Sequence[Example]) -> Tensor:
    """transformers' loss over whole rows of one length; the context's labels are -100."""
    ids = torch.tensor([e.context_ids + e.continuation_ids for e in batch])
    labels = ids.clone()
    labels[:, : len(batch[0].context_ids)] = -100
    return model(input_ids=ids, labels=labels, use_cache=False).loss


class _Parts:
    """The steps' parts, each timed alone."""

    def __init__(self, ours: Ours, plain: _Dense, batch: Sequence[Example]) -> None:
        self._ours, self._plain, self._batch = ours, plain, batch
        self._context = batch[0].context_ids
        self._answers = [e.continuation_ids for e in batch]
        self._stock_prefix = freeze(plain.model, self._context)
        self._prefix = freeze(ours.model, self._context)

    @torch.no_grad()
    def _prefill(self) -> None:
        model: Any = self._plain.model
        ids = torch.tensor([self._context[:-1]])
        model.base_model(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True)

    def _stock_pass(self) -> None:
        """transformers' model on the frozen state, its logits, torch's cross-entropy, dense gradients."""
        model: Any = self._plain.model
        ids = torch.tensor([[self._context[-1], *a[:-1]] for a in self._answers])
        cache = self._stock_prefix.cache(len(ids))
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        F.cross_entropy(logits.flatten(0, 1), torch.tensor(self._answers).flatten()).backward()

    def _pass(self) -> None:
        logps = continuation_logps(self._ours.model, self._prefix, self._answers)
        (-torch.stack([x.mean() for x in logps]).mean()).backward()

    def turn(self) -> dict[str, float]:
        """Seconds of each."""
        found = {"stock_prefill": timed(self._prefill)}
        found["prefill"] = timed(partial(freeze, self._ours.model, self._context))
        stock = self._plain.turn(self._stock_pass, ["adamw", "apollo"])
        found["stock_pass"], found["stock_update"] = stock["gradients"], stock["apollo"]
        found["adamw_update"] = stock["adamw"]
        optimizer = self._ours.optimizer
        with collect(self._ours.model, factored=optimizer.factored) as gradients:
            found["pass"] = timed(self._pass)
        found["update"] = timed(partial(optimizer.step, gradients))
        return found


def _middle(values: Sequence[float]) -> float:
    return spread(values)["median"]


def _limits(parts: Mapping[str, list[float]]) -> tuple[str, list[float], list[float]]:
    """The faster way's name; turn by turn the sum of its parts, and the same with AdamW's update."""
    prefill = min(parts["prefill"], parts["stock_prefill"], key=_middle)
    ways = {
        "plain": total(prefill, parts["stock_pass"], parts["stock_update"]),
        "ours": total(prefill, parts["pass"], parts["update"]),
    }
    way = min(ways, key=lambda w: _middle(ways[w]))
    return way, ways[way], total(prefill, parts["stock_pass"], parts["adamw_update"])


def _spreads(times: Times) -> dict[str, dict[str, dict[str, float]]]:
    return {name: {key: spread(v) for key, v in parts.items()} for name, parts in times.items()}


def _over(times: Times) -> dict[str, dict[str, float]]:
    """The peers' whole steps over ours: how many times as long they take."""
    ours = times["ours"]["step"]
    found: dict[str, dict[str, float]] = {}
    for name in ("trl", "trl_default", "plain"):
        for optimizer in ("adamw", "apollo"):
            if optimizer in times.get(name, {}):
                whole = total(times[name]["gradients"], times[name][optimizer])
                found[f"{name}_{optimizer}"] = ratio(whole, ours)
    return found


def _trl(
    directory: Path, batch: Sequence[Example], objective: str, folder: Path
) -> list[tuple[trl_peer.TrlStep, _Dense]]:
    """TRL's trainer at its fastest, and with its defaults; each with the optimizers for its model."""
    found = [
        trl_peer.TrlStep(models.stock(directory), batch, objective, folder / name, defaults=defaults)
        for name, defaults in (("trl", False), ("default", True))
    ]
    return [(step, _Dense(step.model)) for step in found]


def _point(
    directory: Path, size: models.Size, point: tuple[int, int, int], settings: Settings, folder: Path
) -> dict[str, Any]:
    """One (context, answer, answers): times, ratios, limit, memory."""
    context, answer, count = point
    batch = answers(size, context, answer, count)
    ours, narrow = Ours(directory, torch.float32), Ours(directory, torch.bfloat16)
    plain = _Dense(models.stock(directory))

    def plain_gradients() -> None:
        whole_loss(plain.model, batch).backward()

    parts = _Parts(ours, plain, batch)
    contenders: dict[str, Callable[[], Mapping[str, float]]] = {
        "ours": lambda: {"step": timed(partial(ours.step, batch))},
        "parts": parts.turn,
        "ours_bf16": lambda: {"step": timed(partial(narrow.step, batch))},
        "ours_recomputed": lambda: {"step": timed(partial(ours.step, batch, recompute=True))},
        "plain": lambda: plain.turn(plain_gradients, ["adamw"]),
    }
    peaks: dict[str, Callable[[], float]] = {
        "ours": lambda: peak_bytes(partial(ours.step, batch)),
        "ours_bf16": lambda: peak_bytes(partial(narrow.step, batch)),
        "ours_recomputed": lambda: peak_bytes(partial(ours.step, batch, recompute=True)),
        "plain": lambda: plain.peak_bytes(plain_gradients),
    }
    if trl_peer.HAS_TRL:
        (trl, dense), (default, default_dense) = _trl(directory, batch, "sft", folder)
        contenders["trl"] = lambda: dense.turn(trl.gradients, ["adamw", "apollo"])
        peaks["trl"] = lambda: dense.peak_bytes(trl.gradients)
        if count == 1:  # its time at the others would take minutes
            contenders["trl_default"] = lambda: default_dense.turn(default.gradients, ["adamw"])
        else:
            default_dense.make_state()
        peaks["trl_default"] = lambda: default_dense.peak_bytes(default.gradients)
    times = turns(contenders, settings.repeats, warm=point == POINTS[0])
    memory = {name: peak() for name, peak in peaks.items()}
    way, limit, cheapest = _limits(times["parts"])
    found = {
        "context": context,
        "answer": answer,
        "answers": count,
        "seconds": _spreads(times),
        "over_ours": _over(times),
        "limit": spread(limit),
        "limit_way": way,
        "share_of_limit": ratio(limit, times["ours"]["step"]),
        "share_with_adamw": ratio(cheapest, times["ours"]["step"]),
        "peak_bytes": memory,
        "memory_ratio": {k: memory["ours"] / v for k, v in memory.items() if not k.startswith("ours")},
        "recomputed_ratio": {
            k: memory["ours_recomputed"] / v for k, v in memory.items() if k.startswith("trl")
        },
    }
    say(
        f"C {context}, T {answer}, k {count}: ours {found['seconds']['ours']['step']['median']:.2f} s, "
        f"{found['share_of_limit']['median']:.0%} of the limit; "
        + ", ".join(f"{k} {v['median']:.2f}x" for k, v in found["over_ours"].items())
        + "; memory of theirs "
        + ", ".join(f"{k} {v:.3f}" for k, v in found["memory_ratio"].items())
    )
    return found


def _pair(
    directory: Path, size: models.Size, shape: tuple[int, int], settings: Settings, folder: Path
) -> dict[str, Any]:
    """One DPO pair: times, ratios, memory; reference log-probabilities are known to both."""
    batch = answers(size, *shape, 1, pairs=True)
    ours = Ours(directory, torch.float32)
    step = partial(ours.step, batch, "dpo", references(ours.model, batch))
    contenders: dict[str, Callable[[], Mapping[str, float]]] = {"ours": lambda: {"step": timed(step)}}
    peaks: dict[str, Callable[[], float]] = {"ours": lambda: peak_bytes(step)}
    if trl_peer.HAS_TRL:
        (trl, dense), (default, default_dense) = _trl(directory, batch, "dpo", folder)
        contenders["trl"] = lambda: dense.turn(trl.gradients, ["adamw", "apollo"])
        contenders["trl_default"] = lambda: default_dense.turn(default.gradients, ["adamw"])
        peaks["trl"] = lambda: dense.peak_bytes(trl.gradients)
        peaks["trl_default"] = lambda: default_dense.peak_bytes(default.gradients)
    times = turns(contenders, settings.repeats)
    memory = {name: peak() for name, peak in peaks.items()}
    found = {
        "context": shape[0],
        "answer": shape[1],
        "seconds": _spreads(times),
        "over_ours": _over(times),
        "peak_bytes": memory,
        "memory_ratio": {k: memory["ours"] / v for k, v in memory.items() if k != "ours"},
    }
    over = ", ".join(f"{k} {v['median']:.2f}x" for k, v in found["over_ours"].items())
    say(f"pair, C {shape[0]}: ours {found['seconds']['ours']['step']['median']:.2f} s; {over}")
    return found


def measure(settings: Settings) -> dict[str, Any]:
    """SFT at four points, DPO pairs at two."""
    torch.set_num_threads(THREADS)
    size = models.TINY if settings.quick else models.SMALL
    points, pairs = (QUICK_POINTS, QUICK_PAIRS) if settings.quick else (POINTS, PAIRS)
    longest = max(c + t for c, t, _ in points)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        directory = models.save(size, folder / "model", max_tokens=longest)
        return {
            "parameters": models.num_parameters(models.stock(directory)),
            "rank": OptimizerSettings().rank,
            "rows": [_point(directory, size, point, settings, folder) for point in points],
            "pairs": [_pair(directory, size, shape, settings, folder) for shape in pairs],
        }
