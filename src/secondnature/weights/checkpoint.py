"""Checkpoints: Hugging Face directories that the home owns (engine).

The home's working copy lies in `model/<version>/`; the link `model/current` names the one in force and is swapped
with one rename, so that a reader, or a crash, meets a whole checkpoint or the one before. The user's own
directory and the package's are only ever read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from secondnature import storage
from secondnature.errors import BadCheckpoint
from secondnature.model.load import TensorSpec, bystanders, plan

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "secondnature.json"
_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "card.json",
    "README.md",
    "LICENSE",
)


def read(directory: Path, dtypes: Mapping[str, torch.dtype] | None = None) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint by parameter name; checked against its config first.

    `dtypes` are the arena's, by name; what is not there is bf16, as everything is in the local engine.

    Raises:
        BadCheckpoint: missing, damaged, or not what config.json says.
        UnsupportedModel: the architecture or a dtype cannot be used.
    """
    tensors: dict[str, torch.Tensor] = {}
    by_file: dict[Path, list[TensorSpec]] = {}
    for spec in plan(directory):
        by_file.setdefault(spec.file, []).append(spec)
    for path, specs in by_file.items():
        try:
            with safe_open(path, framework="pt") as file:
                for spec in specs:
                    wanted = (dtypes or {}).get(spec.name, torch.bfloat16)
                    tensors[spec.name] = file.get_tensor(spec.key).to(wanted)
        except (SafetensorError, OSError) as e:
            raise BadCheckpoint(f"{path}: {e}", "get the checkpoint again") from None
    return tensors


def state(directory: Path) -> dict[str, Any]:
    """What `save` noted beside the weights; empty for a directory that is not ours."""
    path = directory / STATE_FILE
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise BadCheckpoint(f"{path}: {e}", "restore it from a backup") from None


def save(root: Path, source: Path, tensors: Mapping[str, torch.Tensor], note: dict[str, Any]) -> Path:
    """Write a whole, loadable checkpoint under `root/<version>/` and swap `root/current` to it.

    Args:
        root: the home's `model` directory.
        source: where config and tokenizer are copied from.
        tensors: the weights, by parameter name.
        note: what `state` gives back; must hold `version`.

    Raises:
        StorageError: the disk refused; the current checkpoint is as before.
    """
    storage.make_dir(root)
    taken = {p.name for p in root.iterdir()}
    name = str(note["version"])
    final = root / next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10**6))) if n not in taken)
    temporary = root / f".{note['version']}.{os.getpid()}.tmp"
    with storage.storage_errors(final):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            storage.make_dir(temporary)
            for name in _SIDE_FILES:
                if (source / name).is_file():
                    storage.write_bytes(temporary / name, (source / name).read_bytes())
            config = json.loads((source / "config.json").read_text())
            config.pop("torch_dtype", None)
            config["dtype"] = _main_dtype(tensors)
            if isinstance(config.get("text_config"), dict):
                config["text_config"]["dtype"] = config["dtype"]
            storage.write_text(temporary / "config.json", json.dumps(config, indent=2) + "\n")
            data = to_safetensors(_as_stored(source, tensors), metadata={"format": "pt"})
            storage.write_bytes(temporary / WEIGHTS_FILE, data)
            storage.write_text(temporary / STATE_FILE, json.dumps(note, indent=2) + "\n")
            temporary.rename(final)
            _swap(root, final.name)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    for other in root.iterdir():
        if other.name not in (final.name, "current"):
            shutil.rmtree(other, ignore_errors=True)
    return final


def _as_stored(source: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under the keys that `source` has for them, and what `source` holds beside them."""
    keys = {spec.name: spec.key for spec in plan(source)}
    found = {keys[name]: tensor.detach().contiguous() for name, tensor in tensors.items()}
    for key, path in bystanders(source).items():
        with safe_open(path, framework="pt") as file:
            found[key] = file.get_tensor(key)
    return found


def _main_dtype(tensors: Mapping[str, torch.Tensor]) -> str:
    """The dtype of the matrices: what a loader has to be told."""
    largest = max(tensors.values(), key=torch.Tensor.numel)
    return str(largest.dtype).removeprefix("torch.")


def _swap(root: Path, name: str) -> None:
    link = root / f".current.{os.getpid()}.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    link.replace(root / "current")
    storage.sync_dir(root)


def current(root: Path) -> Path | None:
    """The checkpoint in force under `root`; None before the first `save`."""
    link = root / "current"
    return link.resolve() if link.is_dir() else None
