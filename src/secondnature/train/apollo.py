"""APOLLO: Adam's adaptive steps from moments of a random projection, written into the weights in place (trainer).

From the paper (Zhu et al. 2024, arXiv 2412.05270), dense form: for a gradient G (M, N), M <= N, and signs
P (R, M) / sqrt(R), Adam's moments are kept of P G (R, N) only. The update is the raw gradient, scaled per
channel j by ||S_j|| / ||(P G)_j|| with S the Adam step of the projection (for R = 1, APOLLO-Mini, by one scalar),
and by alpha = scale * sqrt(M / R), which makes it as long as Adam's. What is no such matrix takes Adam itself.

Differences, each against a measured defect: projections are signs from a counter-based generator keyed by (seed,
tensor name, epoch), regenerated and never stored; moments are fp32; the bias is corrected before the limiter, not
after it; the limiter's memory has a floor, and a gradient of zero leaves no trace, so neither can freeze a tensor.
A step is planned for all tensors, checked, and only then written, with stochastic rounding (law 4).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from secondnature.errors import BadCheckpoint, ConfigError
from secondnature.records import Moved, OptimizerSettings
from secondnature.train.guard import check_tensors
from secondnature.weights.rounding import RandomWords, stochastic_round_

__all__ = ["Apollo", "projection"]

FORMAT = "apollo/1"
DEFAULT_LR = 1e-5
DENOMINATOR_FLOOR = 0.1
"""Adam's denominator is at least this share of its root mean square over the tensor, where `floored`."""

Rule = Literal["apollo", "adam", "floored", "rows"]
"""How a tensor is updated.

apollo: matrices whose smaller side exceeds the rank. adam: the rest (norms, biases, convolutions, small matrices).
floored: Adam, elements with a gradient far below the tensor's take proportionally smaller steps instead of full
ones. For A_log and dt_bias, whose tiny gradients are mostly rounding noise of the chunked delta rule; and for an
embedding that is tied to the head, where the softmax gives every token of the vocabulary some gradient.
rows: Adam on those rows of an embedding that have a gradient; the others keep weights and moments to the bit.
"""


@dataclass(frozen=True)
class _State:
    """What is remembered of one tensor; a value, replaced as a whole when a step is written."""

    m: Tensor
    v: Tensor
    steps: Tensor
    """How many gradients it has seen: a scalar (int64), or per row."""
    level: float = 0.0
    """Norm of the last update in units of the learning rate, for the limiter."""


