"""An engine's tensors under a Hugging Face model's names: views, nothing is copied (trainer).

vLLM keeps several matrices of the Hugging Face model as one, row under row (queries, keys and values; gate and up;
the inputs of a GatedDeltaNet), and pads the vocabulary. So each Hugging Face parameter is a range of rows of one
engine tensor: a contiguous view. `plan` says which, from headers alone (names, shapes, strides, dtypes): all that
can be wrong is found before anything is mapped. `views` applies it; `model.load.build` puts a model around them,
and a step of the optimizer is then a write into the engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import PretrainedConfig

from secondnature.errors import UnsupportedModel
from secondnature.model.load import read_config, shapes

__all__ = ["ARCHITECTURES", "Device", "Header", "Part", "device_of", "plan", "preflight", "views"]

ARCHITECTURES = {
    "LlamaForCausalLM": "",
    "Qwen3ForCausalLM": "",
    "Qwen3_5ForCausalLM": "",
    "Qwen3_5ForConditionalGeneration": "language_model.",
}
"""What can be trained inside the engine, and what its names begin with there."""

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""The engine's module, and whose rows it holds, in this order. All other names are the same."""

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
VOCABULARY_MULTIPLE = 64
"""The engine's rows of `VOCABULARY` are padded up to this; nobody reads what is behind the real ones."""

DELTA_HEAD_DIMS = (64, 128)
"""What the engine's GatedDeltaNet runs on CPUs: key and value heads of one of these sizes, both the same."""

Device = Literal["cpu", "cuda"]
"""Where the engine's weights lie: what it can run differs."""

_FUSED_OF = {part: whole for whole, parts in FUSED.items() for part in parts}
_TRAINABLE = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Header:
    """What is known of one engine tensor without touching its memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements."""
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """A tensor's header."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    @property
    def contiguous(self) -> bool:
        """Its elements lie one after the other, the last dimension fastest."""
        end = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != end:
                return False
            end *= size
        return True


@dataclass(frozen=True)
class Part:
    """One Hugging Face parameter, and where it lies in the engine."""

    name: str
    """In the Hugging Face model; tied parameters appear once, under the first name."""
    tensor: str
    """The engine's tensor."""
    row: int
    """The first of the engine tensor's rows (its first dimension) that is the parameter's."""
    shape: tuple[int, ...]
    dtype: torch.dtype


def preflight(
    directory: Path,
    *,
    device: Device = "cpu",
    dtype: torch.dtype | None = None,
    world_size: int = 1,
    quantization: str | None = None,
) -> PretrainedConfig:
    """Refuse what cannot be served and trained in place, before an engine is started; returns the model's config.

    `device`, `dtype` (None: not known yet), `world_size` (tensor parallel times pipeline parallel) and
    `quantization` are the engine's.

    Raises:
        UnsupportedModel: says what was found, what was expected and what to do.
        BadCheckpoint: no config.json that can be read.
    """
    config = read_config(directory)
    found = list(getattr(config, "architectures", None) or [])
    if len(found) != 1 or found[0] not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{directory}: the architecture is {', '.join(found) or 'not given in config.json'}; "
            f"expected one of {', '.join(ARCHITECTURES)}",
            "the local engine (`secondnature serve`) serves and trains more of them",
        )
    if quantization is None and getattr(config, "quantization_config", None) is not None:
        about: Any = config.quantization_config
        quantization = (
            about.get("quant_method", "unnamed") if isinstance(about, dict) else type(about).__name__
        )
    if quantization is not None:
        raise UnsupportedModel(
            f"{directory}: the weights are quantised ({quantization}); expected plain bfloat16 or float32",
            "serve the model as it was before it was quantised",
        )
    if world_size != 1:
        raise UnsupportedModel(
            f"the engine spreads the weights over {world_size} processes; expected 1",
            "start it with --tensor-parallel-size 1 --pipeline-parallel-size 1",
        )
    if device == "cpu" and _is_hybrid(config):
        text: Any = config.get_text_config(decoder=True)
        key, value = text.linear_key_head_dim, text.linear_value_head_dim
        if key != value or key not in DELTA_HEAD_DIMS:  # the engine dies at the first prompt
            raise UnsupportedModel(
                f"{directory}: linear_key_head_dim {key}, linear_value_head_dim {value}; on CPUs the engine "
                f"expects both to be {' or both '.join(map(str, DELTA_HEAD_DIMS))}",
                "serve it with the local engine (`secondnature serve`)",
            )
    if dtype is not None:
        _check_dtype(config, device, dtype)
    return config


def device_of(tensors: Mapping[str, Tensor]) -> Device:
    """Where these tensors lie, all of them where the first does."""
    return "cuda" if next(iter(tensors.values())).is_cuda else "cpu"


def _is_hybrid(config: PretrainedConfig) -> bool:
    return "linear_attention" in (getattr(config.get_text_config(decoder=True), "layer_types", None) or [])


def _check_dtype(config: PretrainedConfig, device: str, dtype: torch.dtype) -> None:
    """Can weights of this dtype be served and trained? Raises UnsupportedModel."""
    bf16_only = device == "cpu" and _is_hybrid(config)  # in float32 the engine dies at the first prompt
    if dtype not in _TRAINABLE or (bf16_only and dtype != torch.bfloat16):
        raise UnsupportedModel(
            f"the engine's weights are {_plain(dtype)}; expected bfloat16"
            + (" (a GatedDeltaNet, on a CPU)" if bf16_only else " or float32"),
            "start it with --dtype bfloat16",
        )


