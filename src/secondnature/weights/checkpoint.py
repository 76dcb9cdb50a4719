"""Checkpoints: Hugging Face directories that the home owns (engine).

The home's working copy lies in `model/<version>/`; the link `model/current` names the one in force and is swapped
with one rename, so that a reader, or a crash, meets a whole checkpoint or the one before. Weights are read and
written one tensor at a time. The user's own directory and the package's are only ever read; of the home's `model`
only what was made here is ever removed.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError

from secondnature import storage
from secondnature.errors import BadCheckpoint
from secondnature.model.chat import end_ids_of
from secondnature.model.load import TensorSpec, bystanders, plan
from secondnature.weights.content import Named, Weights, blocks, named
from secondnature.weights.tensor_file import DTYPES, Place, header, layout, read_into, read_places, spans

__all__ = ["clean", "current", "read", "save", "specs", "state", "stream"]

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "secondnature.json"
_SIDE_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".md"})
_SIDE_NAMES = frozenset({"LICENSE", "NOTICE", "USE_POLICY"})
_SIDE_FOLDERS = ("", "additional_chat_templates")
_MAX_SIDE_BYTES = 100_000_000
_PICKLES = (*(b"\x80" + bytes([version]) for version in range(2, 6)), b"PK\x03\x04")
"""How files begin that a loader might unpickle: pickle's protocols, and the archives that torch makes of them."""
_HINT = "get the checkpoint again"


def specs(directory: Path, dtypes: Mapping[str, torch.dtype] | None = None) -> dict[str, TensorSpec]:
    """Every parameter of a checkpoint, by name in the order of names, with the dtype that `stream` gives it.

    `dtypes` are the arena's, by name; what is not there is bf16, as everything is in the local engine. Only
    headers are read.

    Raises:
        BadCheckpoint: missing, damaged, or not what config.json says.
        UnsupportedModel: the architecture or a dtype cannot be used.
    """
    found = sorted(plan(directory), key=lambda spec: spec.name)
    return {s.name: replace(s, dtype=(dtypes or {}).get(s.name, torch.bfloat16)) for s in found}


def stream(directory: Path, dtypes: Mapping[str, torch.dtype] | None = None) -> Iterator[Named]:
    """All weights of a checkpoint, one after the other in the order of names; each is the caller's own memory.

    `dtypes` as in `specs`. The checkpoint is checked against its config before the first one is given.

    Raises: as `specs`.
    """
    wanted = specs(directory, dtypes)
    places: dict[Path, dict[str, Place]] = {}
    for spec in wanted.values():
        if spec.file not in places:
            try:
                places[spec.file] = read_places(spec.file)[0]
            except (SafetensorError, OSError, ValueError) as e:
                raise BadCheckpoint(f"{spec.file}: {e}", _HINT) from None
    return ((name, _read_tensor(spec, places[spec.file].get(spec.key))) for name, spec in wanted.items())


def _read_tensor(spec: TensorSpec, place: Place | None) -> torch.Tensor:
    """One tensor in memory of its own; where the file holds another dtype, converted block by block."""
    stored = {name: dtype for dtype, name in DTYPES.items()}.get(place.dtype) if place else None
    if place is None or stored is None or place.shape != spec.shape:
        raise BadCheckpoint(f"{spec.file}: tensor {spec.key} has changed since it was checked", _HINT)
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    flat = tensor.view(-1)
    try:
        with spec.file.open("rb") as file:
            for start, count in spans(place.nbytes):
                first, last = start // stored.itemsize, (start + count) // stored.itemsize
                part = flat[first:last]
                if stored != spec.dtype:
                    part = torch.empty(last - first, dtype=stored)
                read_into(file, place.start + start, part.view(torch.uint8).numpy().data)
                if stored != spec.dtype:
                    flat[first:last].copy_(part)
    except OSError as e:
        raise BadCheckpoint(f"{spec.file}: {e}", _HINT) from None
    return tensor


