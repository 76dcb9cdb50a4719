"""The kept weights as one GGUF file, for who serves with llama.cpp or Ollama (engine; needs the package `gguf`).

Written is what transformers reads back as the same tensors: each is put into the layout of the format, and back by
the library's own reader, and compared before it is written; an architecture for which that does not give the same
bits is refused by name. Norms and other vectors are stored in fp32, matrices as was asked. What a .gguf file said
of the model (tokens, merges, template, sizes) is carried over where the model was made of one; else it is written
from config.json and tokenizer.json, for tokenizers whose splitting llama.cpp knows by name. One tensor is in
memory at a time.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from secondnature import storage
from secondnature.errors import BadCheckpoint, ConfigError, UnsupportedModel
from secondnature.model.chat import end_ids_of, read_tokenizer
from secondnature.model.gguf import source_of
from secondnature.model.load import read_config, skeleton
from secondnature.weights.checkpoint import specs
from secondnature.weights.content import Named

__all__ = ["GgufDtype", "check", "nbytes", "write"]

GgufDtype = Literal["bf16", "f16", "q8_0"]
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""model_type -> what llama.cpp calls it."""
_FILE_TYPES = {"f16": 1, "q8_0": 7, "bf16": 32}
_Q8_BLOCK, _Q8_BLOCK_BYTES = 32, 34
_MAX_F16 = 65504.0
_OWN = ("GGUF.", "general.file_type", "general.quantization_version", "general.alignment", "split.")
"""Keys of a source that say how its file is, and not what the model is."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS + r"\p{N}" + _REST: "qwen2", _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe"}
_CONTROL, _USER_DEFINED, _NORMAL = 3, 4, 1


def check(directory: Path) -> str:
    """What llama.cpp calls the architecture of a model that can be written.

    Raises:
        ConfigError: the package `gguf` is not installed.
        UnsupportedModel: it cannot be written; says why.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("the package that writes GGUF files is missing", "pip install gguf")
    config = read_config(directory)
    architecture = _ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise UnsupportedModel(
            f"{directory}: model_type {config.model_type!r} cannot be written as GGUF; expected one of "
            f"{', '.join(sorted(_ARCHITECTURES))}",
            "export the checkpoint, and convert it with llama.cpp's convert_hf_to_gguf.py",
        )
    if source_of(directory) is None:
        _hyperparameters(directory, config)
        _tokenizer(directory)
    return architecture


def nbytes(directory: Path, dtype: GgufDtype) -> int:
    """Bytes of the tensors of such a file. Raises: as `checkpoint.specs`."""
    return sum(_nbytes(spec.shape, _kind(spec.shape, dtype)) for spec in specs(directory).values())


