"""One optimizer step at the shapes of a 50M-parameter transformer: APOLLO here, the public APOLLO, AdamW, SGD.

The gradient of every matrix is that of 64 tokens, dY^T X. In the dense form it is formed first, and forming it is
timed apart from the step; in the factored form there is no forming, the factors go to the step. So "with gradient
work" compares what a training step pays once backward has dY and X. All fp32, one thread, each contender on weights
of its own, turn by turn. APOLLO's projections are drawn at the first turn by the public package, which is not timed
(it draws them anew every 200 steps), and at every step here, which is.

State is what an optimizer keeps between steps: moments, and projections where they are kept.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from common import THREADS, Settings, ratio, say, spread, timed, total, turns
from torch import Tensor, nn

from secondnature.model.gradients import Factors, Gradient
from secondnature.records import OptimizerSettings
from secondnature.train.apollo import Apollo
from secondnature.train.optimizer import ApolloOptimizer

TOKENS = 64
HIDDEN, INNER, LAYERS = 640, 1728, 10
RANKS = (OptimizerSettings().rank, 64, 256)
"""The default here, a common choice, the public package's default."""
RATE = 1e-9
HAS_APOLLO = importlib.util.find_spec("apollo_torch") is not None


class Block(nn.Module):
    """The parameters of a transformer's layer."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        linear = partial(nn.Linear, bias=False)
        self.query, self.key = linear(hidden, hidden), linear(hidden, hidden)
        self.value, self.out = linear(hidden, hidden), linear(hidden, hidden)
        self.gate, self.up, self.down = (
            linear(hidden, inner),
            linear(hidden, inner),
            linear(inner, hidden),
        )
        self.norms = nn.ParameterList([nn.Parameter(torch.ones(hidden)) for _ in range(2)])


class Work:
    """dY and X of every matrix, gradients of the rest, and one set of buffers for dense gradients."""

    def __init__(self, model: nn.Module) -> None:
        source = torch.Generator().manual_seed(0)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.dense: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                rows, columns = parameter.shape
                left = torch.randn((TOKENS, rows), generator=source) * 1e-3
                self.factors[name] = (left, torch.randn((TOKENS, columns), generator=source))
                self.dense[name] = torch.empty_like(parameter)
            else:
                self.dense[name] = torch.randn(parameter.shape, generator=source) * 1e-3

    def form(self) -> None:
        """Dense gradients from their factors."""
        for name, (left, right) in self.factors.items():
            torch.mm(left.T, right, out=self.dense[name])

    def as_factors(self) -> dict[str, Gradient]:
        """Gradients as the trainer's backward leaves them."""
        whole = {n: t for n, t in self.dense.items() if n not in self.factors}
        return {**whole, **{n: Factors(left, right) for n, (left, right) in self.factors.items()}}