def read(directory: Path, dtypes: Mapping[str, torch.dtype] | None = None) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint at once, by parameter name, for models of which one more copy does not matter.

    Raises: as `specs`.
    """
    return dict(stream(directory, dtypes))


def state(directory: Path) -> dict[str, Any]:
    """What `save` noted beside the weights; empty for a directory that is not ours."""
    path = directory / STATE_FILE
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise BadCheckpoint(f"{path}: {e}", "restore it from a backup") from None


def save(
    root: Path,
    source: Path,
    tensors: Weights,
    note: dict[str, Any],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Path:
    """Write a whole, loadable checkpoint under `root/<version>/` and swap `root/current` to it.

    Args:
        root: the home's `model` directory.
        source: where config, tokenizer and whatever else a loader needs are copied from.
        tensors: the weights, by parameter name; an iterable is read once, in any order.
        note: what `state` gives back; must hold `version`.
        dtypes: of an iterable, as in `stream`; a mapping says it itself.

    Raises:
        StorageError: the disk refused; the current checkpoint is as before.
        BadCheckpoint: the tensors are not those of `source`; as before, too.
    """
    storage.make_dir(root)
    clean(root)
    taken = {p.name for p in root.iterdir()}
    name = str(note["version"])
    numbered = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    final = root / next(n for n in numbered if n not in taken)
    temporary = storage.temporary_name(root / name)
    if isinstance(tensors, Mapping):
        dtypes = {name: tensor.dtype for name, tensor in named(tensors)}
    wanted = specs(source, dtypes)
    with storage.storage_errors(final):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            storage.make_dir(temporary)
            _copy_side_files(source, temporary)
            _write_config(source, temporary, wanted)
            _write_ends(source, temporary)
            _write_weights(source, temporary / WEIGHTS_FILE, wanted, tensors)
            storage.write_text(temporary / STATE_FILE, json.dumps(note, indent=2) + "\n")
            temporary.rename(final)
            _swap(root, final.name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    for other in root.iterdir():
        if other != final and _is_ours(other):
            shutil.rmtree(other, ignore_errors=True)
    return final


def clean(root: Path) -> int:
    """Remove what crashes left in `root`: half-written checkpoints of processes that no longer live; how many."""
    return storage.clean(root)


def _is_ours(path: Path) -> bool:
    """A folder that `save` made: it notes a version and is named after it. Anything else is somebody's."""
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        version = str(state(path).get("version", ""))
    except BadCheckpoint:
        return False
    return bool(version) and (path.name == version or path.name.startswith(f"{version}-"))


def _copy_side_files(source: Path, target: Path) -> None:
    """What is needed beside the weights, to load what `source` is: tokenizer, templates, processors, card, license.

    Copied are regular files of at most 100 MB that are text or a tokenizer's (by suffix; `_SIDE_SUFFIXES`), and
    licenses; in the folder itself and in that of additional chat templates. Never weights, indexes of weights,
    code, hidden files, or whatever begins like a pickle; and no link that leads elsewhere than into the folder
    itself or to the blobs of the cache of hubs that it lies in.
    """
    for folder in _SIDE_FOLDERS:
        for path in sorted((source / folder).iterdir()) if (source / folder).is_dir() else []:
            name = path.name
            known = path.suffix in _SIDE_SUFFIXES or name.split(".")[0] in _SIDE_NAMES
            ours = name in (STATE_FILE, "config.json") or name.endswith(".index.json") or name.startswith(".")
            if not known or ours or not _stays_inside(source, path) or not path.is_file():
                continue
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size > _MAX_SIDE_BYTES or file.peek(4).startswith(_PICKLES):
                    continue
                storage.make_dir(target / folder)
                with storage.writing(target / folder / name) as copy:
                    shutil.copyfileobj(file, copy)


