"""Updates: what a lesson meant to change, before rounding; what merges, scaling and exports add (trainer, server).

The weights round each step, so the difference of their bytes is mostly noise where the learning rate is small; the
sum of the steps is not. It is stored per tensor in the smallest of: low-rank factors, 8-bit blocks with a scale
each, bfloat16, fp32, whose error, relative to the update's norm, is within a stated one. Rows that no step touched
(of an embedding) are left out. A file is a safetensors file that any reader can open; what is what stands in its
metadata. Tensors are read and written one at a time, a piece of one beside.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secondnature import storage
from secondnature.errors import BadDelta, NotFound, SecondnatureError
from secondnature.weights.content import Named
from secondnature.weights.tensor_file import header, read_places

__all__ = ["UPDATE_FILE", "Part", "Update", "read_update", "stored_update", "write_update"]

UPDATE_FILE = "update.safetensors"
"""In a lesson's directory."""
FORMAT = "secondnature-update/1"
TOLERANCE = 0.01
"""Frobenius norm of what may get lost of a tensor's update, relative to the update's."""
_BLOCK = 128
"""Elements that share a scale."""
_PIECE = 1 << 22
"""Elements that are looked at at a time; whole blocks."""
_RANKS = (8, 16, 32, 64, 128)
"""That are tried for factors, each where the one before caught most of the update."""
_PROMISING = 0.5
"""A rank whose relative error is above this has no successor worth trying."""
_HINT = "restore the lesson's directory from a backup; the lesson can be undone without it"

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "I32", torch.int8: "I8"}
Kind = Literal["factors", "int8", "bf16", "fp32"]
_Entry = tuple[str, tuple[int, ...], int]


@dataclass(frozen=True)
class Part:
    """How one tensor's update is stored."""

    kind: Kind
    shape: tuple[int, ...]
    """Of the tensor."""
    norm: float
    """Frobenius norm of the update."""
    error: float
    """Of what is stored, relative to that."""
    rows: bool = False
    """Only rows that are not zero are stored, with their numbers."""


@dataclass(frozen=True)
class Update:
    """What a file holds."""

    parts: dict[str, Part]
    tolerance: float
    nbytes: int
    """Of the file."""
    sha256: str = ""
    """Of the file, where it was just written."""


def write_update(
    path: Path,
    sums: Mapping[str, Tensor],
    *,
    tolerance: float = TOLERANCE,
    each: Callable[[int], object] = lambda _: None,
) -> Update:
    """Store the sums (fp32, by the names that the model has for its tensors), durably. Zeros are left out.

    Raises:
        StorageError: the disk refused; what was there before is still there.
    """
    parts: dict[str, Part] = {}
    places: dict[str, _Entry] = {}
    worst = {
        name: Part("factors", tuple(total.shape), -1 / 3e300, -1 / 3e300) for name, total in sums.items()
    }
    widest = {
        f"{name}:{i}numbers": ("BF16", total.shape, 1 << 50) for name, total in sums.items() for i in "123"
    }
    room = len(header(widest, _metadata(worst, tolerance)))
    with storage.writing(path) as file:
        file.write(bytes(room))
        for done, (name, total) in enumerate(sums.items()):
            each(done)
            part = _write_tensor(file, name, total.detach(), tolerance, places)
            if part is not None:
                parts[name] = part
        nbytes = file.tell()
        file.seek(0)
        file.write(header(places, _metadata(parts, tolerance), room))
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Update(parts, tolerance, nbytes, sha256)


def _metadata(parts: Mapping[str, Part], tolerance: float) -> dict[str, str]:
    about = {name: vars(part) for name, part in parts.items()}
    return {"format": FORMAT, "tolerance": repr(tolerance), "parts": json.dumps(about)}


