"""A Hugging Face causal language model whose parameters are somebody else's memory (engine and trainer).

`plan` reads the headers of the safetensors files and checks them against the config; `build` makes the model on
the meta device, where nothing is allocated or initialised, and puts the given tensors (views of the arena) in the
place of every parameter. Plan, validate, apply: what is missing, mis-shaped or left on meta is an error that
names the tensor. Nothing is downloaded, no code of a model directory is run, nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from secondnature.errors import BadCheckpoint, UnsupportedModel
from secondnature.model import limits
from secondnature.model.upcast import compute_at_use

__all__ = [
    "TensorSpec",
    "build",
    "bystanders",
    "context_limit",
    "fingerprint",
    "plan",
    "read_config",
    "shapes",
    "skeleton",
]

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class TensorSpec:
    """One parameter of the model, and where it lies on disk."""

    name: str
    """The parameter's name in the Hugging Face model; tied parameters appear once, under the first name."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """What the file holds (float32, bfloat16 or float16)."""
    file: Path
    key: str
    """The tensor's name in the file; differs from `name` where the file leaves the model's prefix out, or where the
    model is the text part of one that also sees."""


def read_config(directory: Path) -> PretrainedConfig:
    """The model's config, from `config.json` alone.

    Raises:
        BadCheckpoint: no readable config.json.
        UnsupportedModel: transformers does not know the architecture.
    """
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text("utf-8"))
    except OSError as e:
        raise BadCheckpoint(f"{path}: {e.strerror or e}", "expected a Hugging Face model directory") from None
    except ValueError as e:
        raise BadCheckpoint(f"{path}: not JSON ({e})", "mend or re-export the config") from None
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError) as e:
        kind = raw.get("model_type") if isinstance(raw, dict) else None
        raise UnsupportedModel(
            f"{path}: model_type {kind!r} cannot be read: {str(e).splitlines()[0]}",
            "expected a causal language model that this transformers version knows",
        ) from None


def skeleton(directory: Path) -> nn.Module:
    """The model with every parameter and buffer on the meta device; tied parameters are one object.

    Raises:
        BadCheckpoint, UnsupportedModel: as `read_config`; or it is no causal language model.
    """
    config = read_config(directory)
    last: Exception | None = None
    for attention in ("sdpa", "eager"):
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=False
                )
        except (ValueError, ImportError, TypeError, AttributeError) as e:
            last = e
            continue
        model.tie_weights()
        return model.eval()
    raise UnsupportedModel(
        f"{directory}: {type(config).__name__} is not a causal language model: {str(last).splitlines()[0]}",
        "expected an architecture that AutoModelForCausalLM can make",
    )


def _headers(directory: Path) -> dict[str, tuple[tuple[int, ...], str, Path]]:
    """Tensor name in the file -> (shape, dtype, file), from safetensors headers only."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    try:
        is_cut, is_whole = index.exists(), single.exists()
    except OSError as e:
        raise BadCheckpoint(f"{directory}: {e.strerror or e}", "mend the disk or the permissions") from None
    if is_cut:
        try:
            names = sorted({str(n) for n in json.loads(index.read_text("utf-8"))["weight_map"].values()})
        except (OSError, ValueError, KeyError, AttributeError) as e:
            raise BadCheckpoint(
                f"{index}: not an index of safetensors files ({e!r})", "re-export the model"
            ) from None
        outside = [n for n in names if Path(n).name != n]
        if outside:
            raise BadCheckpoint(
                f"{index}: names a file outside the directory: {outside[0]}", "re-export the model"
            )
        files = [directory / n for n in names]
    elif is_whole:
        files = [single]
    else:
        raise BadCheckpoint(
            f"{directory}: no model.safetensors and no model.safetensors.index.json",
            "pickled weights (.bin, .pt) are never read: export with save_pretrained",
        )
    found: dict[str, tuple[tuple[int, ...], str, Path]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118  (not a mapping)
                    part = stored.get_slice(key)
                    found[key] = (tuple(part.get_shape()), part.get_dtype(), file)
        except (OSError, SafetensorError) as e:
            raise BadCheckpoint(
                f"{file}: not a whole safetensors file ({e})", "copy or export it again"
            ) from None
    return found


def plan(directory: Path) -> list[TensorSpec]:
    """Every parameter of the model in `directory` and where it is stored; reads headers only.

    Raises:
        BadCheckpoint: a tensor is missing, has another shape than the config says, or belongs to no parameter.
        UnsupportedModel: the architecture or a dtype cannot be used.
    """
    return _sorted(directory)[0]


def bystanders(directory: Path) -> dict[str, Path]:
    """What a checkpoint holds beside the language model's parameters (a vision tower, say): key -> file.

    Raises: as `plan`.
    """
    return _sorted(directory)[1]


def _sorted(directory: Path) -> tuple[list[TensorSpec], dict[str, Path]]:
    model = skeleton(directory)
    headers = _headers(directory)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    specs: list[TensorSpec] = []
    known: set[str] = set()
    for names in _tied_names(model).values():
        wanted = tuple(model.get_parameter(names[0]).shape)
        keys = [k for n in names for k in _keys(n, prefix) if k in headers]
        if not keys:
            raise BadCheckpoint(f"{directory}: tensor {names[0]} is missing", "is the checkpoint complete?")
        shape, dtype, file = headers[keys[0]]
        if shape != wanted:
            raise BadCheckpoint(
                f"{file}: tensor {keys[0]} has shape {shape}; the config says {wanted}",
                "config.json and the weights belong to different models",
            )
        if dtype not in _DTYPES:
            raise UnsupportedModel(
                f"{file}: tensor {keys[0]} is {dtype}; expected one of {sorted(_DTYPES)}",
                "quantised weights cannot be trained in place",
            )
        known.update(keys)
        specs.append(TensorSpec(names[0], shape, _DTYPES[dtype], file, keys[0]))
    ignored = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    beside = {k: headers[k][2] for k in headers if k not in known}
    strangers = [k for k in beside if not any(re.search(p, k) for p in ignored)]
    if strangers:
        raise BadCheckpoint(
            f"{headers[strangers[0]][2]}: tensor {strangers[0]} belongs to no parameter of the model"
            + (f" (and {len(strangers) - 1} more)" if len(strangers) > 1 else ""),
            "config.json and the weights belong to different models",
        )
    return specs, beside


def _keys(name: str, prefix: str) -> tuple[str, ...]:
    """Under which keys a file may hold a parameter: its name, without the model's prefix, or as the text part of a
    model that also sees."""
    bare = name.removeprefix(prefix)
    return name, bare, f"{prefix}language_model.{bare}"


def shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model, by the first of its names, and its shape; only config.json is read.

    Raises:
        BadCheckpoint, UnsupportedModel: as `read_config`; or it is no causal language model.
    """
    model = skeleton(directory)
    return {names[0]: tuple(model.get_parameter(names[0]).shape) for names in _tied_names(model).values()}


