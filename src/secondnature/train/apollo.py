"""APOLLO: Adam's adaptive steps from moments of a random projection, written into the weights in place (trainer).

From the paper (Zhu et al. 2024, arXiv 2412.05270): for a gradient G (M, N), M <= N, and signs
P (R, M) / sqrt(R), Adam's moments are kept of P G (R, N) only. The update is the raw gradient, scaled per
channel j by ||S_j|| / ||(P G)_j|| with S the Adam step of the projection (for R = 1, APOLLO-Mini, by one scalar),
and by alpha = scale * sqrt(M / R), which makes it as long as Adam's. What is no such matrix takes Adam itself.

Differences, each against a measured defect: projections are signs from a counter-based generator keyed by (seed,
tensor name, epoch), regenerated and never saved; moments are fp32; the bias is corrected before the limiter, not
after it; the limiter's memory has a floor, and a gradient of zero leaves no trace, so neither can freeze a tensor.
A step is planned for all tensors, checked, and only then written, with stochastic rounding (law 4). Here is the
optimizer of a whole model; the arithmetic of one tensor, and the factored form, is in `update`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from secondnature.errors import BadCheckpoint, ConfigError
from secondnature.model.gradients import Gradient
from secondnature.records import Moved, OptimizerSettings
from secondnature.train.guard import check_norms
from secondnature.train.readback import Reading, together
from secondnature.train.sums import Sums
from secondnature.train.update import (
    Rule,
    TensorState,
    Update,
    fresh_state,
    moment_shape,
    planned_update,
    write_,
)
from secondnature.weights.rounding import overflow

__all__ = ["DEFAULT_LR", "Apollo", "fingerprint", "highest_rank", "state_bytes"]

FORMAT = "apollo/3"
DEFAULT_LR = 1e-5


def fingerprint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What tells one model's optimizer state from another's: a hash of all tensors' names and shapes."""
    lines = [f"{name} {','.join(map(str, shape))}" for name, shape in sorted(shapes.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


class Apollo:
    """The optimizer of one model: rules, moments and what has been moved.

    Args:
        model: made by `model.load.build`; its parameters are written in place.
        settings: `lr: None` means 1e-5.
        seed: of projections and rounding. It belongs to the state: `load_state` brings its own.
        track: also sum the intended, un-rounded updates (the task vector), which `moved` needs. It takes 4 bytes
            per parameter, as much as an fp32 copy of the model; without it a step holds no more than a chunk.
        folder: where the sums of a large model may lie, in a file that nobody sees (`sums`); None: in memory.

    Raises:
        ConfigError: the rank fits no matrix of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        *,
        seed: int = 0,
        track: bool = True,
        folder: Path | None = None,
    ) -> None:
        self.parameters: dict[str, Tensor] = {n: p.data for n, p in model.named_parameters()}
        self._device = next(iter(self.parameters.values())).device
        self._on_gpu = self._device.type == "cuda"
        self.settings = settings
        self.lr = DEFAULT_LR if settings.lr is None else settings.lr
        self.seed = seed
        self.steps = 0
        """Of the state, over all lessons: they key the rounding."""
        self._steps_before = 0
        """Of the state as it was loaded: the warm-up counts what is made since."""
        self.rules = _rules(model, settings.rank)
        if "apollo" not in self.rules.values():
            largest = highest_rank(model) + 1
            raise ConfigError(
                f"rank {settings.rank} fits no matrix of the model; the largest has a smaller side of {largest}",
                f"choose a rank below {largest}",
            )
        self.task_vector: dict[str, Tensor] | None = {} if track else None
        self._sums = Sums(folder)
        self._sums_bytes = 4 * sum(p.numel() for p in self.parameters.values())
        self._states: dict[str, TensorState] = {}
        self._fingerprint = fingerprint({n: tuple(p.shape) for n, p in self.parameters.items()})
        self._norms_before: dict[str, float] = {}
        self._noise: dict[str, float] = {}

    @property
    def factored(self) -> frozenset[str]:
        """What need not come whole: factors of the matrices that APOLLO updates, rows of an untied embedding."""
        return frozenset(name for name, rule in self.rules.items() if rule in ("apollo", "rows"))

    @torch.no_grad()
    def step(
        self,
        gradients: Mapping[str, Gradient],
        *,
        writing: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        use_up: bool = False,
    ) -> None:
        """One update from gradients by parameter name, whole or as factors; `writing()` brackets the writes.

        Tensors without a gradient, or with a gradient of zero, stay as they are. The gradients do too, unless
        `use_up` says that nobody needs them any more.

        Raises:
            NonFinite: an update is not finite; names the tensor, and neither weights nor moments were changed.
        """
        step = self.steps + 1
        lr = self.lr * min(1.0, (step - self._steps_before) / max(1, self.settings.warmup_steps))
        updates: dict[str, Update] = {}
        states: dict[str, TensorState] = {}
        names = [name for name in self.parameters if gradients.get(name) is not None]
        plans = together(
            (self._planned(name, gradients[name], use_up) for name in names), at_once=self._on_gpu
        )
        for name, planned in zip(names, plans, strict=True):
            if planned is not None:
                updates[name], states[name] = planned
        check_norms({name: update.norm for name, update in updates.items()}, "the update")
        flags = torch.zeros(len(updates), 1, dtype=torch.int32, device=self._device) if self._on_gpu else None
        with writing():
            for i, (name, update) in enumerate(updates.items()):
                self._write(name, update, lr, step, None if flags is None else flags[i])
            if flags is not None:
                for name, flag in zip(updates, flags.view(-1).tolist(), strict=True):
                    if flag:
                        raise overflow(name)
        self._states.update(states)
        self.steps = step

    def _planned(
        self, name: str, gradient: Gradient, use_up: bool
    ) -> Reading[tuple[Update, TensorState] | None]:
        rule, parameter = self.rules[name], self.parameters[name]
        state = self._states.get(name)
        if state is None:
            state = fresh_state(rule, parameter.shape, self.settings.rank, parameter.device)
        return planned_update(rule, gradient, state, self.settings, seed=self.seed, name=name, use_up=use_up)

    def _write(self, name: str, update: Update, lr: float, step: int, overflowed: Tensor | None) -> None:
        parameter, total = self.parameters[name], None
        if self.task_vector is not None:
            if name not in self.task_vector:
                self.task_vector[name] = self._sums.zeros(parameter, self._sums_bytes)
                self._norms_before[name] = float(torch.linalg.vector_norm(parameter, dtype=torch.float32))
                self._noise[name] = 0.0
            total = self.task_vector[name]
        noise = write_(
            parameter,
            update,
            lr=lr,
            weight_decay=self.settings.weight_decay,
            seed=self.seed,
            name=name,
            step=step,
            total=total,
            overflowed=overflowed,
        )
        if total is not None:
            self._noise[name] += noise

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
            if state.rows is not None:
                tensors[f"{name}:rows"] = state.rows
        about = {"seed": self.seed, "steps": self.steps, "settings": self.settings.model_dump(mode="json")}
        metadata = {"format": FORMAT, "fingerprint": self._fingerprint}
        return tensors, {**metadata, "apollo": json.dumps(about, sort_keys=True)}

    def load_state(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Continue where `state_dict` was taken, to the bit, by this object's own settings; a warm-up begins anew.

        Raises:
            BadCheckpoint: the state is of another format, model or rank; nothing was changed.
        """
        hint = "start from a fresh optimizer state"
        if metadata.get("format") != FORMAT:
            raise BadCheckpoint(
                f"optimizer state has format {metadata.get('format')!r}; expected {FORMAT!r}", hint
            )
        found = metadata.get("fingerprint")
        if found != self._fingerprint:
            raise BadCheckpoint(
                f"optimizer state is of another model: fingerprint {found}; expected {self._fingerprint}",
                hint,
            )
        try:
            about = json.loads(metadata["apollo"])
            seed, steps = int(about["seed"]), int(about["steps"])
        except (KeyError, ValueError, TypeError) as e:
            raise BadCheckpoint(f"optimizer state has broken metadata ({e!r})", hint) from None
        states: dict[str, TensorState] = {}
        for name in sorted({key.rpartition(":")[0] for key in tensors}):
            parts = {part: tensors.get(f"{name}:{part}") for part in ("m", "v", "steps", "level")}
            m, v, count, level = parts["m"], parts["v"], parts["steps"], parts["level"]
            if name not in self.parameters or m is None or v is None or count is None or level is None:
                raise BadCheckpoint(f"optimizer state of {name!r} is incomplete or of another model", hint)
            rows, rule = tensors.get(f"{name}:rows"), self.rules[name]
            wanted = moment_shape(rule, self.parameters[name].shape, self.settings.rank)
            if rule == "rows":
                wanted = (-1 if rows is None else len(rows), *wanted[1:])
            if not m.shape == v.shape == wanted or m.dtype != torch.float32:
                raise BadCheckpoint(
                    f"optimizer state of {name} has shape {tuple(m.shape)}; expected {wanted}", hint
                )
            device = self.parameters[name].device
            states[name] = TensorState(
                m.to(device, copy=True),
                v.to(device, copy=True),
                count.to(device if count.ndim else "cpu", copy=True),
                float(level),
                None if rows is None else rows.to(device, copy=True),
            )
        self._states, self.seed, self.steps, self._steps_before = states, seed, steps, steps


def highest_rank(model: nn.Module) -> int:
    """The highest rank at which APOLLO still has a matrix to project; 0 or less: at none."""
    parameters = dict(model.named_parameters())
    return (
        max((min(parameters[n].shape) for n, rule in _rules(model, 0).items() if rule == "apollo"), default=0)
        - 1
    )


def state_bytes(model: nn.Module, rank: int) -> int:
    """What the moments of this model take at most, but for rows of an untied embedding; only shapes are read."""
    rules, parameters = _rules(model, rank), dict(model.named_parameters())
    held = (moment_shape(rules[n], p.shape, rank) for n, p in parameters.items() if rules[n] != "rows")
    return sum(2 * 4 * math.prod(shape) for shape in held)


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