def _write_tensor(
    file: BinaryIO, name: str, total: Tensor, tolerance: float, places: dict[str, _Entry]
) -> Part | None:
    """One tensor's update, in its smallest form; None: it is zero."""
    norm = float(torch.linalg.vector_norm(total, dtype=torch.float64))
    if not norm:
        return None
    shape, numbers = tuple(total.shape), None
    if total.ndim == 2:
        touched = total.ne(0).any(dim=1)
        if 2 * int(touched.sum()) < len(total):
            numbers = touched.nonzero().view(-1)
            total = total[numbers]
            _write(file, places, f"{name}:rows", numbers.to(torch.int32))
    flat = total.contiguous().view(-1)
    factors = _factored(total, norm, tolerance) if total.ndim == 2 else None
    kind: Kind = "fp32"
    error = 0.0
    if factors is not None:
        kind, (left, right, error) = "factors", factors
        _write(file, places, f"{name}:left", left)
        _write(file, places, f"{name}:right", right)
    elif (
        error := _lost(flat, norm, lambda piece: _restored(*_quantized(piece), piece.numel()))
    ) <= tolerance:
        kind = "int8"
        quantized = [_quantized(piece) for piece in flat.split(_PIECE)]
        _write(file, places, f"{name}:scales", *(scales for _, scales in quantized))
        _write(file, places, f"{name}:int8", *(levels for levels, _ in quantized))
    elif (error := _lost(flat, norm, lambda piece: piece.bfloat16().float())) <= tolerance:
        kind = "bf16"
        even = torch.nn.functional.pad(
            flat, (0, flat.numel() % 2)
        )  # so that what follows lies at whole words
        _write(file, places, f"{name}:bf16", *(piece.bfloat16() for piece in even.split(_PIECE)))
    else:
        error = 0.0
        _write(file, places, f"{name}:fp32", *flat.split(_PIECE))
    return Part(kind, shape, norm, error, numbers is not None)


def _write(file: BinaryIO, places: dict[str, _Entry], name: str, *pieces: Tensor) -> None:
    """The pieces, joined at their first dimension, as one tensor of the file."""
    shape = (sum(len(piece) for piece in pieces), *pieces[0].shape[1:])
    places[name] = (_DTYPES[pieces[0].dtype], shape, sum(piece.nbytes for piece in pieces))
    for piece in pieces:
        file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)


def _lost(flat: Tensor, norm: float, stored: Callable[[Tensor], Tensor]) -> float:
    """The error of a form of storage, relative to the norm."""
    squares = sum(float((stored(p) - p).square().sum(dtype=torch.float64)) for p in flat.split(_PIECE))
    return math.sqrt(squares) / norm


def _quantized(piece: Tensor) -> tuple[Tensor, Tensor]:
    """(levels (blocks, elements) int8, scales (blocks) fp32) of a vector."""
    blocks = torch.nn.functional.pad(piece, (0, -piece.numel() % _BLOCK)).view(-1, _BLOCK)
    scales = blocks.abs().amax(dim=1) / 127
    levels = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).round()
    return levels.clamp_(-127, 127).to(torch.int8), scales


def _restored(levels: Tensor, scales: Tensor, numel: int) -> Tensor:
    return (levels.float() * scales.unsqueeze(1)).view(-1)[:numel]


def _factored(matrix_AB: Tensor, norm: float, tolerance: float) -> tuple[Tensor, Tensor, float] | None:
    """(left (A, R), right (R, B), both bf16; the error), where that is smaller than 8-bit blocks; None: it is not.

    By a randomized range finder (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4 with one iteration); rank after
    rank, because most updates of many steps are of no low one.
    """
    num_rows, num_columns = matrix_AB.shape
    generator = torch.Generator().manual_seed(0)
    for rank in _RANKS:
        if 2 * rank * (num_rows + num_columns) >= num_rows * num_columns or rank > min(num_rows, num_columns):
            return None
        sketch = torch.randn(num_columns, rank, generator=generator)
        q_AR = torch.linalg.qr(matrix_AB @ sketch)[0]
        q_AR = torch.linalg.qr(matrix_AB @ torch.linalg.qr(matrix_AB.T @ q_AR)[0])[0]
        left, right = q_AR.bfloat16(), (q_AR.T @ matrix_AB).bfloat16()
        caught = float(right.float().square().sum(dtype=torch.float64))
        error = math.sqrt(max(0.0, norm**2 - caught)) / norm
        if error > max(_PROMISING, tolerance):
            return None
        if (
            error > 2 * tolerance
        ):  # it says so of the exact factors; what rounding does to them has to be seen
            continue
        error = _product_error(matrix_AB, left, right, norm)
        if error <= tolerance:
            return left, right, error
    return None


