"""One GGUF file becomes a model directory, once: the values that transformers reads of it, rounded to bf16."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from secondnature.errors import BadCheckpoint, SecondnatureError
from secondnature.model.gguf import directory_of
from secondnature.model.load import build, skeleton
from secondnature.weights import checkpoint

D, FF, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2


def write(path: Path) -> Path:
    """A Llama of two layers with matrices in Q8_0, and a byte-level tokenizer."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(FF)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(D // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [bytes([b]).decode("latin-1") for b in range(33, 127)] + ["<|end|>", "ab"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 94 + [3, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(94)
    writer.add_bos_token_id(94)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
    shapes = {"token_embd": (len(tokens), D), "output": (len(tokens), D)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_q": (D, D), f"blk.{i}.attn_output": (D, D)}
        shapes |= {f"blk.{i}.attn_k": (D // 2, D), f"blk.{i}.attn_v": (D // 2, D)}
        shapes |= {f"blk.{i}.ffn_gate": (FF, D), f"blk.{i}.ffn_up": (FF, D), f"blk.{i}.ffn_down": (D, FF)}
        shapes |= {f"blk.{i}.attn_norm": (D,), f"blk.{i}.ffn_norm": (D,)}
    for name, shape in {**shapes, "output_norm": (D,)}.items():
        values = rng.standard_normal(shape).astype(np.float32) * 0.2
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values + 1)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_is_what_transformers_reads_and_is_made_once(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    directory = directory_of(path, tmp_path / "cache")
    found = checkpoint.read(directory)
    wanted = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton(directory))[
        "tensors"
    ]
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], torch.as_tensor(wanted[n]).bfloat16()) for n in wanted)
    build(directory, found)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.chat_template
    config = json.loads((directory / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    before = (directory / "config.json").stat().st_mtime_ns
    assert directory_of(path, tmp_path / "cache") == directory
    assert (directory / "config.json").stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes() + b"\0")
    assert directory_of(path, tmp_path / "cache") != directory, "another file, another directory"


def test_a_file_that_is_none_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    path.write_bytes(b"PK" + whole[2:])
    with pytest.raises(BadCheckpoint, match="not a GGUF file"):
        directory_of(path, tmp_path / "cache")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SecondnatureError, match=r"tiny\.gguf"):
        directory_of(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
