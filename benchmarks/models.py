"""Random hybrid models (Qwen3.5's shape: three GatedDeltaNet layers, then one of attention) of a wanted size.

Speed does not depend on what a model has learned. The recurrence is initialised so that it remembers, as in a
trained model. Weights are fp32 in one directory, so that ours and the peer's start from the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

from secondnature.model.load import build, plan
from secondnature.weights.arena import Arena


@dataclass(frozen=True)
class Size:
    """Of a model; heads are 64 wide."""

    hidden: int
    layers: int
    vocabulary: int = 4096

    def config(self, max_tokens: int) -> Qwen3_5TextConfig:
        """Every fourth layer has attention; the head is the embedding."""
        heads = self.hidden // 64
        settings: dict[str, Any] = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": 5 * self.hidden // 2,
            "num_hidden_layers": self.layers,
            "layer_types": [
                "full_attention" if i % 4 == 3 else "linear_attention" for i in range(self.layers)
            ],
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 4),
            "head_dim": 64,
            "linear_num_key_heads": heads,
            "linear_num_value_heads": heads,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "max_position_embeddings": max_tokens,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
        }
        return Qwen3_5TextConfig(**settings)


TINY = Size(hidden=128, layers=4, vocabulary=512)
SMALL = Size(hidden=512, layers=4)
"""15 million parameters."""


@torch.no_grad()
def save(size: Size, directory: Path, *, max_tokens: int, seed: int = 0) -> Path:
    """A model directory with random fp32 weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(size.config(max_tokens), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(0, math.log(16))
            elif name.endswith("dt_bias"):
                dt = torch.empty_like(parameter).uniform_(math.log(1e-3), math.log(1e-1)).exp()
                parameter.copy_(dt + torch.log(-torch.expm1(-dt)))
        model.save_pretrained(directory)
    return directory


def in_arena(directory: Path, dtype: torch.dtype) -> tuple[Arena, nn.Module]:
    """The product's path: weights of that dtype in an arena, the model around them; it computes in fp32."""
    weights: dict[str, Tensor] = {}
    for spec in plan(directory):
        with safe_open(spec.file, framework="pt") as stored:
            weights[spec.name] = stored.get_tensor(spec.key).to(dtype)
    arena = Arena.create(weights)
    return arena, build(directory, arena.tensors, compute_dtype=torch.float32)


def stock(directory: Path) -> Any:
    """The same weights in fp32 as transformers itself loads them."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, attn_implementation="sdpa"
    )
    return model.eval()


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def random_ids(vocabulary: int, count: int, *, seed: int) -> list[int]:
    """Token ids, never the pad."""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocabulary, (count,), generator=source).tolist()