def _product_error(matrix_AB: Tensor, left: Tensor, right: Tensor, norm: float) -> float:
    step = max(1, _PIECE // matrix_AB.shape[1])
    squares = sum(
        float((part @ right.float() - whole).square().sum(dtype=torch.float64))
        for part, whole in zip(left.float().split(step), matrix_AB.split(step), strict=True)
    )
    return math.sqrt(squares) / norm


def stored_update(directory: Path) -> Update:
    """What is stored with a lesson, tensor by tensor; only the file's header is read.

    Raises:
        NotFound: the lesson has no update: it was trained on a GPU, by an older version, or it was pruned.
        BadDelta: the file is damaged, or of a format that is not known.
    """
    path = directory / UPDATE_FILE
    try:
        _, metadata = read_places(path)
        if metadata.get("format") != FORMAT:
            raise BadDelta(f"{path}: format {metadata.get('format')}; expected {FORMAT}", _HINT)
        parts: dict[str, Part] = {}
        for name, about in json.loads(metadata["parts"]).items():
            parts[str(name)] = Part(**{**about, "shape": tuple(int(size) for size in about["shape"])})
        return Update(parts, float(metadata["tolerance"]), path.stat().st_size)
    except FileNotFoundError:
        raise NotFound(
            f"{directory.name} has no update: trained on a GPU, by an older version, or pruned",
            "only lessons that were trained on CPUs and not pruned can be merged, scaled or exported as adapters",
        ) from None
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise BadDelta(f"{path}: {str(e).splitlines()[0]}", _HINT) from None


def read_update(directory: Path) -> Iterator[Named]:
    """(name, update (fp32, in the tensor's shape)) of every tensor that moved, one at a time.

    The names are those that the model has for its tensors; a tied tensor comes once.

    Raises:
        NotFound, BadDelta: as `stored_update`; damage in a tensor is found when it is read.
    """
    found = stored_update(directory)
    path = directory / UPDATE_FILE
    try:
        with safe_open(path, framework="pt") as file:
            for name, part in found.parts.items():
                yield name, _read_tensor(file, name, part)
    except (OSError, SafetensorError, ValueError, IndexError, RuntimeError) as e:
        if isinstance(e, SecondnatureError):
            raise
        raise BadDelta(f"{path}: {str(e).splitlines()[0]}", _HINT) from None


def _read_tensor(file: Any, name: str, part: Part) -> Tensor:
    numbers = file.get_tensor(f"{name}:rows").long() if part.rows else None
    shape = part.shape if numbers is None else (len(numbers), *part.shape[1:])
    numel = math.prod(shape)
    if part.kind == "factors":
        values = file.get_tensor(f"{name}:left").float() @ file.get_tensor(f"{name}:right").float()
    elif part.kind == "int8":
        values = _restored(file.get_tensor(f"{name}:int8"), file.get_tensor(f"{name}:scales"), numel)
    elif part.kind in ("bf16", "fp32"):
        values = file.get_tensor(f"{name}:{part.kind}").float()[:numel]
    else:
        raise ValueError(f"tensor {name} is stored as {part.kind}, which is not known")
    values = values.reshape(shape)
    if numbers is None:
        return values
    return torch.zeros(part.shape).index_copy_(0, numbers, values)
