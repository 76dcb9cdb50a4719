"""A tiny model in a GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

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
