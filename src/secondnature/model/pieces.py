"""Which tensors of the files a parameter is made of: by transformers' own conversion mapping (engine and trainer).

A parameter is mostly one tensor of the files. But the files of a mixture of experts name each expert, and the model
keeps all of them in one tensor; others were renamed since they were published; the text part of a model that also
sees lies under another name. transformers says all this in a table, as patterns with operations on tensors. Here
the table is only read, from names and shapes: each tensor of a file gets its place in a parameter (`Piece`), a
view, so that loading copies each byte once and an export writes the files' own names and shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from secondnature.errors import BadCheckpoint, UnsupportedModel
from secondnature.model.files import Header, plain_dtype
from secondnature.model.text_part import conversions

__all__ = ["Piece", "TensorSpec", "claimed", "pieces"]

_HINT = "config.json and the weights belong to different models"
_TEXT_PARTS = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
"""How the files of models that also see name their text part, and how a text model names it."""


@dataclass(frozen=True)
class Piece:
    """A tensor of a file, and where it lies in a parameter."""

    file: Path
    key: str
    """Its name in the file."""
    shape: tuple[int, ...]
    """As it is stored."""
    dtype: torch.dtype
    """What the file holds (float32, bfloat16 or float16)."""
    place: tuple[int | slice, ...] = ()
    """The part of the parameter: an index per dimension, the rest whole."""
    swapped: tuple[int, int] | None = None
    """Two dimensions that the file has the other way round."""

    def of(self, parameter: Tensor) -> Tensor:
        """The view of the parameter that this piece is, in the shape of the file."""
        part = parameter[self.place] if self.place else parameter
        return part if self.swapped is None else part.transpose(*self.swapped)


@dataclass(frozen=True)
class TensorSpec:
    """One parameter of the model, and where it lies on disk."""

    name: str
    """The parameter's name in the Hugging Face model; tied parameters appear once, under the first name."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """What the file holds (float32, bfloat16 or float16); of several, the first."""
    pieces: tuple[Piece, ...]
    """All of it, each element once."""

    @property
    def file(self) -> Path:
        """The file of the first piece."""
        return self.pieces[0].file

    @property
    def key(self) -> str:
        """The first piece's name in the file."""
        return self.pieces[0].key


def claimed(model: Any, keys: Iterable[str]) -> dict[str, list[tuple[str, Any | None, str]]]:
    """Which keys of the files belong to which name of the model's state, as transformers would load them.

    name -> (key, the converter that it goes through or None, the pattern of the converter that it matched), in the
    order of numbers in the keys.
    """
    mapping = [*get_model_conversion_mapping(model), *conversions(model)]
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = model.state_dict()
    prefix = str(getattr(model, "base_model_prefix", ""))
    found: dict[str, list[tuple[str, Any | None, str]]] = {}
    for key in sorted(keys, key=_natural):
        for candidate in _candidates(key):
            name, pattern = rename_source_key(candidate, renamings, converters, prefix, state)
            if name not in state:  # not one of the old names, but perhaps without the prefix
                name, pattern = rename_source_key(candidate, [], [], prefix, state)
            if name in state:
                converter = None if pattern is None else by_pattern[pattern]
                found.setdefault(name, []).append((key, converter, pattern or ""))
                break
    return found


def _candidates(key: str) -> list[str]:
    """A key as it is, and as the text part of a model that also sees."""
    return [key, *(short + key.removeprefix(long) for long, short in _TEXT_PARTS if key.startswith(long))]


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]


def pieces(
    name: str,
    shape: Sequence[int],
    claims: Sequence[tuple[str, Any | None, str]],
    files: Mapping[str, Header],
) -> tuple[Piece, ...]:
    """A parameter of this shape, as the tensors that claim it make it up.

    Raises:
        BadCheckpoint: one is missing, comes twice or has another shape.
        UnsupportedModel: transformers converts it in a way that is not known here; a dtype cannot be used.
    """
    converter = claims[0][1]
    if converter is None:
        if len(claims) > 1:
            raise BadCheckpoint(
                f"{files[claims[1][0]].file}: tensors {claims[0][0]} and {claims[1][0]} are both {name}",
                _HINT,
            )
        return (_piece(claims[0][0], files, shape, ()),)
    operations = [type(op).__name__ for op in converter.operations]
    if operations == ["Transpose"] and len(claims) == 1:
        return (_transposed(claims[0][0], files, shape, converter.operations[0]),)
    groups = [[key for key, _, pattern in claims if pattern == p] for p in converter.source_patterns]
    merged = operations[:1] == ["MergeModulelist"]
    rest = operations[1:] if merged else operations
    if rest not in ([], ["Concatenate"]) or (merged and converter.operations[0].dim != 0):
        raise UnsupportedModel(
            f"{files[claims[0][0]].file}: {name} is made of {claims[0][0]} by {' and '.join(operations)}",
            "save the model with save_pretrained(save_original_format=False)",
        )
    dim = converter.operations[-1].dim if rest else None
    found: list[Piece] = []
    start = 0
    for keys in groups:
        if not keys or (merged and len(keys) != shape[0]) or (not merged and len(keys) != 1):
            wanted = shape[0] if merged else 1
            raise BadCheckpoint(
                f"tensor {name}: {len(keys)} of its {wanted} parts are there", "is the checkpoint complete?"
            )
        for i, key in enumerate(keys):
            place: list[int | slice] = [slice(None)] * (0 if dim is None else dim)
            if merged:
                place[:1] = [i]
            if dim is not None:
                stored = files[key].shape
                length = stored[dim - merged] if dim - merged < len(stored) else 0
                place.append(slice(start, start + length))
            found.append(_piece(key, files, shape, tuple(place)))
        if dim is not None:
            start += found[-1].shape[dim - merged]
    if sum(math.prod(piece.shape) for piece in found) != math.prod(shape):
        raise BadCheckpoint(f"tensor {name}: the files hold another number of elements", _HINT)
    return tuple(found)


def _piece(
    key: str,
    files: Mapping[str, Header],
    shape: Sequence[int],
    place: tuple[int | slice, ...],
    swapped: tuple[int, int] | None = None,
) -> Piece:
    header = files[key]
    found = Piece(header.file, key, header.shape, plain_dtype(key, header), place, swapped)
    wanted = tuple(found.of(torch.empty(tuple(shape), device="meta")).shape)
    if header.shape != wanted:
        raise BadCheckpoint(
            f"{header.file}: tensor {key} has shape {header.shape}; the config says {wanted}", _HINT
        )
    return found


def _transposed(key: str, files: Mapping[str, Header], shape: Sequence[int], operation: Any) -> Piece:
    if operation.check_dims and files[key].shape == tuple(shape):
        return _piece(key, files, shape, ())
    return _piece(key, files, shape, (), (operation.dim0, operation.dim1))


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> all its names; tied ones have several, the first is the one we use."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names