def _new_model(settings: Settings) -> nn.Module:
    sizes = (64, 160, 2) if settings.quick else (HIDDEN, INNER, LAYERS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleList([Block(sizes[0], sizes[1]) for _ in range(sizes[2])])


class Dense:
    """An optimizer of torch's kind on a model of its own; its gradients lie in the shared buffers."""

    def __init__(self, model: nn.Module, work: Work, make: Callable[[nn.Module], Any]) -> None:
        self.work, self.optimizer = work, make(model)
        for name, parameter in model.named_parameters():
            parameter.grad = work.dense[name]

    def turn(self) -> dict[str, float]:
        """Forming the gradients, and the step."""
        return {"form": timed(self.work.form), "step": timed(self.optimizer.step)}

    def state_bytes(self) -> dict[str, int]:
        """Of moments, and of what else is kept."""
        moments = other = 0
        for held in self.optimizer.state.values():
            for key, value in held.items():
                size = _bytes(value)
                if key in ("m", "v", "exp_avg", "exp_avg_sq"):
                    moments += size
                else:
                    other += size
        return {"moments": moments, "other": other}


class Factored:
    """The trainer's optimizer, on gradients that stay factors."""

    def __init__(self, model: nn.Module, work: Work, rank: int) -> None:
        self.work = work
        self.optimizer = Apollo(model, OptimizerSettings(lr=RATE, rank=rank), track=False)

    def turn(self) -> dict[str, float]:
        """The step; nothing is formed."""
        gradients = self.work.as_factors()
        return {"step": timed(lambda: self.optimizer.step(gradients))}

    def state_bytes(self) -> dict[str, int]:
        """Of moments, and of what else is kept."""
        tensors, _ = self.optimizer.state_dict()
        sizes = {True: 0, False: 0}
        for name, tensor in tensors.items():
            sizes[name.endswith((":m", ":v"))] += tensor.nbytes
        return {"moments": sizes[True], "other": sizes[False]}

    def largest_share(self) -> float:
        """Over all matrices the largest state, relative to 2 * rank * longer side floats."""
        tensors, _ = self.optimizer.state_dict()
        shares: list[float] = []
        for name in self.work.factors:
            held = sum(tensors[f"{name}:{part}"].nbytes for part in ("m", "v", "steps", "level"))
            allowed = 2 * self.optimizer.settings.rank * max(self.optimizer.parameters[name].shape) * 4
            shares.append(held / allowed)
        return max(shares)


def _bytes(value: Any) -> int:
    """Of a tensor, or of the tensors that an object holds."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return _sum(value.values())
    if isinstance(value, list | tuple):
        return _sum(value)
    return _sum(vars(value).values()) if hasattr(value, "__dict__") else 0


def _sum(values: Iterable[Any]) -> int:
    return sum(_bytes(v) for v in values)


def _public(model: nn.Module, rank: int) -> Any:
    """The public package's optimizer, as its page says to set it up."""
    apollo_torch: Any = importlib.import_module("apollo_torch")
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    low_rank = {
        "params": matrices,
        "rank": rank,
        "proj": "random",
        "scale_type": "tensor" if rank == 1 else "channel",
        "scale": 1,
        "update_proj_gap": 200,
        "proj_type": "std",
    }
    return apollo_torch.APOLLOAdamW([{"params": rest}, low_rank], lr=RATE, betas=(0.9, 0.999), eps=1e-8)


def _contenders(work: Work, ranks: Iterable[int], settings: Settings) -> dict[str, Dense | Factored]:
    """Every optimizer, each on a model of its own."""
    found: dict[str, Dense | Factored] = {}

    def dense(name: str, make: Callable[[nn.Module], Any]) -> None:
        found[name] = Dense(_new_model(settings), work, make)

    dense("sgd_fused", lambda m: torch.optim.SGD(m.parameters(), lr=RATE, fused=True))
    dense("adamw_fused", lambda m: torch.optim.AdamW(m.parameters(), lr=RATE, fused=True))
    dense("adamw_foreach", lambda m: torch.optim.AdamW(m.parameters(), lr=RATE, foreach=True))
    for rank in ranks:
        found[f"factored_{rank}"] = Factored(_new_model(settings), work, rank)
        dense(f"dense_{rank}", lambda m, r=rank: ApolloOptimizer(m.named_parameters(), lr=RATE, rank=r))
        if HAS_APOLLO:
            dense(f"public_{rank}", partial(_public, rank=rank))
    return found


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds and state of every contender; ours over the peers'."""
    torch.set_num_threads(THREADS)
    model = _new_model(settings)
    work = Work(model)
    ranks = (1, 4, 16) if settings.quick else (1, *RANKS)
    contenders = _contenders(work, ranks, settings)
    gc.collect()
    times = turns({name: c.turn for name, c in contenders.items()}, settings.repeats)
    whole = {n: total(*t.values()) for n, t in times.items()}
    rows: list[dict[str, Any]] = []
    for rank in ranks:
        factored = contenders[f"factored_{rank}"]
        assert isinstance(factored, Factored)
        row: dict[str, Any] = {
            "rank": rank,
            "dense_over_adamw": ratio(times[f"dense_{rank}"]["step"], times["adamw_fused"]["step"]),
            "factored_over_adamw": ratio(whole[f"factored_{rank}"], whole["adamw_fused"]),
            "state_over_bound": factored.largest_share(),
        }
        if HAS_APOLLO:
            row["factored_over_public"] = ratio(whole[f"factored_{rank}"], whole[f"public_{rank}"])
            row["dense_over_public"] = ratio(times[f"dense_{rank}"]["step"], times[f"public_{rank}"]["step"])
        rows.append(row)
        say(
            ", ".join(
                [
                    f"rank {rank}",
                    *(
                        f"{k} {v['median']:.2f}"
                        for k, v in row.items()
                        if "over_" in k and isinstance(v, dict)
                    ),
                ]
            )
        )
    shapes = sorted({tuple(p.shape) for p in model.parameters() if p.ndim == 2})
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "shapes": [[*shape, sum(p.shape == shape for p in model.parameters())] for shape in shapes],
        "tokens": TOKENS,
        "ranks": list(ranks),
        "seconds": {n: {k: spread(v) for k, v in t.items()} for n, t in times.items()},
        "with_gradient": {n: spread(v) for n, v in whole.items()},
        "state_bytes": {n: c.state_bytes() for n, c in contenders.items()},
        "rows": rows,
    }