def _stays_inside(source: Path, path: Path) -> bool:
    """`snapshots/<revision>/config.json` of a hub's cache is a link to `blobs/<digest>` two folders above."""
    inside, where = source.resolve(), path.resolve()
    blobs = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else inside
    return where.is_relative_to(inside) or where.is_relative_to(blobs)


def _write_config(source: Path, target: Path, wanted: Mapping[str, TensorSpec]) -> None:
    """The source's, with the dtype of the matrices: what a loader has to be told."""
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    largest = max(wanted.values(), key=lambda spec: torch.Size(spec.shape).numel())
    config["dtype"] = str(largest.dtype).removeprefix("torch.")
    if isinstance(config.get("text_config"), dict):
        config["text_config"]["dtype"] = config["dtype"]
    storage.write_text(target / "config.json", json.dumps(config, indent=2) + "\n")


def _write_ends(source: Path, target: Path) -> None:
    """generation_config.json names all that ends an answer here, so that every engine ends it there."""
    path = target / "generation_config.json"
    ends = end_ids_of(source)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        settings = {}
    if not isinstance(settings, dict):
        settings = {}
    named = settings.get("eos_token_id")
    named = named if isinstance(named, list) else [] if named is None else [named]
    if ends - set(named):
        settings["eos_token_id"] = [*named, *sorted(ends - set(named))]
        storage.write_text(path, json.dumps(settings, indent=2) + "\n")


def _write_weights(source: Path, path: Path, wanted: Mapping[str, TensorSpec], tensors: Weights) -> None:
    """The weights under the keys that `source` has for them, and what `source` holds beside them."""
    entries = {
        spec.key: (DTYPES[spec.dtype], spec.shape, torch.Size(spec.shape).numel() * spec.dtype.itemsize)
        for spec in wanted.values()
    }
    beside: dict[str, tuple[Path, Place]] = {}
    for key, file in bystanders(source).items():
        beside[key] = (file, read_places(file)[0][key])
        entries[key] = (beside[key][1].dtype, beside[key][1].shape, beside[key][1].nbytes)
    order = layout(entries)
    head = header({key: entries[key] for key in order}, {"format": "pt"})
    starts, end = {}, len(head)
    for key in order:
        starts[key] = end
        end += entries[key][2]
    missing = dict(wanted)
    with storage.writing(path) as file:
        file.write(head)
        for key, (other, place) in beside.items():
            file.seek(starts[key])
            _copy_range(other, place, file)
        for name, tensor in named(tensors):
            spec = missing.pop(name, None)
            if spec is None or spec.shape != tuple(tensor.shape) or spec.dtype != tensor.dtype:
                raise BadCheckpoint(
                    f"tensor {name}, {tensor.dtype} {tuple(tensor.shape)}, is not one of {source}, or came twice",
                    "are these weights of another model?",
                )
            file.seek(starts[spec.key])
            file.writelines(block.data for block in blocks(tensor))
            del tensor  # before the next one is made
        if missing:
            raise BadCheckpoint(f"tensor {next(iter(missing))} was not given", "are the weights complete?")


def _copy_range(path: Path, place: Place, target: BinaryIO) -> None:
    """The bytes of one tensor as they are, from one file to another, block by block."""
    with path.open("rb") as file:
        for start, count in spans(place.nbytes):
            block = bytearray(count)
            read_into(file, place.start + start, memoryview(block))
            target.write(block)


def _swap(root: Path, name: str) -> None:
    link = root / f".current.{os.getpid()}.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    link.replace(root / "current")
    storage.sync_dir(root)


def current(root: Path) -> Path | None:
    """The checkpoint in force under `root`; None before the first `save`. Raises BadCheckpoint."""
    link = root / "current"
    try:
        return link.resolve() if link.is_dir() else None
    except OSError as e:
        raise BadCheckpoint(f"{link}: {e.strerror or e}", "mend the disk or the permissions") from None
