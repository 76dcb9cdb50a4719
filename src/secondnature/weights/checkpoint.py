"""Checkpoints: Hugging Face directories that the home owns (engine).

The home's working copy lies in `model/<version>/`; the link `model/current` names the one in force and is swapped
with one rename, so that a reader, or a crash, meets a whole checkpoint or the one before. Weights are read and
written one tensor at a time. The user's own directory and the package's are only ever read; of the home's `model`
only what was made here is ever removed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError

from secondnature import storage
from secondnature.errors import BadCheckpoint
from secondnature.model.chat import end_ids_of
from secondnature.model.gguf import SOURCE_FILE
from secondnature.model.load import TensorSpec, bystanders, plan
from secondnature.weights.content import Named, Weights, blocks, named
from secondnature.weights.tensor_file import DTYPES, Place, header, layout, read_into, read_places, spans

__all__ = ["STATE_FILE", "clean", "current", "export", "nbytes", "read", "save", "specs", "state", "stream"]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
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
    for file in {piece.file for spec in wanted.values() for piece in spec.pieces}:
        try:
            places[file] = read_places(file)[0]
        except (SafetensorError, OSError, ValueError) as e:
            raise BadCheckpoint(f"{file}: {e}", _HINT) from None
    return ((name, _read_tensor(spec, places)) for name, spec in wanted.items())


def _read_tensor(spec: TensorSpec, places: Mapping[Path, Mapping[str, Place]]) -> torch.Tensor:
    """One parameter in memory of its own, piece by piece."""
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    for piece in spec.pieces:
        place = places[piece.file].get(piece.key)
        if place is None or place.dtype != DTYPES[piece.dtype] or place.shape != piece.shape:
            raise BadCheckpoint(f"{piece.file}: tensor {piece.key} has changed since it was checked", _HINT)
        try:
            with piece.file.open("rb") as file:
                _read_piece(file, place, piece.dtype, piece.of(tensor))
        except OSError as e:
            raise BadCheckpoint(f"{piece.file}: {e}", _HINT) from None
    return tensor


def _read_piece(file: BinaryIO, place: Place, stored: torch.dtype, target: torch.Tensor) -> None:
    """A tensor of a file into a view of its shape: where it can, straight; else converted, block by block."""
    if not target.is_contiguous():
        whole = torch.empty(place.shape, dtype=stored)
        read_into(file, place.start, whole.view(-1).view(torch.uint8).numpy().data)
        target.copy_(whole)
        return
    flat = target.view(-1)
    for start, count in spans(place.nbytes):
        first, last = start // stored.itemsize, (start + count) // stored.itemsize
        part = flat[first:last]
        if stored != target.dtype:
            part = torch.empty(last - first, dtype=stored)
        read_into(file, place.start + start, part.view(torch.uint8).numpy().data)
        if stored != target.dtype:
            flat[first:last].copy_(part)


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
            _write_all(temporary, source, tensors, note, wanted, sharded=False)
            temporary.rename(final)
            _swap(root, final.name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    for other in root.iterdir():
        if other != final and _is_ours(other):
            shutil.rmtree(other, ignore_errors=True)
    return final


def export(
    directory: Path,
    source: Path,
    tensors: Weights,
    note: dict[str, Any],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write a whole, loadable checkpoint for whoever else serves the model; in as many files as `source` has.

    Args:
        directory: made here; where this raises, what was written so far is the caller's to remove.
        source, note, dtypes: as in `save`.
        tensors: read once, in any order; at most one is in memory.

    Raises:
        StorageError: the disk refused, or has no room for it.
        BadCheckpoint: the tensors are not those of `source`.
    """
    wanted = specs(source, dtypes)
    storage.check_room(directory.parent, nbytes(source, dtypes))
    _write_all(directory, source, tensors, note, wanted, sharded=True)


def nbytes(source: Path, dtypes: Mapping[str, torch.dtype] | None = None) -> int:
    """Bytes of a checkpoint's tensors as `export` writes them. Raises: as `specs`."""
    mine = sum(torch.Size(s.shape).numel() * s.dtype.itemsize for s in specs(source, dtypes).values())
    return mine + sum(read_places(file)[0][key].nbytes for key, file in bystanders(source).items())


