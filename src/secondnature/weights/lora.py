"""What changed, as a LoRA adapter that the `peft` library loads onto the model's own weights (engine).

The change of each linear layer's weights is cut to its largest singular values (Eckart and Young 1936: no other
matrix of that rank is nearer), B [out, R] times A [R, in]. Of a difference of bytes most is noise of stochastic
rounding, which no low rank holds: what a lesson meant to change (`updates`) is given where it is stored. The
relative error is stated, per tensor and in all, and what the adapter does is asked of probes, not of norms.
Embeddings, norms, convolutions and heads that are tied to an embedding cannot be carried: they are named. One
tensor is in memory at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secondnature import storage
from secondnature.errors import BadInput, UnsupportedModel
from secondnature.model.load import skeleton
from secondnature.weights.content import Named, blocks
from secondnature.weights.tensor_file import header, layout

__all__ = ["ADAPTER_FILE", "CONFIG_FILE", "Adapter", "Carried", "applied", "factors", "write"]

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
"""Of every key: how peft names the model inside its own."""
MAX_EXACT = 2048
"""Matrices whose shorter side is longer are factored by random projections (Halko et al. 2011, algorithm 4.4)."""
_OVERSAMPLED, _POWER_ITERATIONS = 16, 4


@dataclass(frozen=True)
class Carried:
    """One tensor of the adapter."""

    norm: float
    """Frobenius norm of the difference."""
    error: float
    """Of what the adapter lacks of it, over that norm."""


@dataclass
class Adapter:
    """What an adapter holds, and what it does not."""

    rank: int
    carried: dict[str, Carried] = field(default_factory=dict[str, Carried])
    left_out: dict[str, float] = field(default_factory=dict[str, float])
    """Tensors that changed and are no linear layer's: norm of the difference."""

    @property
    def error(self) -> float:
        """Norm of all that the adapter lacks, what is left out included, over the norm of the whole difference."""
        lacks = sum((c.norm * c.error) ** 2 for c in self.carried.values())
        lacks += sum(norm**2 for norm in self.left_out.values())
        whole = sum(c.norm**2 for c in self.carried.values()) + sum(n**2 for n in self.left_out.values())
        return math.sqrt(lacks / whole) if whole else 0.0

    def told(self) -> dict[str, Any]:
        """All of it, for a file."""
        return {
            "rank": self.rank,
            "relative_error": self.error,
            "tensors": {
                name: {"norm": c.norm, "relative_error": c.error} for name, c in self.carried.items()
            },
            "left_out": self.left_out,
        }


