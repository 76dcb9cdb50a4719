"""A GGUF file of the kept weights: read back by others it holds the same numbers, and says the same of the
model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tiny_gguf import write as write_tiny
from tiny_models import dense_config, gpt2_config, llama_config, save_tiny
from tiny_server import save_tokenizer
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PretrainedConfig, Qwen2Config
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from secondnature.errors import BadCheckpoint, UnsupportedModel
from secondnature.model import gguf as reading
from secondnature.model.load import skeleton
from secondnature.weights import checkpoint, gguf

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def fields(path: Path) -> dict[str, Any]:
    return {k: f.contents() for k, f in GGUFReader(path).fields.items() if not k.startswith("GGUF.")}


def test_what_a_file_said_of_the_model_is_carried_over(tmp_path: Path) -> None:
    """Tokens, merges, template, sizes; other are only the tensors and how they are stored."""
    source = write_tiny(tmp_path / "tiny.gguf")
    model = reading.directory_of(source, tmp_path / "cache")
    weights = {n: t + 0.25 for n, t in checkpoint.read(model).items()}
    out = tmp_path / "out.gguf"
    counts = gguf.write(out, weights.items(), model, "bf16", {"lessons": ["0001-use"]})
    assert counts == {"bf16": 16, "f32": 5}
    said, was = fields(out), fields(source)
    assert {k: said[k] for k in was if k != "general.file_type"} == {
        k: v for k, v in was.items() if k != "general.file_type"
    }
    assert said["secondnature.export"] == '{"lessons": ["0001-use"]}'
    assert said["general.file_type"] == 32
    again = reading.directory_of(out, tmp_path / "cache")  # our own reader
    found = checkpoint.read(again)
    assert set(found) == set(weights)
    assert all(torch.equal(found[n], weights[n]) for n in weights)
    one, other = (AutoTokenizer.from_pretrained(d) for d in (model, again))
    assert one.get_vocab() == other.get_vocab()
    assert one.chat_template == other.chat_template
    source.write_bytes(source.read_bytes() + b"x")  # it is another file now: its words are not taken
    assert reading.source_of(model) is None


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (LlamaConfig(**SIZES), "bf16"),
        (LlamaConfig(**SIZES, tie_word_embeddings=True), "f16"),
        (LlamaConfig(**SIZES), "q8_0"),
        (Qwen2Config(**SIZES), "bf16"),
        (dense_config(**SIZES), "bf16"),
    ],
    ids=["llama-bf16", "tied-f16", "llama-q8_0", "qwen2", "qwen3"],
)
def test_transformers_reads_the_same_model(
    config: PretrainedConfig, dtype: gguf.GgufDtype, tmp_path: Path
) -> None:
    """To the bit (bf16, and fp16 as far as it holds bf16), or within half a step of eight bits, itself in fp16."""
    model = save_tiny(config, tmp_path / "model")
    save_tokenizer(model)
    weights = checkpoint.read(model)
    out = tmp_path / "out.gguf"
    gguf.write(out, weights.items(), model, dtype, {})
    assert out.stat().st_size >= gguf.nbytes(model, dtype)
    theirs: Any = AutoConfig.from_pretrained(tmp_path, gguf_file="out.gguf")
    read = (
        [] if config.model_type == "qwen3" else ["head_dim"]
    )  # transformers takes 128, whatever the file says
    for key in (*SIZES, "rms_norm_eps", *read):
        assert getattr(theirs, key, None) == pytest.approx(getattr(config, key, None)), key
    loaded = load_gguf_checkpoint(str(out), return_tensors=True, model_to_load=skeleton(model))["tensors"]
    for name, tensor in weights.items():
        found, wanted = loaded[name], tensor.float()
        if dtype == "q8_0" and tensor.ndim > 1 and tensor.shape[-1] % 32 == 0:
            blocks = wanted.reshape(-1, 32)
            step = blocks.abs().amax(1, keepdim=True) / 127
            off = (found.reshape(-1, 32) - blocks).abs()
            least = 127 * 2.0**-24  # the step itself is stored in fp16: 11 bits, none below 2^-24
            assert bool((off <= step * (0.5 + 127 / 2048) + least).all()), name
            assert float(off.max()) > 0
        elif dtype == "bf16" or tensor.ndim == 1:
            assert torch.equal(found, wanted), name
        else:
            assert torch.equal(found, tensor.to(torch.float16).float()), name
    tokenizer, said = AutoTokenizer.from_pretrained(model), fields(out)
    assert said["tokenizer.ggml.pre"] == "gpt-2"
    assert said["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert said["tokenizer.chat_template"] == tokenizer.chat_template
    if config.model_type == "llama":  # of others, transformers makes another tokenizer than the files say
        back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
        text = "Use tea. Why not oak?"
        assert back(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_what_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    for name, config, said in (
        ("gpt2", gpt2_config(), "model_type 'gpt2' cannot be written"),
        ("scaled", llama_config(), r"scaled rotary positions \(llama3\)"),
    ):
        model = save_tiny(config, tmp_path / name)
        save_tokenizer(model)
        with pytest.raises(UnsupportedModel, match=said):
            gguf.check(model)
    model = save_tiny(LlamaConfig(**SIZES), tmp_path / "model")
    save_tokenizer(model)
    text = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(text.replace('"use_regex": true', '"use_regex": false'))
    assert text != (model / "tokenizer.json").read_text()
    with pytest.raises(UnsupportedModel, match="how this tokenizer cuts texts"):
        gguf.check(model)
    (model / "tokenizer.json").write_text(text)
    weights = checkpoint.read(model)
    big = {**weights, "lm_head.weight": weights["lm_head.weight"] * 1e8}
    with pytest.raises(UnsupportedModel, match="fp16 cannot hold"):
        gguf.write(tmp_path / "x.gguf", big.items(), model, "f16", {})
    short = [(n, t) for n, t in weights.items() if n != "model.norm.weight"]
    with pytest.raises(BadCheckpoint, match="was not given"):
        gguf.write(tmp_path / "y.gguf", short, model, "bf16", {})


def test_a_layout_that_is_not_undone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were queries and keys written as they are, llama.cpp would compute with others: it is seen before."""
    model = save_tiny(LlamaConfig(**SIZES), tmp_path / "model")
    save_tokenizer(model)
    monkeypatch.setattr(gguf, "_placed", lambda values, *_: values)
    with pytest.raises(UnsupportedModel, match=r"q_proj|k_proj"):
        gguf.write(tmp_path / "x.gguf", checkpoint.read(model).items(), model, "bf16", {})