def write(
    path: Path, tensors: Iterable[Named], directory: Path, dtype: GgufDtype, note: dict[str, Any]
) -> dict[str, int]:
    """Write the file; how many tensors are stored in which way.

    Args:
        path: made here; where this raises, what was written so far is the caller's to remove.
        tensors: all of the model's, in the order of names.
        directory: the model's.
        note: kept in the file, as JSON under `secondnature.export`.

    Raises:
        ConfigError, UnsupportedModel: as `check`; or a tensor would not be read back as it is.
        StorageError: the disk refused, or has no room for it.
    """
    architecture = check(directory)
    storage.check_room(path.parent, nbytes(directory, dtype))
    from gguf import GGMLQuantizationType, GGUFWriter, quants
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    config = read_config(directory)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    known = get_gguf_hf_weights_map(skeleton(directory), processor, model_type=architecture)
    names = {theirs: mine for mine, theirs in known.items()}
    wanted = specs(directory)
    writer = GGUFWriter(path, architecture)
    counts: dict[str, int] = {}
    try:
        _write_keys(writer, directory, architecture, dtype, note)
        for name, spec in wanted.items():
            if name not in names:
                raise UnsupportedModel(
                    f"tensor {name} has no name in a GGUF file of {architecture}",
                    "export the checkpoint instead",
                )
            kind = _kind(spec.shape, dtype)
            counts[kind] = counts.get(kind, 0) + 1
            shape = list(spec.shape)
            if kind == "q8_0":
                shape[-1] = shape[-1] // _Q8_BLOCK * _Q8_BLOCK_BYTES
            if kind == "bf16":
                shape[-1] *= 2
            raw = GGMLQuantizationType[kind.upper()] if kind in ("bf16", "q8_0") else None
            stored = np.dtype(np.uint8 if raw is not None else np.float16 if kind == "f16" else np.float32)
            writer.add_tensor_info(names[name], shape, stored, _nbytes(spec.shape, kind), raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        expected = iter(wanted)
        for name, tensor in tensors:
            if name != next(expected, None) or tuple(tensor.shape) != wanted[name].shape:
                raise BadCheckpoint(
                    f"tensor {name} is not the next one of {directory}", "is it of another model?"
                )
            values = tensor.float().contiguous()
            placed = _placed(values.numpy(), names[name], architecture, config)
            back = processor.process(
                weights=placed, name=names[name], tensor_key_mapping=known, parsed_parameters={}
            )
            if not np.array_equal(back.weights, values.numpy()) or back.name != names[name]:
                raise UnsupportedModel(
                    f"tensor {name} would not be read back from a GGUF file as it is",
                    "export the checkpoint instead",
                )
            kind = _kind(wanted[name].shape, dtype)
            writer.write_tensor_data(_stored(name, placed, kind, quants))
            del tensor, values, placed, back  # before the next one is made
        missing = next(expected, None)
        if missing is not None:
            raise BadCheckpoint(f"tensor {missing} was not given", "are the weights complete?")
    finally:
        writer.close()
    return counts


def _kind(shape: tuple[int, ...], dtype: GgufDtype) -> str:
    """How a tensor is stored: vectors in fp32; rows that are no whole blocks of eight bits in fp16."""
    if len(shape) == 1:
        return "f32"
    return "f16" if dtype == "q8_0" and shape[-1] % _Q8_BLOCK else dtype


def _nbytes(shape: tuple[int, ...], kind: str) -> int:
    count = torch.Size(shape).numel()
    if kind == "q8_0":
        return count // _Q8_BLOCK * _Q8_BLOCK_BYTES
    return count * (4 if kind == "f32" else 2)


def _placed(values: Any, name: str, architecture: str, config: Any) -> Any:
    """A tensor as the format has it: of llama, queries and keys with the halves of each head's rows interleaved."""
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    found = next((n for part, n in heads.items() if part in name), None)
    if architecture != "llama" or found is None:
        return values
    rows = values.reshape(found, 2, values.shape[0] // found // 2, *values.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(values.shape))


def _stored(name: str, values: Any, kind: str, quants: Any) -> Any:
    """The bytes of a tensor (fp32 in), in numpy's terms. Raises UnsupportedModel: it does not fit."""
    if kind == "f32":
        return values
    if kind == "bf16":
        return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint8).numpy()
    if float(np.abs(values).max(initial=0.0)) > _MAX_F16:
        raise UnsupportedModel(f"tensor {name} has values that fp16 cannot hold", "export it as bf16")
    if kind == "f16":
        return values.astype(np.float16)
    from gguf import GGMLQuantizationType

    return quants.quantize(values, GGMLQuantizationType.Q8_0)


# ------------------------------------------------------------------------------------------ what the file says


def _write_keys(
    writer: Any, directory: Path, architecture: str, dtype: GgufDtype, note: dict[str, Any]
) -> None:
    """Everything but the tensors: of the file that the model was made of, or of its config and tokenizer."""
    from gguf import GGML_QUANT_VERSION, GGUFReader, GGUFValueType

    source = source_of(directory)
    if source is not None:
        for key, found in GGUFReader(source).fields.items():
            if key.startswith(_OWN) or key == "general.architecture":
                continue
            kind = found.types[0]
            writer.add_key_value(
                key, found.contents(), kind, found.types[-1] if kind == GGUFValueType.ARRAY else None
            )
    else:
        writer.add_type("model")
        writer.add_name(directory.name)
        config = read_config(directory)
        for key, value in _hyperparameters(directory, config).items():
            whole = f"{architecture}.{key}"
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(whole, value)
        for key, value in _tokenizer(directory).items():
            whole = key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}"
            if isinstance(value, list):
                writer.add_array(whole, value)
            elif isinstance(value, bool):
                writer.add_bool(whole, value)
            elif isinstance(value, int):
                writer.add_uint32(whole, value)
            else:
                writer.add_string(whole, value)
    writer.add_string("secondnature.export", json.dumps(note))
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _hyperparameters(directory: Path, config: Any) -> dict[str, int | float]:
    """The sizes that llama.cpp reads, without the architecture's name. Raises UnsupportedModel: it knows no
    such."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if (
        kind != "default"
        or getattr(config, "use_sliding_window", False)
        or (config.model_type == "mistral" and getattr(config, "sliding_window", None))
    ):
        what = f"scaled rotary positions ({kind})" if kind != "default" else "a sliding window"
        raise UnsupportedModel(
            f"{directory}: {what} cannot be written as GGUF here",
            "export the checkpoint, and convert it with llama.cpp's convert_hf_to_gguf.py",
        )
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "vocab_size": config.vocab_size,
    }


def _tokenizer(directory: Path) -> dict[str, Any]:
    """What llama.cpp has to know of the tokens. Raises UnsupportedModel: it would cut texts otherwise."""
    raw = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    model, size = raw["model"], read_config(directory).vocab_size
    split = _split(raw.get("pre_tokenizer"))
    if model.get("type") != "BPE" or model.get("byte_fallback") or split is None or raw.get("normalizer"):
        raise UnsupportedModel(
            f"{directory}: llama.cpp knows no name for how this tokenizer cuts texts",
            "export the checkpoint, and convert it with llama.cpp's convert_hf_to_gguf.py",
        )
    texts, kinds = dict[int, str](), dict[int, int]()
    for text, number in model["vocab"].items():
        texts[number], kinds[number] = text, _NORMAL
    for added in raw.get("added_tokens", []):
        texts[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    tokenizer = read_tokenizer(directory)
    found: dict[str, Any] = {
        "model": "gpt2",
        "pre": split,
        "tokens": [texts.get(i, f"[PAD{i}]") for i in range(size)],
        "token_type": [kinds.get(i, 5) for i in range(size)],
        "merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        "add_bos_token": bool(getattr(tokenizer, "add_bos_token", False)),
        "add_space_prefix": False,
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None and number < size:
            found[f"{key}_token_id"] = int(number)
    others = sorted(end_ids_of(directory) - {found.get("eos_token_id")})
    if others:
        found["eot_token_id"] = others[0]
    if isinstance(tokenizer.chat_template, str):
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _split(pre_tokenizer: Any) -> str | None:
    """llama.cpp's name for how a text is cut before it is merged; None: it has none."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, dict) else []
    kinds = [step.get("type") for step in steps]
    if not steps or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    by_itself = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and by_itself:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and by_itself and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not by_itself:
        step = steps[0]
        if step.get("behavior") == "Isolated" and not step.get("invert"):
            return _SPLITS.get(step.get("pattern", {}).get("Regex"))
    return None