def factors(change_AB: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B [A, R], A [R, B]), fp32: their product is the best of that rank, or near it for large matrices.

    Args:
        change_AB: fp32.
        rank: R; where the matrix has a lower one, the rest is zero.
    """
    if min(change_AB.shape) <= MAX_EXACT:
        u, s, vh = torch.linalg.svd(change_AB, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            wanted = min(rank + _OVERSAMPLED, *change_AB.shape)
            u, s, v = torch.svd_lowrank(change_AB, q=wanted, niter=_POWER_ITERATIONS)
            vh = v.T
    held = min(rank, len(s))
    root = s[:held].sqrt()
    left = torch.zeros(change_AB.shape[0], rank)
    right = torch.zeros(rank, change_AB.shape[1])
    left[:, :held] = u[:, :held] * root
    right[:held] = root[:, None] * vh[:held]
    return left, right


def write(
    directory: Path, changes: Callable[[], Iterable[Named]], source: Path, rank: int, base: str
) -> Adapter:
    """Write an adapter for the model of `source`; what it holds.

    Args:
        directory: made here; where this raises, what was written so far is the caller's to remove.
        changes: (name, difference (fp32)), one at a time; called twice. What did not change may be left out.
        rank: of each matrix.
        base: what `adapter_config.json` calls the model.

    Raises:
        BadInput: no linear layer changed.
        UnsupportedModel: the model is the text part of another, whose layers peft would not find.
        StorageError: the disk refused, or has no room for it.
    """
    model: Any = skeleton(source)
    if model.__dict__.get("_is_part"):
        raise UnsupportedModel(
            f"{source}: the model is the text part of another, whose layers an adapter would not find",
            "export the checkpoint instead",
        )
    linear = _linear_layers(model)
    changed = [name for name, change in changes() if bool(change.any())]
    mine = [name for name in changed if name in linear]
    if not mine:
        raise BadInput(
            f"no linear layer changed ({len(changed)} other tensors did): there is nothing an adapter could hold",
            "export the checkpoint instead",
        )
    entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name in mine:
        out, into = linear[name].out_in
        entries[_key(name, "A")] = ("F32", (rank, into), 4 * rank * into)
        entries[_key(name, "B")] = ("F32", (out, rank), 4 * rank * out)
    storage.check_room(directory.parent, sum(nbytes for _, _, nbytes in entries.values()))
    storage.make_dir(directory)
    adapter = Adapter(rank)
    with storage.writing(directory / ADAPTER_FILE) as file:
        order = layout(entries)
        head = header({key: entries[key] for key in order}, {"format": "pt"})
        starts, end = dict[str, int](), len(head)
        for key in order:
            starts[key] = end
            end += entries[key][2]
        file.write(head)
        for name, change in changes():
            norm = float(torch.linalg.vector_norm(change))
            if name not in mine:
                if norm:
                    adapter.left_out[name] = norm
                continue
            change_AB = change.T if linear[name].transposed else change
            left, right = factors(change_AB, rank)
            error = float(torch.linalg.vector_norm(change_AB - left @ right)) / norm
            adapter.carried[name] = Carried(norm, error)
            for letter, factor in (("A", right), ("B", left)):
                file.seek(starts[_key(name, letter)])
                file.writelines(block.data for block in blocks(factor.contiguous()))
            del change, change_AB, left, right  # before the next ones are made
    config = _config(mine, rank, base, transposed=any(linear[name].transposed for name in mine))
    storage.write_text(directory / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    return adapter


@dataclass(frozen=True)
class _Linear:
    out_in: tuple[int, int]
    transposed: bool
    """The weight is [in, out], as GPT-2 has it."""


def _linear_layers(model: nn.Module) -> dict[str, _Linear]:
    """Weights of linear layers, by name; of a tied one only the name under which it is no linear layer's."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: dict[str, _Linear] = {}
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if isinstance(module, nn.Linear) and len(names[id(module.weight)]) == 1:
            found[name] = _Linear((module.out_features, module.in_features), transposed=False)
        elif isinstance(module, Conv1D):
            into, out = module.weight.shape
            found[name] = _Linear((out, into), transposed=True)
    return found


def _key(name: str, letter: str) -> str:
    return f"{_PREFIX}{name.removesuffix('.weight')}.lora_{letter}.weight"


def _config(names: Iterable[str], rank: int, base: str, *, transposed: bool) -> dict[str, Any]:
    """`adapter_config.json`, as peft writes it; the scale is 1."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(name.removesuffix(".weight") for name in names),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }


def applied(weights: Iterable[tuple[str, Tensor]], directory: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights with an adapter of ours added, in fp32, as peft computes with it.

    Raises:
        BadInput: the adapter cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((directory / CONFIG_FILE).read_text())
        transposed = bool(config["fan_in_fan_out"])
        with safe_open(directory / ADAPTER_FILE, framework="pt") as file:
            held = set(file.keys())
            for name, tensor in weights:
                found = tensor.float()
                if _key(name, "A") in held:
                    change = file.get_tensor(_key(name, "B")) @ file.get_tensor(_key(name, "A"))
                    found = found + (change.T if transposed else change)
                yield name, found
                del tensor, found
    except (OSError, ValueError, KeyError, SafetensorError) as e:
        raise BadInput(f"{directory}: not an adapter of ours ({e})", "export it again") from None
