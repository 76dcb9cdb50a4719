"""A Hugging Face causal language model whose parameters are somebody else's memory (engine and trainer).

`build` makes the model with its parameters on the meta device (`skeleton`) and puts the given tensors (views of the
arena) in the place of every parameter. Buffers are real from the start; those that a checkpoint stores are read
from it (`layout`). What is left on meta, or is not the memory that was given, is an error that names the tensor.
The door to both: who loads a model asks here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig

from secondnature.errors import BadCheckpoint, UnsupportedModel
from secondnature.model import limits
from secondnature.model.files import DTYPES, raw_config
from secondnature.model.layout import bystanders, layout, plan
from secondnature.model.pieces import TensorSpec, parameter_names
from secondnature.model.skeleton import named_fault, read_config, shapes, skeleton
from secondnature.model.upcast import compute_at_use

__all__ = [
    "TensorSpec",
    "build",
    "bystanders",
    "context_limit",
    "fingerprint",
    "named_fault",
    "plan",
    "read_config",
    "shapes",
    "skeleton",
]

_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")


def build(
    directory: Path, weights: Mapping[str, Tensor], *, compute_dtype: torch.dtype | None = None
) -> nn.Module:
    """The model of `directory` around the given tensors, which are not copied.

    Read are its config.json and, where the model wants buffers from its checkpoint, those. Every parameter is a
    view of `weights[name]` (names as in `plan`; a tied parameter needs one of its names, and is untied by more), so
    that a write into that memory is a write into the model. Weights are computed with in `compute_dtype`, cast at
    use (`model/upcast.py`); None: float32 on CPUs, the weights' own dtype elsewhere. The model is in eval mode.

    Raises:
        BadCheckpoint: a tensor is missing, mis-shaped or superfluous.
        UnsupportedModel: the architecture, a dtype or a buffer cannot be handled.
    """
    model = skeleton(directory)
    replaced: dict[str, nn.Parameter] = {}
    groups = list(parameter_names(model).values())
    for names in groups:
        given = [n for n in names if n in weights]
        if not given:
            raise BadCheckpoint(f"tensor {names[0]} was not given", "is the checkpoint complete?")
        for name in given:
            _check_given(name, weights[name], tuple(model.get_parameter(names[0]).shape))
            replaced[name] = nn.Parameter(weights[name], requires_grad=False)
        replaced |= {n: replaced[given[0]] for n in names if n not in given}
    strangers = sorted(set(weights) - set(replaced))
    if strangers:
        raise BadCheckpoint(
            f"tensor {strangers[0]} belongs to no parameter of the model", "wrong model directory?"
        )
    for path, module in model.named_modules():
        for name, old in module._parameters.items():
            if old is not None:
                module._parameters[name] = replaced[f"{path}.{name}" if path else name]
    first = replaced[groups[0][0]]
    device = first.device
    _fill_buffers(directory, model, device)
    compute_at_use(model, compute_dtype or (torch.float32 if device.type == "cpu" else first.dtype))
    _check_wiring(model, weights)
    return model


def _check_given(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    """Raises BadCheckpoint, UnsupportedModel: it cannot be the parameter of this shape."""
    if tuple(tensor.shape) != wanted:
        raise BadCheckpoint(f"tensor {name} has shape {tuple(tensor.shape)}; the config says {wanted}")
    if tensor.dtype not in DTYPES.values():
        raise UnsupportedModel(f"tensor {name} is {tensor.dtype}; expected bfloat16 or float32")
    if tensor.is_meta:
        raise BadCheckpoint(f"tensor {name} has no memory (meta device)", "give real tensors")


def _fill_buffers(directory: Path, model: nn.Module, device: torch.device) -> None:
    """Buffers that a checkpoint stores get its values; all of them move to the weights' device."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = model.state_dict().keys() - parameters.keys()
    stored = layout(directory, model).buffers if wanted else {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            found = stored.get(f"{path}.{name}" if path else name)
            value = buffer
            if found is not None:
                with safe_open(found.file, framework="pt") as file:
                    value = file.get_tensor(found.key).to(buffer.dtype)
            module._buffers[name] = value.to(device)
        for name, value in vars(module).items():  # some keep a constant as a plain attribute
            if isinstance(value, Tensor) and value.device != device:
                setattr(module, name, value.to(device))


def _check_wiring(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Nothing on meta, every parameter the very memory that was given."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            raise UnsupportedModel(f"parameter {name} has no memory")
        if name in weights and parameter.data_ptr() != weights[name].data_ptr():
            raise UnsupportedModel(
                f"parameter {name} is not the memory it was given", "is it tied to another one?"
            )
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise UnsupportedModel(f"buffer {name} has no memory")


def context_limit(source: Path | PretrainedConfig) -> int:
    """How many tokens the model can read, prompt and answer together."""
    return limits.context_limit(read_config(source) if isinstance(source, Path) else source)


def fingerprint(directory: Path) -> str:
    """f2- and 64 hex digits that name the architecture, whatever version of transformers reads it.

    Over config.json as it is written, names and shapes of the parameters, and the values of stored buffers.
    """
    config = {k: v for k, v in raw_config(directory).items() if k not in _VOLATILE}
    model = skeleton(directory)
    shapes = [[n, list(p.shape)] for n, p in model.named_parameters()]
    text = json.dumps([config, shapes], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode())
    if len(model.state_dict()) > len(dict(model.named_parameters(remove_duplicate=False))):
        for name, piece in sorted(layout(directory, model).buffers.items()):
            with safe_open(piece.file, framework="pt") as stored:
                value: Tensor = stored.get_tensor(piece.key)
            digest.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return "f2-" + digest.hexdigest()
