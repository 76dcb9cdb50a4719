"""APOLLO as a normal torch optimizer, dense form, for any training loop (no server, no arena needed).

    optimizer = ApolloOptimizer(model.named_parameters(), lr=1e-3, rank=16)
    loss.backward(); optimizer.step(); optimizer.zero_grad()

The arithmetic is the trainer's own (`update`): the same bits for the same gradients, names, seed and step. bf16
parameters are rounded stochastically, fp32 ones added to. Learning-rate schedulers work: `lr` is read from the
group at every step. Names key the random numbers; without them the parameters' numbers do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from secondnature.errors import BadCheckpoint, ConfigError
from secondnature.records import OptimizerSettings
from secondnature.train.apollo import DEFAULT_LR, fingerprint
from secondnature.train.guard import check_norms
from secondnature.train.update import Rule, TensorState, Update, fresh_state, plan_update, write_

__all__ = ["ApolloOptimizer"]

_SETTINGS = ("rank", "betas", "eps", "weight_decay", "scale", "proj_refresh", "norm_growth_limit")


class ApolloOptimizer(torch.optim.Optimizer):
    """APOLLO (arXiv 2412.05270) for given parameters; `rank=1` is APOLLO-Mini.

    Args:
        params: parameters, (name, parameter) pairs, or groups of them. A group may set every option below but
            `seed`, and `rule`: "apollo", "adam", "floored" or "rows" for all its tensors (see `update.Rule`);
            by default it follows from name and shape. An embedding's group should say "rows", one that is tied to
            the head "floored".
        lr: of the group; schedulers may change it, also to 0, where nothing is written.
        rank, betas, eps, weight_decay, scale, proj_refresh, norm_growth_limit: as in `OptimizerSettings`.
        seed: of projections and rounding.

    Raises:
        ConfigError: the rank fits no matrix, or an option is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float = DEFAULT_LR,
        *,
        rank: int = 16,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        scale: float = 1.0,
        proj_refresh: int = 200,
        norm_growth_limit: float = 1.01,
        seed: int = 0,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "rank": rank,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "scale": scale,
            "proj_refresh": proj_refresh,
            "norm_growth_limit": norm_growth_limit,
            "rule": None,
            "seed": seed,
            "steps": 0,
        }
        super().__init__(cast(Any, params), defaults)
        for group in self.param_groups:
            _settings(group)
        for _, name, parameter, rule in self._tensors():
            if parameter.dtype not in (torch.bfloat16, torch.float32) or not parameter.is_contiguous():
                raise ConfigError(
                    f"parameter {name}: {parameter.dtype}, strides {parameter.stride()}",
                    "give contiguous bfloat16 or float32 parameters",
                )
            if parameter.ndim != 2 and rule in ("apollo", "rows"):
                raise ConfigError(
                    f"parameter {name} is no matrix; its rule is {rule!r}", "leave its rule out"
                )
        rules = [rule for _, _, _, rule in self._tensors()]
        if rules and "apollo" not in rules:
            sides = [min(p.shape) for _, _, p, _ in self._tensors() if p.ndim == 2]
            raise ConfigError(
                f"rank {rank} fits no matrix; the largest has a smaller side of {max(sides, default=0)}",
                f"choose a rank below {max(sides, default=0)}" if sides else "use Adam",
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update from the parameters' `grad`, which stay as they are; returns what `closure` returns.

        Parameters without a gradient, or with a gradient of zero, stay as they are.

        Raises:
            NonFinite: an update is not finite; names the tensor, and nothing was changed.
        """
        with torch.enable_grad() if closure else contextlib.nullcontext():
            loss = closure() if closure else None
        planned: list[tuple[dict[str, Any], str, Tensor, Update, TensorState]] = []
        settings = {id(group): _settings(group) for group in self.param_groups}
        for group, name, parameter, rule in self._tensors():
            if parameter.grad is None:
                continue
            chosen = settings[id(group)]
            held = self.state.get(parameter)
            old = (
                TensorState(**held)
                if held
                else fresh_state(rule, parameter.shape, chosen.rank, parameter.device)
            )
            found = plan_update(rule, parameter.grad, old, chosen, seed=group["seed"], name=name)
            if found is not None:
                planned.append((group, name, parameter, *found))
        check_norms({name: update.norm for _, name, _, update, _ in planned}, "the update")
        for group in self.param_groups:
            group["steps"] += 1
        for group, name, parameter, update, state in planned:
            if float(group["lr"]) != 0:
                write_(
                    parameter.data,
                    update,
                    lr=float(group["lr"]),
                    weight_decay=group["weight_decay"],
                    seed=group["seed"],
                    name=name,
                    step=group["steps"],
                )
            self.state[parameter] = dict(vars(state))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's, and a `fingerprint` of names and shapes."""
        return {**super().state_dict(), "fingerprint": self._fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, to the bit.

        Raises:
            BadCheckpoint: the state is of other parameters; nothing was changed.
        """
        found, expected = state_dict.get("fingerprint"), self._fingerprint()
        if found != expected:
            raise BadCheckpoint(
                f"optimizer state is of other parameters: fingerprint {found}; expected {expected}",
                "build the optimizer over the same named parameters, in the same order",
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "fingerprint"})
        # torch casts state to the parameter's dtype: bf16 moments could not decay, and counts would stop at 256
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            held = state_dict["state"].get(number)
            if held:
                self.state[parameter] = {
                    key: value.to(parameter.device if value.ndim else "cpu", copy=True)
                    if isinstance(value, Tensor)
                    else value
                    for key, value in held.items()
                }

    def _fingerprint(self) -> str:
        return fingerprint({name: tuple(p.shape) for _, name, p, _ in self._tensors()})

    def _tensors(self) -> list[tuple[dict[str, Any], str, nn.Parameter, Rule]]:
        """(group, name, parameter, rule) of every tensor."""
        found: list[tuple[dict[str, Any], str, nn.Parameter, Rule]] = []
        for group in self.param_groups:
            names = group.get("param_names")
            for i, parameter in enumerate(group["params"]):
                name = names[i] if names else str(len(found))
                found.append((group, name, parameter, group["rule"] or _rule(name, parameter, group["rank"])))
        return found


def _rule(name: str, parameter: Tensor, rank: int) -> Rule:
    if name.endswith(("A_log", "dt_bias")):
        return "floored"
    return "apollo" if parameter.ndim == 2 and min(parameter.shape) > rank else "adam"


def _settings(group: dict[str, Any]) -> OptimizerSettings:
    """The group's options, checked. Raises ConfigError."""
    try:
        if not 0 <= float(group["lr"]) <= 1:
            raise ValueError(f"lr {group['lr']}; expected 0 to 1")
        if group["rule"] not in (None, "apollo", "adam", "floored", "rows"):
            raise ValueError(f"rule {group['rule']!r}; expected apollo, adam, floored or rows")
        return OptimizerSettings(**{key: group[key] for key in _SETTINGS})
    except ValueError as e:
        raise ConfigError(f"optimizer: {e}", "see OptimizerSettings for the ranges") from None
