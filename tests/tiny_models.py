"""Real small models built from configs: a GatedDeltaNet hybrid, a dense one, a GPT-2; random weights in bf16.

Shapes are chosen so that nothing is accidentally square: fewer key than value heads, fewer key/value than query
heads, partial rotary positions. The recurrence is initialised so that it remembers (the library's own default
forgets within a token), norms are away from one, so that every tensor has a gradient worth comparing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
)

from secondnature.model.load import build, plan
from secondnature.weights.arena import Arena

VOCAB_SIZE = 97


def hybrid_config(**changes: Any) -> Qwen3_5TextConfig:
    """Three GatedDeltaNet layers, one attention layer, one more GatedDeltaNet; tied head."""
    kinds = ["linear_attention"] * 3 + ["full_attention", "linear_attention"]
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 5,
        "layer_types": kinds,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    return Qwen3_5TextConfig(**{**settings, **changes})


def dense_config(**changes: Any) -> Qwen3Config:
    """Qwen3: three attention layers with normed queries and keys; head of its own."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    return Qwen3Config(**{**settings, **changes})


def llama_config(**changes: Any) -> LlamaConfig:
    """Llama: biases on request (`attention_bias`, `mlp_bias`), scaled rotary positions, head of its own."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }
    return LlamaConfig(**{**settings, **changes})


def gpt2_config(**changes: Any) -> GPT2Config:
    """GPT-2: learned positions, biases everywhere, Conv1D, tied head."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 48,
        "n_inner": 80,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 256,
        "resid_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "initializer_range": 0.05,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2Config(**{**settings, **changes})


CONFIGS = {"hybrid": hybrid_config, "dense": dense_config, "gpt2": gpt2_config}


@torch.no_grad()
def save_tiny(config: PretrainedConfig, directory: Path, *, seed: int = 0) -> Path:
    """A model directory (config.json, model.safetensors in bf16) with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(0, math.log(16))
            elif name.endswith("dt_bias"):
                dt = torch.empty_like(parameter).uniform_(math.log(1e-3), math.log(1e-1)).exp()
                parameter.copy_(dt + torch.log(-torch.expm1(-dt)))
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All parameters of a model directory, in bf16."""
    weights: dict[str, Tensor] = {}
    for spec in plan(directory):
        with safe_open(spec.file, framework="pt") as stored:
            weights[spec.name] = stored.get_tensor(spec.key).to(torch.bfloat16)
    return weights


def engine_tensors(weights: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A model's weights as vLLM keeps them (tensor parallel size 1), by its rules spelled out here."""
    rest = dict(weights)
    found: dict[str, Tensor] = {}

    def fuse(stem: str, whole: str, *parts: str) -> None:
        for leaf in ("weight", "bias"):
            names = [f"{stem}.{part}.{leaf}" for part in parts]
            if names[0] in rest:
                found[f"{prefix}{stem}.{whole}.{leaf}"] = torch.cat([rest.pop(n) for n in names])

    for layer in sorted(
        {name.rsplit(".layers.", 1)[1].split(".")[0] for name in weights if ".layers." in name}
    ):
        stem = f"model.layers.{layer}"
        fuse(f"{stem}.self_attn", "qkv_proj", "q_proj", "k_proj", "v_proj")
        fuse(f"{stem}.mlp", "gate_up_proj", "gate_proj", "up_proj")
        fuse(f"{stem}.linear_attn", "in_proj_qkvz", "in_proj_qkv", "in_proj_z")
        fuse(f"{stem}.linear_attn", "in_proj_ba", "in_proj_b", "in_proj_a")
    for name, tensor in rest.items():
        if "embed_tokens" in name or "lm_head" in name:
            grown = torch.zeros(-(-len(tensor) // 64) * 64, tensor.shape[1], dtype=tensor.dtype)
            grown[: len(tensor)] = tensor
            found[prefix + name] = grown
        else:
            found[prefix + name] = tensor.float() if name.endswith("A_log") else tensor.clone()
    return found


def in_arena(directory: Path, *, compute_dtype: torch.dtype | None = None) -> tuple[Arena, nn.Module]:
    """The product's path: weights into an arena, the model around the arena's memory."""
    arena = Arena.create(read_weights(directory))
    return arena, build(directory, arena.tensors, compute_dtype=compute_dtype)
