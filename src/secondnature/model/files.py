"""What a model directory holds, from the headers of its files alone (engine and trainer).

People have many things under the name of a model: adapters, pointers of git-lfs, half of a download, quantised
files. What cannot be served is refused by what it *is*, with what to do, not by the first tensor that does not fit.
Only safetensors are opened; nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from secondnature.errors import BadCheckpoint, UnsupportedModel

__all__ = ["Header", "headers", "instead", "plain_dtype", "quantization", "raw_config"]

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What can be served, as the format names it."""
_LFS = b"version https://git-lfs"
_AGAIN = "copy or export it again"


@dataclass(frozen=True)
class Header:
    """One tensor of a file, as its header has it."""

    shape: tuple[int, ...]
    dtype: str
    """As the format names it."""
    file: Path


def raw_config(directory: Path) -> dict[str, Any]:
    """config.json as it is written. Raises BadCheckpoint: there is none, or it is no JSON object."""
    path = directory / "config.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as e:
        raise BadCheckpoint(f"{path}: {e.strerror or e}", instead(directory)) from None
    except OSError as e:
        raise BadCheckpoint(f"{path}: {e.strerror or e}", "mend the disk or the permissions") from None
    except (ValueError, RecursionError) as e:
        raise BadCheckpoint(f"{path}: not JSON ({e})", "mend or re-export the config") from None
    if not isinstance(found, dict):
        raise BadCheckpoint(f"{path}: not a JSON object", "mend or re-export the config")
    return found


def instead(directory: Path) -> str:
    """What to give in the place of a directory that is no model's, or has no weights that can be read."""
    try:
        names = sorted(path.name for path in directory.iterdir())
    except OSError:
        names = []
    if "adapter_config.json" in names:
        return (
            f"it is an adapter of {_base_of(directory)}: merge it into that model, and serve the merged one"
        )
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if ggufs:
        return f"serve the file itself: {directory / ggufs[0]}"
    if "snapshots" in names:
        return "it is a hub's cache: give the folder of a revision, below snapshots/"
    return "give a Hugging Face directory, a .gguf file, or `--model embedded`"


def _base_of(directory: Path) -> str:
    """The model that an adapter belongs to, as it says."""
    try:
        found = json.loads((directory / "adapter_config.json").read_text("utf-8"))
        return str(found["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return "another model"


def quantization(config: Mapping[str, Any]) -> str | None:
    """How config.json says that the weights are quantised ("gptq, 4 bits"); None: it does not."""
    for key in ("quantization_config", "quantization"):  # MLX has the second
        about = config.get(key)
        if isinstance(about, dict):
            bits = about.get("bits") or about.get("w_bit")
            bits = 4 if about.get("load_in_4bit") else 8 if about.get("load_in_8bit") else bits
            method = str(about.get("quant_method") or ("mlx" if key == "quantization" else "unnamed"))
            return f"{method}, {bits} bits" if bits else method
    text = config.get("text_config")
    return quantization(text) if isinstance(text, dict) else None


def plain_dtype(key: str, header: Header) -> torch.dtype:
    """What a tensor is stored as. Raises UnsupportedModel: in a form that cannot be trained in place."""
    try:
        return DTYPES[header.dtype]
    except KeyError:
        raise UnsupportedModel(
            f"{header.file}: tensor {key} is {header.dtype}; expected one of {sorted(DTYPES)}",
            "quantised weights cannot be trained in place: serve the model as it was before",
        ) from None


def headers(directory: Path) -> dict[str, Header]:
    """Every tensor of a directory by its name in the files, from safetensors headers only.

    Raises:
        BadCheckpoint: there are none, a file is missing, damaged or not what its name says, or an adapter lies
            beside them, which would change every answer and is not applied.
    """
    found: dict[str, Header] = {}
    files = _files(directory)
    if (directory / "adapter_config.json").exists():
        raise BadCheckpoint(
            f"{directory}: an adapter of {_base_of(directory)} lies beside the model (adapter_config.json), "
            "and none is applied here",
            "merge it into the model and serve the merged one, or move it to a folder of its own",
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118  (not a mapping)
                    part = stored.get_slice(key)
                    found[key] = Header(tuple(part.get_shape()), part.get_dtype(), file)
        except (OSError, SafetensorError) as e:
            raise _no_safetensors(file, e) from None
    return found


def _files(directory: Path) -> list[Path]:
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    try:
        is_cut, is_whole = index.exists(), single.exists()
        names = sorted(path.name for path in directory.iterdir()) if not (is_cut or is_whole) else []
    except OSError as e:
        raise BadCheckpoint(f"{directory}: {e.strerror or e}", "mend the disk or the permissions") from None
    if is_cut:
        return _of_index(directory, index)
    if is_whole:
        return [single]
    if any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in names):
        raise BadCheckpoint(f"{index}: missing, but not the files that it is of", _AGAIN)
    hint = "pickled weights (.bin, .pt) are never read: export with save_pretrained"
    if any(name.lower().endswith(".gguf") for name in names) or "adapter_config.json" in names:
        hint = instead(directory)
    raise BadCheckpoint(f"{directory}: no model.safetensors and no {index.name}", hint)


def _of_index(directory: Path, index: Path) -> list[Path]:
    """The files that an index names; each is there."""
    try:
        names = sorted({str(n) for n in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise BadCheckpoint(
            f"{index}: not an index of safetensors files ({e!r})", "re-export the model"
        ) from None
    outside = [n for n in names if Path(n).name != n]
    if outside:
        raise BadCheckpoint(
            f"{index}: names a file outside the directory: {outside[0]}", "re-export the model"
        )
    files = [directory / n for n in names]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise BadCheckpoint(
            f"{directory}: {missing[0]} is missing ({len(missing)} of the {len(files)} files of {index.name})",
            "the download is not complete: get the rest",
        )
    return files


def _no_safetensors(file: Path, cause: Exception) -> BadCheckpoint:
    """Why a file cannot be opened, by how it begins."""
    try:
        with file.open("rb") as opened:
            begins = opened.read(len(_LFS))
    except OSError as e:
        return BadCheckpoint(f"{file}: {e.strerror or e}", "mend the disk or the permissions")
    if begins == _LFS:
        return BadCheckpoint(
            f"{file}: a pointer of git-lfs, not the weights", "get the file itself: `git lfs pull` there"
        )
    return BadCheckpoint(f"{file}: not a whole safetensors file ({cause})", _AGAIN)