def plan(
    directory: Path,
    headers: Mapping[str, Header],
    *,
    device: Device = "cpu",
    world_size: int = 1,
    quantization: str | None = None,
) -> list[Part]:
    """Every parameter of the Hugging Face model in `directory` (only its config.json is read) within the engine.

    `headers`: of all parameters of the engine's model, by name, each once; the rest says how it was started.

    Raises:
        UnsupportedModel: as `preflight`; or a tensor of the engine is missing, superfluous, mis-shaped, not
            contiguous or of a dtype that cannot be trained. Names the tensor.
        BadCheckpoint: no config.json that can be read.
    """
    config = preflight(directory, device=device, world_size=world_size, quantization=quantization)
    prefix = ARCHITECTURES[config.architectures[0]]  # pyright: ignore[reportOptionalSubscript]
    wanted = shapes(directory)
    groups: dict[str, list[str]] = {}
    for name in wanted:
        groups.setdefault(prefix + _engine_name(name), []).append(name)
    for names in groups.values():
        names.sort(key=_place)
    dtype = _main_dtype(headers, prefix)
    _check_dtype(config, device, dtype)
    parts: list[Part] = []
    for tensor, names in groups.items():
        header = headers.get(tensor)
        if header is None:
            raise UnsupportedModel(
                f"the engine has no tensor {tensor} (found {len(headers)} tensors, expected {len(groups)})",
                "was it started with the same model, and without LoRA adapters or --model-impl transformers?",
            )
        _check(tensor, header, [wanted[n] for n in names], dtype, padded=names[0] in VOCABULARY)
        row = 0
        for name in names:
            parts.append(Part(name, tensor, row, wanted[name], header.dtype))
            row += wanted[name][0]
    strangers = sorted(set(headers) - set(groups))
    if strangers:
        raise UnsupportedModel(
            f"the engine's tensor {strangers[0]} belongs to no parameter of the model"
            + (f" (and {len(strangers) - 1} more)" if len(strangers) > 1 else ""),
            _why_superfluous(strangers[0], prefix),
        )
    order = {name: i for i, name in enumerate(wanted)}
    return sorted(parts, key=lambda part: order[part.name])


def _engine_name(name: str) -> str:
    """The engine's name of a Hugging Face parameter, without what all of them begin with."""
    steps = name.split(".")
    if len(steps) > 1:
        steps[-2] = _FUSED_OF.get(steps[-2], steps[-2])
    return ".".join(steps)


def _place(name: str) -> int:
    """Where a Hugging Face parameter comes within the engine's tensor: first, second, ..."""
    module = name.split(".")[-2] if "." in name else name
    whole = _FUSED_OF.get(module)
    return 0 if whole is None else FUSED[whole].index(module)


def _main_dtype(headers: Mapping[str, Header], prefix: str) -> torch.dtype:
    """The dtype of the engine's weights: the embedding's. Raises UnsupportedModel."""
    name = prefix + VOCABULARY[0]
    if name not in headers:
        raise UnsupportedModel(
            f"the engine has no tensor {name} (found {', '.join(sorted(headers)[:3]) or 'none at all'}, ...)",
            "was it started with the same model, and without --model-impl transformers?",
        )
    return headers[name].dtype


def _check(
    tensor: str, header: Header, parts: Sequence[tuple[int, ...]], dtype: torch.dtype, *, padded: bool
) -> None:
    """Is this engine tensor what holds these parts, row under row? Raises UnsupportedModel."""
    rows = sum(shape[0] for shape in parts)
    if padded:
        rows = math.ceil(rows / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    expected = (rows, *parts[0][1:])
    if header.shape != expected:
        raise UnsupportedModel(
            f"the engine's tensor {tensor} has shape {header.shape}; expected {expected}",
            "config.json and the engine's model differ, or it keeps its weights packed or split",
        )
    # vectors may be wider than the matrices: the engine keeps the decay of a GatedDeltaNet in float32
    if header.dtype != dtype and not (header.dtype == torch.float32 and len(expected) == 1):
        raise UnsupportedModel(
            f"the engine's tensor {tensor} is {_plain(header.dtype)}; expected {_plain(dtype)}",
            "quantised weights cannot be trained in place: serve the model in bfloat16",
        )
    if not header.contiguous:
        raise UnsupportedModel(
            f"the engine's tensor {tensor} has strides {header.stride} for shape {header.shape}; "
            "expected rows one after the other",
            "the engine has re-packed its weights: start it with VLLM_PLUGINS=secondnature",
        )


def _why_superfluous(name: str, prefix: str) -> str:
    if name.startswith("visual."):
        return "start the engine with --language-model-only: images cannot be served while text is trained"
    if name == prefix + VOCABULARY[1]:
        return "the model's head is tied to its embedding, but the engine keeps a second copy: one of them is dead"
    return "config.json and the engine's model differ"


def views(parts: Sequence[Part], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The Hugging Face model's parameters, by name, as views of the engine's tensors; for `model.load.build`.

    Raises:
        UnsupportedModel: a tensor is not what the plan was made from; no view was made.
    """
    for part in parts:
        tensor = tensors.get(part.tensor)
        if (
            tensor is None
            or tensor.dtype != part.dtype
            or tuple(tensor.shape[1:]) != part.shape[1:]
            or tensor.shape[0] < part.row + part.shape[0]
            or not tensor.is_contiguous()
        ):
            found = "missing" if tensor is None else f"{_plain(tensor.dtype)} {tuple(tensor.shape)}"
            raise UnsupportedModel(
                f"the engine's tensor {part.tensor} is {found}; expected {_plain(part.dtype)} rows "
                f"{part.row} to {part.row + part.shape[0]} of {part.shape[1:]}",
                "the plan was made for another engine: make it anew",
            )
    return {part.name: tensors[part.tensor][part.row : part.row + part.shape[0]] for part in parts}


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