def _write_all(
    directory: Path,
    source: Path,
    tensors: Weights,
    note: Mapping[str, Any],
    wanted: Mapping[str, TensorSpec],
    *,
    sharded: bool,
) -> None:
    """A new directory with everything that a loader needs."""
    with storage.storage_errors(directory):
        storage.make_dir(directory)
        _copy_side_files(source, directory)
        _write_config(source, directory, wanted)
        _write_ends(source, directory)
        _write_weights(source, directory, wanted, tensors, sharded=sharded)
        storage.write_text(directory / STATE_FILE, json.dumps(note, indent=2) + "\n")


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
    adapters, code, hidden files, or whatever begins like a pickle; and no link that leads elsewhere than into the
    folder itself or to the blobs of the cache of hubs that it lies in.
    """
    for folder in _SIDE_FOLDERS:
        for path in sorted((source / folder).iterdir()) if (source / folder).is_dir() else []:
            name = path.name
            known = path.suffix in _SIDE_SUFFIXES or name.split(".")[0] in _SIDE_NAMES
            ours = (
                name in (STATE_FILE, "config.json", "adapter_config.json", SOURCE_FILE)
                or name.endswith(".index.json")
                or name.startswith(".")
            )
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
    for told in ("torch_dtype", "quantization_config", "quantization", "auto_map"):
        config.pop(told, None)  # what is written is not quantised, and comes without code
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


def _write_weights(
    source: Path, directory: Path, wanted: Mapping[str, TensorSpec], tensors: Weights, *, sharded: bool
) -> None:
    """The weights under the keys that `source` has for them, and what `source` holds beside them.

    `sharded`: in as many files as there, each key where it was; else in one.
    """
    entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    where: dict[str, Path] = {}
    beside: dict[str, Place] = {}
    for spec in wanted.values():
        for piece in spec.pieces:
            count = torch.Size(piece.shape).numel()
            entries[piece.key] = (DTYPES[spec.dtype], piece.shape, count * spec.dtype.itemsize)
            where[piece.key] = piece.file
    for key, file in bystanders(source).items():
        place = beside[key] = read_places(file)[0][key]
        entries[key] = (place.dtype, place.shape, place.nbytes)
        where[key] = file
    names = _file_names(set(where.values())) if sharded else dict.fromkeys(where.values(), WEIGHTS_FILE)
    starts: dict[str, int] = {}
    missing = dict(wanted)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(storage.writing(directory / name)) for name in set(names.values())}
        for name, file in files.items():
            mine = {key: entry for key, entry in entries.items() if names[where[key]] == name}
            order = layout(mine)
            head = header({key: mine[key] for key in order}, {"format": "pt"})
            file.write(head)
            end = len(head)
            for key in order:
                starts[key] = end
                end += mine[key][2]
        for key, place in beside.items():
            file = files[names[where[key]]]
            file.seek(starts[key])
            _copy_range(where[key], place, file)
        for name, tensor in named(tensors):
            spec = missing.pop(name, None)
            if spec is None or spec.shape != tuple(tensor.shape) or spec.dtype != tensor.dtype:
                raise BadCheckpoint(
                    f"tensor {name}, {tensor.dtype} {tuple(tensor.shape)}, is not one of {source}, or came twice",
                    "are these weights of another model?",
                )
            for piece in spec.pieces:
                file = files[names[piece.file]]
                file.seek(starts[piece.key])
                file.writelines(block.data for block in blocks(piece.of(tensor).contiguous()))
            del tensor  # before the next one is made
        if missing:
            raise BadCheckpoint(f"tensor {next(iter(missing))} was not given", "are the weights complete?")
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(entry[2] for entry in entries.values())},
            "weight_map": {key: names[where[key]] for key in sorted(where)},
        }
        storage.write_text(directory / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _file_names(files: Collection[Path]) -> dict[Path, str]:
    """What the files of a checkpoint are called, as the hub has it."""
    if len(files) == 1:
        return dict.fromkeys(files, WEIGHTS_FILE)
    numbered = enumerate(sorted(files), start=1)
    return {file: f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, file in numbered}


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
