"""The model's shape and how its weights begin: a Qwen3.5 text hybrid of four million parameters.

Six GatedDeltaNet layers and two of attention (3:1). GatedDeltaNet key and value heads have 64 dimensions each, the
shape that vLLM's CPU kernels accept. The output head is tied to the embedding: vLLM then holds one tensor, so an
in-place lesson writes one place; the untied head would add 0.2M parameters that this vocabulary does not need.
transformers starts every GatedDeltaNet head with dt_bias = 1, which forgets within a token; heads are started here
as Mamba does (Gu and Dao 2023, section 3.6): time steps log-uniform in [1e-3, 1e-1], so memories begin between one
token and hundreds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

DT_RANGE = (1e-3, 1e-1)


def text_config(vocab_size: int, pad_id: int, eos_id: int, **changes: Any) -> Qwen3_5TextConfig:
    """The configuration of the shipped model; `changes` override single fields (tests use tiny ones)."""
    from transformers import Qwen3_5TextConfig

    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 3,
        "pad_token_id": pad_id,
        "eos_token_id": eos_id,
        "bos_token_id": None,
    }
    return Qwen3_5TextConfig(**{**fields, **changes})


def fresh_model(config: Qwen3_5TextConfig, seed: int) -> Qwen3_5ForCausalLM:
    """A model in fp32 with weights drawn from `seed`."""
    import torch
    from transformers import Qwen3_5ForCausalLM

    torch.manual_seed(seed)
    model = Qwen3_5ForCausalLM(config)
    low, high = (math.log(x) for x in DT_RANGE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                dt = torch.empty_like(parameter).uniform_(low, high).exp()
                parameter.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
            elif name.endswith("A_log"):
                parameter.copy_(torch.empty_like(parameter).uniform_(1.0, 16.0).log())
    return model


def decay_lengths(log_decays: dict[int, Any]) -> dict[str, list[dict[str, float]]]:
    """Effective memory of every GatedDeltaNet head in tokens; `log_decays[layer]` = g [N, H] <= 0 at N tokens.

    `mean` is 1 / mean(-g), which single tokens that clear the state pull down; `median` is 1 / median(-g), what the
    head does at most tokens.
    """
    lengths: dict[str, list[dict[str, float]]] = {}
    for layer, g in sorted(log_decays.items()):
        rate = -g.double()
        mean, median = rate.mean(0).clamp_min(1e-9), rate.median(0).values.clamp_min(1e-9)
        lengths[f"layer_{layer}"] = [
            {"mean": round(float(1.0 / a), 2), "median": round(float(1.0 / b), 2)}
            for a, b in zip(mean, median, strict=True)
        ]
    return lengths
