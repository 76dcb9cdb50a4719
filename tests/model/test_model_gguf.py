"""One GGUF file becomes a model directory, once: the values that transformers reads of it, rounded to bf16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_gguf import write
from transformers import AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from secondnature.errors import BadCheckpoint, SecondnatureError
from secondnature.model.gguf import directory_of
from secondnature.model.load import build, skeleton
from secondnature.weights import checkpoint


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
