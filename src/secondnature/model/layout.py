"""What the files of a model directory hold, sorted by what the model wants of them (any engine).

From headers alone: every parameter and where it is stored, buffers that a checkpoint stores (a router's
correction), and what lies beside the language model. What is missing, mis-shaped or nobody's is an error that names
the tensor.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from secondnature.errors import BadCheckpoint, UnsupportedModel
from secondnature.model.files import Header, headers, quantization, raw_config
from secondnature.model.pieces import Piece, TensorSpec, claimed, parameter_names, pieces
from secondnature.model.skeleton import skeleton

__all__ = ["Layout", "bystanders", "layout", "plan"]

_NEVER_READ = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"^mtp\.")
"""Keys that transformers reads for no model: buffers that older versions stored, heads that only guess ahead."""
_BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Layout:
    """What the files hold, sorted."""

    specs: list[TensorSpec]
    buffers: dict[str, Piece]
    """Buffers that the model wants from its checkpoint: stored, never trained."""
    beside: dict[str, Path]
    """Every key that is no parameter's, and its file."""


def plan(directory: Path) -> list[TensorSpec]:
    """Every parameter of the model in `directory` and where it is stored; reads headers only.

    (But for parameters that the config ties and the files hold apart: whether they are equal is looked up.)

    Raises:
        BadCheckpoint: a tensor is missing, has another shape than the config says, or belongs to no parameter.
        UnsupportedModel: the architecture or a dtype cannot be used.
    """
    return layout(directory).specs


def bystanders(directory: Path) -> dict[str, Path]:
    """What a checkpoint holds beside the language model's parameters (a vision tower, say): key -> file.

    Raises: as `plan`.
    """
    return layout(directory).beside


def layout(directory: Path, model: nn.Module | None = None) -> Layout:
    """All that the files hold, for the model of their config (`model`: it, where it was made already).

    Raises: as `plan`.
    """
    quantised = quantization(raw_config(directory))
    model = skeleton(directory) if model is None else model
    files = headers(directory)
    try:
        return _sorted(directory, model, files)
    except (BadCheckpoint, UnsupportedModel):
        if quantised is None:
            raise
        raise UnsupportedModel(
            f"{directory}: the weights are quantised ({quantised}); expected plain bfloat16, float16 or float32",
            "quantised weights cannot be trained in place: serve the model as it was before",
        ) from None


def _sorted(directory: Path, model: nn.Module, files: Mapping[str, Header]) -> Layout:
    claims = claimed(model, files)
    specs: list[TensorSpec] = []
    known: set[str] = set()
    for names in parameter_names(model).values():
        shape = tuple(model.get_parameter(names[0]).shape)
        held = {n: pieces(n, shape, claims[n], files) for n in names if n in claims}
        if not held:
            raise _missing(directory, names[0])
        known.update(p.key for parts in held.values() for p in parts)
        first, *others = held
        apart = [n for n in others if not _equal(held[first], held[n])]
        specs.append(TensorSpec(names[0], shape, held[first][0].dtype, held[first]))
        specs += [TensorSpec(n, shape, held[n][0].dtype, held[n]) for n in apart]
    buffers: dict[str, Piece] = {}
    for name in model.state_dict().keys() - {n for names in parameter_names(model).values() for n in names}:
        if name not in claims:
            raise _missing(directory, name)
        (buffers[name],) = pieces(name, tuple(model.get_buffer(name).shape), claims[name], files)
    beside = {k: header.file for k, header in files.items() if k not in known}
    strangers = [k for k in beside if k not in {p.key for p in buffers.values()} and not _not_read(model, k)]
    if strangers:
        raise BadCheckpoint(
            f"{beside[strangers[0]]}: tensor {strangers[0]} belongs to no parameter of the model"
            + (f" (and {len(strangers) - 1} more)" if len(strangers) > 1 else ""),
            "config.json and the weights belong to different models",
        )
    return Layout(specs, buffers, beside)


def _missing(directory: Path, name: str) -> BadCheckpoint:
    architectures = ", ".join(map(str, raw_config(directory).get("architectures") or []))
    if architectures.endswith("Model"):
        return BadCheckpoint(
            f"{directory}: tensor {name} is missing; the files are of {architectures}, a model without a head",
            "expected a model that continues text (...ForCausalLM)",
        )
    return BadCheckpoint(f"{directory}: tensor {name} is missing", "is the checkpoint complete?")


def _not_read(model: Any, key: str) -> bool:
    """Whether transformers, too, leaves this tensor of the files alone."""
    patterns = [*_NEVER_READ, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])]
    if any(re.search(pattern, key) for pattern in patterns):
        return True
    if not model.__dict__["_is_part"]:
        return False
    text = ("model.language_model.", "language_model.", "model.layers.", "model.embed_tokens.", "model.norm.")
    return not key.startswith((*text, "lm_head."))


def _equal(one: Sequence[Piece], other: Sequence[Piece]) -> bool:
    """Whether two tensors of the files are the same once they are rounded to bf16; read block by block."""
    if len(one) != 1 or len(other) != 1:
        return False
    return _equal_files(_seen(one[0]), _seen(other[0]))


def _seen(piece: Piece) -> tuple[Path, str, int, int]:
    found = piece.file.stat()
    return piece.file, piece.key, found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=16)
def _equal_files(one: tuple[Path, str, int, int], other: tuple[Path, str, int, int]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_rounded(*one[:2]), _rounded(*other[:2]), strict=True))


def _rounded(file: Path, key: str) -> Iterator[Tensor]:
    with safe_open(file, framework="pt") as stored:
        part = stored.get_slice(key)
        num, *rest = part.get_shape()
        step = max(1, _BLOCK_ELEMENTS // max(1, torch.Size(rest).numel()))
        for start in range(0, num, step):
            yield part[start : start + step].to(torch.bfloat16)