def _tied_names(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> all its names; tied ones have several, the first is the one we use."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def build(
    directory: Path, weights: Mapping[str, Tensor], *, compute_dtype: torch.dtype | None = None
) -> nn.Module:
    """The model of `directory` (only its config.json is read) around the given tensors, which are not copied.

    Every parameter is a view of `weights[name]` (names as in `plan`; a tied parameter needs one of its names), so
    that a write into that memory is a write into the model. Weights are computed with in `compute_dtype`, cast at
    use (`model/upcast.py`); None: float32 on CPUs, the weights' own dtype elsewhere. The model is in eval mode.

    Raises:
        BadCheckpoint: a tensor is missing, mis-shaped or superfluous.
        UnsupportedModel: the architecture, a dtype or a buffer cannot be handled.
    """
    model = skeleton(directory)
    tied = _tied_names(model)
    replaced: dict[int, nn.Parameter] = {}
    device: torch.device | None = None
    for key, names in tied.items():
        name = next((n for n in names if n in weights), None)
        if name is None:
            raise BadCheckpoint(f"tensor {names[0]} was not given", "is the checkpoint complete?")
        tensor, wanted = weights[name], tuple(model.get_parameter(name).shape)
        if tuple(tensor.shape) != wanted:
            raise BadCheckpoint(f"tensor {name} has shape {tuple(tensor.shape)}; the config says {wanted}")
        if tensor.dtype not in _DTYPES.values():
            raise UnsupportedModel(f"tensor {name} is {tensor.dtype}; expected bfloat16 or float32")
        if tensor.is_meta:
            raise BadCheckpoint(f"tensor {name} has no memory (meta device)", "give real tensors")
        device = device or tensor.device
        replaced[key] = nn.Parameter(tensor, requires_grad=False)
    strangers = sorted(set(weights) - {n for names in tied.values() for n in names})
    if strangers:
        raise BadCheckpoint(
            f"tensor {strangers[0]} belongs to no parameter of the model", "wrong model directory?"
        )
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                module._parameters[name] = replaced[id(old)]
    assert device is not None, "a language model has parameters"
    _materialise_buffers(model, device)
    compute_at_use(
        model, compute_dtype or (torch.float32 if device.type == "cpu" else replaced[next(iter(tied))].dtype)
    )
    _check_wiring(model, weights)
    return model


def _materialise_buffers(model: nn.Module, device: torch.device) -> None:
    """Real values for the buffers that no checkpoint holds (rotary frequencies), by the module's constructor."""
    for path, module in list(model.named_modules()):
        hollow = [n for n, b in module._buffers.items() if b is not None and b.is_meta]
        if not hollow:
            continue
        config = getattr(module, "config", None)
        unknown = [n for n in hollow if n not in module._non_persistent_buffers_set]
        if config is None or unknown:
            raise UnsupportedModel(
                f"buffer {path}.{(unknown or hollow)[0]} cannot be made from the config",
                "this architecture keeps state outside its parameters",
            )
        fresh = type(module)(config=config)
        for name in hollow:
            module._buffers[name] = fresh.get_buffer(name).to(device)


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
    """64 hex digits that name the architecture: the config, and names and shapes of the parameters."""
    config = read_config(directory).to_dict()
    for volatile in ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"):
        config.pop(volatile, None)
    shapes = [[n, list(p.shape)] for n, p in skeleton(directory).named_parameters()]
    text = json.dumps([config, shapes], sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()