def projection(seed: int, name: str, epoch: int, rank: int, size: int) -> Tensor:
    """The (rank, size) matrix of signs / sqrt(rank) of one tensor and epoch; the same on every machine."""
    words = RandomWords("project", seed, name, epoch)(-(-rank * size // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8))[: rank * size]
    signs = torch.from_numpy(bits.astype(np.float32) * 2 - 1)
    return signs.view(rank, size) / math.sqrt(rank)


class Apollo:
    """The optimizer of one model: rules, moments and what has been moved.

    Args:
        model: made by `model.load.build`; its parameters are written in place.
        settings: `lr: None` means 1e-5.
        seed: of projections and rounding. It belongs to the state: `load_state` brings its own.
        track: also sum the intended, un-rounded updates (the task vector, fp32).

    Raises:
        ConfigError: the rank fits no matrix of the model.
    """

    def __init__(
        self, model: nn.Module, settings: OptimizerSettings, *, seed: int = 0, track: bool = True
    ) -> None:
        self.parameters: dict[str, Tensor] = {n: p.data for n, p in model.named_parameters()}
        self.settings = settings
        self.lr = DEFAULT_LR if settings.lr is None else settings.lr
        self.seed = seed
        self.steps = 0
        self.rules = _rules(model, settings.rank)
        if "apollo" not in self.rules.values():
            largest = max((min(p.shape) for p in self.parameters.values() if p.ndim == 2), default=0)
            raise ConfigError(
                f"rank {settings.rank} fits no matrix of the model; the largest has a smaller side of {largest}",
                f"choose a rank below {largest}",
            )
        self.task_vector: dict[str, Tensor] | None = {} if track else None
        self._states: dict[str, _State] = {}
        self._norms_before: dict[str, float] = {}
        self._noise: dict[str, float] = {}

    def step(
        self,
        gradients: Mapping[str, Tensor],
        *,
        writing: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        """One update from fp32 gradients by parameter name; `writing()` brackets the writes.

        The gradients' memory is used up. Tensors without a gradient, or with a gradient of zero, stay as they are.

        Raises:
            NonFinite: an update is not finite; names the tensor, and neither weights nor moments were changed.
        """
        step = self.steps + 1
        lr = self.lr * min(1.0, step / max(1, self.settings.warmup_steps))
        updates: dict[str, Tensor] = {}
        states: dict[str, _State] = {}
        for name in self.parameters:
            gradient = gradients.get(name)
            if gradient is None or not bool(gradient.any()):
                continue
            direction, states[name] = self._direction(name, gradient.to(torch.float32))
            updates[name] = self._decay_(name, direction).mul_(-lr)
        check_tensors(updates, "the update")
        with writing():
            for name, update in updates.items():
                self._write(name, update, step)
        self._states.update(states)
        self.steps = step

    def _direction(self, name: str, gradient: Tensor) -> tuple[Tensor, _State]:
        """The step in units of the learning rate, uphill, in the gradient's memory; and the state after it."""
        rule = self.rules[name]
        if rule == "apollo":
            return self._apollo(name, gradient)
        if rule == "rows":
            return self._adam_rows(name, gradient)
        old = self._state(name, gradient.shape, torch.zeros((), dtype=torch.int64))
        state, step = self._adam(old, gradient, floored=rule == "floored")
        return gradient.copy_(step), state

    def _state(self, name: str, shape: torch.Size | tuple[int, ...], steps: Tensor) -> _State:
        state = self._states.get(name)
        if state is None:
            device = self.parameters[name].device
            zeros = torch.zeros(shape, dtype=torch.float32, device=device)
            state = _State(zeros, zeros, steps.to(device))
        return state

    def _adam(self, old: _State, gradient: Tensor, *, floored: bool = False) -> tuple[_State, Tensor]:
        """Adam's moments after `gradient`, and its bias-corrected step. Kingma & Ba 2014, arXiv 1412.6980."""
        beta1, beta2 = self.settings.betas
        steps = old.steps + 1
        m = old.m * beta1 + gradient * (1 - beta1)
        v = old.v * beta2 + gradient * gradient * (1 - beta2)
        # per-row counts broadcast over the columns
        count = steps.to(torch.float64).reshape(-1, *[1] * (m.ndim - 1)) if steps.ndim else steps.double()
        spread = (v / (1 - beta2**count).float()).sqrt_()
        if floored:
            spread.clamp_(min=DENOMINATOR_FLOOR * float(spread.square().mean().sqrt()))
        step = m / (1 - beta1**count).float() / (spread + self.settings.eps)
        return replace(old, m=m, v=v, steps=steps), step

    def _adam_rows(self, name: str, gradient: Tensor) -> tuple[Tensor, _State]:
        """Adam on the rows that have a gradient, each with its own count."""
        old = self._state(name, gradient.shape, torch.zeros(gradient.shape[0], dtype=torch.int32))
        rows = gradient.ne(0).any(dim=1).nonzero().squeeze(1)
        seen = _State(old.m[rows], old.v[rows], old.steps[rows])
        new, step = self._adam(seen, gradient[rows])
        gradient[rows] = step
        state = replace(
            old,
            m=old.m.index_copy(0, rows, new.m),
            v=old.v.index_copy(0, rows, new.v),
            steps=old.steps.index_copy(0, rows, new.steps),
        )
        return gradient, state

    def _apollo(self, name: str, gradient: Tensor) -> tuple[Tensor, _State]:
        """Algorithm 1 of the paper for one matrix."""
        g_MN = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
        num_small, num_channels = g_MN.shape
        rank = self.settings.rank
        old = self._state(name, (rank, num_channels), torch.zeros((), dtype=torch.int64))
        epoch = int(old.steps) // self.settings.proj_refresh
        p_RM = projection(self.seed, name, epoch, rank, num_small).to(gradient)
        r_RN = p_RM @ g_MN
        state, s_RN = self._adam(old, r_RN)
        if rank == 1:
            stepped, raw = s_RN.norm(), r_RN.norm()
        else:
            stepped, raw = s_RN.norm(dim=0), r_RN.norm(dim=0)
        scale_N = torch.where(raw > 0, stepped / raw, torch.zeros_like(raw))
        g_MN.mul_(scale_N * (self.settings.scale * math.sqrt(num_small / rank)))
        level = self._limit_(g_MN, old.level)
        return gradient, replace(state, level=level)

    def _limit_(self, update: Tensor, level: float) -> float:
        """The norm-growth limiter: at most `norm_growth_limit` times the last norm; returns the new norm.

        The last norm counts as no less than Adam's on pure noise, sqrt((1 - beta1) / (1 + beta1)) per element.
        """
        norm = float(update.norm())
        beta1 = self.settings.betas[0]
        noise = self.settings.scale * math.sqrt(update.numel() * (1 - beta1) / (1 + beta1))
        limit = self.settings.norm_growth_limit * max(level, noise)
        if level > 0 and norm > limit:
            update.mul_(limit / norm)
            return limit
        return norm

    def _decay_(self, name: str, direction: Tensor) -> Tensor:
        """Decoupled weight decay, for matrices, where there is a step."""
        if self.settings.weight_decay and direction.ndim >= 2:
            decay = self.parameters[name].to(direction.dtype) * self.settings.weight_decay
            if self.rules[name] == "rows":
                decay *= direction.ne(0).any(dim=1, keepdim=True)
            direction.add_(decay)
        return direction

    def _write(self, name: str, update: Tensor, step: int) -> None:
        parameter = self.parameters[name]
        if self.task_vector is None:
            stochastic_round_(parameter, update, seed=self.seed, name=name, step=step)
            return
        if name not in self.task_vector:
            self.task_vector[name] = torch.zeros_like(update)
            self._norms_before[name] = float(parameter.float().norm())
            self._noise[name] = 0.0
        written = stochastic_round_(parameter, update, seed=self.seed, name=name, step=step)
        self._noise[name] += written**2 - float(update.norm()) ** 2
        self.task_vector[name].add_(update)

    def moved(self) -> list[Moved]:
        """Per tensor how far it was meant to move since this object was made, and how far the bytes went.

        `written` follows from the steps: rounding errors are independent with mean zero, so their squares add up.
        """
        assert self.task_vector is not None, "made with track=False"
        found: list[Moved] = []
        for name, total in self.task_vector.items():
            intended, before = float(total.norm()), self._norms_before[name]
            layer = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
            found.append(
                Moved(
                    name=name,
                    layer=int(layer[1]) if layer else None,
                    intended=intended,
                    relative=intended / before if before > 0 else 0.0,
                    written=math.sqrt(max(0.0, intended**2 + self._noise[name])),
                )
            )
        return found

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(tensors, metadata) for a safetensors file: all that the next step depends on, apart from the weights."""
        tensors: dict[str, Tensor] = {}
        for name, state in self._states.items():
            tensors[f"{name}:m"], tensors[f"{name}:v"] = state.m, state.v
            tensors[f"{name}:steps"] = state.steps
            tensors[f"{name}:level"] = torch.tensor(state.level, dtype=torch.float64)
        about = {"seed": self.seed, "steps": self.steps, "settings": self.settings.model_dump(mode="json")}
        return tensors, {"format": FORMAT, "apollo": json.dumps(about, sort_keys=True)}

    def load_state(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Continue where `state_dict` was taken, to the bit. The settings stay this object's own.

        Raises:
            BadCheckpoint: the state is of another format, model or rank; nothing was changed.
        """
        hint = "start from a fresh optimizer state"
        if metadata.get("format") != FORMAT:
            raise BadCheckpoint(
                f"optimizer state has format {metadata.get('format')!r}; expected {FORMAT!r}", hint
            )
        try:
            about = json.loads(metadata["apollo"])
            seed, steps = int(about["seed"]), int(about["steps"])
        except (KeyError, ValueError, TypeError) as e:
            raise BadCheckpoint(f"optimizer state has broken metadata ({e!r})", hint) from None
        states: dict[str, _State] = {}
        for name in sorted({key.rpartition(":")[0] for key in tensors}):
            parts = {part: tensors.get(f"{name}:{part}") for part in ("m", "v", "steps", "level")}
            m, v, count, level = parts["m"], parts["v"], parts["steps"], parts["level"]
            if name not in self.parameters or m is None or v is None or count is None or level is None:
                raise BadCheckpoint(f"optimizer state of {name!r} is incomplete or of another model", hint)
            if not m.shape == v.shape == self._moment_shape(name) or m.dtype != torch.float32:
                wanted = self._moment_shape(name)
                raise BadCheckpoint(
                    f"optimizer state of {name} has shape {tuple(m.shape)}; expected {wanted}", hint
                )
            device = self.parameters[name].device
            states[name] = _State(
                m.to(device, copy=True), v.to(device, copy=True), count.to(device, copy=True), float(level)
            )
        self._states, self.seed, self.steps = states, seed, steps

    def _moment_shape(self, name: str) -> tuple[int, ...]:
        shape = self.parameters[name].shape
        return (self.settings.rank, max(shape)) if self.rules[name] == "apollo" else tuple(shape)


def _rules(model: nn.Module, rank: int) -> dict[str, Rule]:
    """Which rule each parameter follows."""
    uses: dict[int, int] = {}
    embeddings: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
                if isinstance(module, nn.Embedding):
                    embeddings.add(id(parameter))
    rules: dict[str, Rule] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings:
            rules[name] = "floored" if uses[id(parameter)] > 1 else "rows"
        elif name.endswith((".A_log", ".dt_bias")):
            rules[name] = "floored"
        else:
            rules[name] = "apollo" if parameter.ndim == 2 and min(parameter.shape) > rank else "adam"
    return rules
