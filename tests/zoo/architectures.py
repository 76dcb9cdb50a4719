"""One tiny directory for each architecture that people have: config.json as published models write it, shrunk.

Windows of 32 under prompts of 130, experts that are named one by one, text parts of models that also see. The files
are written by transformers' own `save_pretrained`, in the form in which such models are published. Weights are
drawn so that everything matters: norms and biases away from their defaults, heads sharp enough that greedy text is
not decided by rounding.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

__all__ = ["ARCHITECTURES", "FAST", "VOCABULARY", "make"]

VOCABULARY = 320
Config = dict[str, Any]


def base(model_type: str, architecture: str, **changes: Any) -> Config:
    """The common fields of a decoder."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }


def text(model_type: str, **changes: Any) -> Config:
    """The text part of a model that also sees."""
    found = base(model_type, "", **changes)
    del found["architectures"]
    return found


MOE: Config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LOCAL: Config = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT: Config = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
GEMMA: Config = {
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 16,
    "sliding_window": 32,
}
GEMMA4: Config = {
    **GEMMA,
    "global_head_dim": 32,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
ALTERNATE = ["sliding_attention", "full_attention"]
DELTA: Config = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 16,
}
MROPE: Config = {
    "rope_type": "default",
    "rope_theta": 1e7,
    "partial_rotary_factor": 0.25,
    "mrope_interleaved": True,
    "mrope_section": [1, 1, 0],
}
LONGROPE: Config = {
    "type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i for i in range(8)],
}
PIXTRAL: Config = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION: Config = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
SEEN: Config = {
    "image_token_id": 300,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
}
INTERLEAVED: Config = {"mrope_interleaved": True, "mrope_section": [3, 3, 2], "rope_type": "default"}
MAMBA2: Config = {
    "mamba_chunk_size": 64,
    "mamba_d_conv": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 8,
}
NO_LIMIT: Config = {"time_step_min": 1e-9}
"""transformers holds time steps above this in a whole text and not in a single token, as its authors do."""
SIGLIP: Config = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}

ARCHITECTURES: dict[str, Config] = {
    "Llama 3": base(
        "llama",
        "LlamaForCausalLM",
        head_dim=16,
        tie_word_embeddings=True,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "Llama 4 (text)": base(
        "llama4_text",
        "Llama4ForCausalLM",
        **{**LOCAL, "num_experts_per_tok": 1},
        head_dim=16,
        intermediate_size_mlp=96,
        interleave_moe_layer_step=1,
        attention_chunk_size=32,
        no_rope_layers=[1, 0],
        use_qk_norm=True,
    ),
    "Mistral v0.1": base("mistral", "MistralForCausalLM", sliding_window=32),
    "Mistral Small 3 (text part)": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "image_token_index": 10,
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        "text_config": text("mistral", head_dim=16, sliding_window=None),
        "vision_config": PIXTRAL,
    },
    "Ministral 3 (text part)": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "image_token_index": 10,
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        "text_config": text(
            "ministral3",
            head_dim=16,
            sliding_window=None,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 64,
                "llama_4_scaling_beta": 0.1,
            },
        ),
        "vision_config": PIXTRAL,
    },
    "Mixtral": base("mixtral", "MixtralForCausalLM", **LOCAL, sliding_window=None),
    "Qwen2": base("qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True, use_sliding_window=False),
    "Qwen2-MoE": base(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        **MOE,
        shared_expert_intermediate_size=48,
        use_sliding_window=False,
    ),
    "Qwen3": base("qwen3", "Qwen3ForCausalLM", head_dim=32, tie_word_embeddings=True),
    "Qwen3-MoE": base("qwen3_moe", "Qwen3MoeForCausalLM", **MOE, head_dim=32, norm_topk_prob=True),
    "Qwen3-Next": base(
        "qwen3_next", "Qwen3NextForCausalLM", **{**DELTA, **MOE}, shared_expert_intermediate_size=48
    ),
    "Qwen3.5 (text)": base(
        "qwen3_5_text", "Qwen3_5ForCausalLM", **DELTA, tie_word_embeddings=True, rope_parameters=MROPE
    ),
    "Qwen2.5-VL (text part)": {
        **base("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
        **SEEN,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
    },
    "Qwen3-VL (text part)": {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        **SEEN,
        "tie_word_embeddings": True,
        "text_config": text("qwen3_vl_text", head_dim=16, rope_scaling=INTERLEAVED),
        "vision_config": {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "Qwen3-VL-MoE (text part)": {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        **SEEN,
        "text_config": text("qwen3_vl_moe_text", **MOE, head_dim=16, rope_scaling=INTERLEAVED),
        "vision_config": {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "Gemma 1": base("gemma", "GemmaForCausalLM", **GEMMA),
    "Gemma 2": base(
        "gemma2",
        "Gemma2ForCausalLM",
        **GEMMA,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "Gemma 3 (text)": base("gemma3_text", "Gemma3ForCausalLM", **GEMMA, layer_types=ALTERNATE),
    "Gemma 3 (text part)": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 300,
        "eoi_token_index": 301,
        "image_token_index": 302,
        "mm_tokens_per_image": 4,
        "text_config": text("gemma3_text", **GEMMA, layer_types=ALTERNATE),
        "vision_config": SIGLIP,
    },
    "Gemma 4 (text)": base("gemma4_text", "Gemma4ForCausalLM", **GEMMA4, layer_types=ALTERNATE),
    "Gemma 4 E2B/E4B (shared keys)": base(
        "gemma4_text",
        "Gemma4ForCausalLM",
        **{**GEMMA4, "num_kv_shared_layers": 2, "num_hidden_layers": 4},
        layer_types=ALTERNATE * 2,
    ),
    "gpt-oss (bf16)": base(
        "gpt_oss",
        "GptOssForCausalLM",
        **LOCAL,
        head_dim=16,
        sliding_window=32,
        attention_bias=True,
        layer_types=ALTERNATE,
    ),
    "Phi-3": base("phi3", "Phi3ForCausalLM", sliding_window=32, num_key_value_heads=4),
    "Phi-4-mini (LongRoPE)": base(
        "phi3",
        "Phi3ForCausalLM",
        sliding_window=262144,
        num_key_value_heads=4,
        original_max_position_embeddings=256,
        rope_scaling=LONGROPE,
    ),
    "Phi-MoE": base("phimoe", "PhimoeForCausalLM", **LOCAL, attention_bias=True, lm_head_bias=True),
    "OLMo 2": base("olmo2", "Olmo2ForCausalLM"),
    "OLMo 3": base("olmo3", "Olmo3ForCausalLM", sliding_window=32, layer_types=ALTERNATE),
    "OLMoE": base("olmoe", "OlmoeForCausalLM", num_experts=4, num_experts_per_tok=2),
    "DeepSeek V2": base(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        **LATENT,
        q_lora_rank=None,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
    ),
    "DeepSeek V3": base(
        "deepseek_v3", "DeepseekV3ForCausalLM", **LATENT, q_lora_rank=32, n_group=2, topk_group=1
    ),
    "GLM-4": base("glm4", "Glm4ForCausalLM", head_dim=16, partial_rotary_factor=0.5),
    "GLM-4.5": base(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        head_dim=16,
        partial_rotary_factor=0.5,
        moe_intermediate_size=48,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "Granite 3": base(
        "granite",
        "GraniteForCausalLM",
        attention_multiplier=0.0625,
        embedding_multiplier=12.0,
        logits_scaling=8.0,
        residual_multiplier=0.22,
        tie_word_embeddings=True,
    ),
    "Command R7B": base(
        "cohere2",
        "Cohere2ForCausalLM",
        layer_norm_eps=1e-5,
        logit_scale=0.25,
        sliding_window=32,
        tie_word_embeddings=True,
        layer_types=ALTERNATE,
    ),
    "SmolLM3": base("smollm3", "SmolLM3ForCausalLM", no_rope_layers=[1, 0], tie_word_embeddings=True),
    "StarCoder2": base("starcoder2", "Starcoder2ForCausalLM", sliding_window=32, use_bias=True),
    "MiniMax-M2": base("minimax_m2", "MiniMaxM2ForCausalLM", **LOCAL, head_dim=16, rotary_dim=8),
    "Apertus": base("apertus", "ApertusForCausalLM", head_dim=16, hidden_act="xielu"),
    "Granite 4 H (Mamba 2)": base(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        **MAMBA2,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=96,
        position_embedding_type="nope",
        layer_types=["mamba", "attention"],
    ),
    "LFM2": base("lfm2", "Lfm2ForCausalLM", layer_types=["conv", "full_attention"], block_ff_dim=96),
    "LFM2-MoE": base(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        **MOE,
        layer_types=["conv", "full_attention"],
        num_dense_layers=1,
    ),
    "Falcon-H1": base("falcon_h1", "FalconH1ForCausalLM", **MAMBA2, mamba_d_ssm=128),
    "Nemotron-H": base(
        "nemotron_h",
        "NemotronHForCausalLM",
        **NO_LIMIT,
        head_dim=16,
        num_hidden_layers=4,
        layers_block_type=["mamba", "mlp", "attention", "mlp"],
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=1,
        chunk_size=64,
        mlp_hidden_act="relu2",
    ),
    "Bamba": base("bamba", "BambaForCausalLM", **MAMBA2, attn_layer_indices=[1], attn_rotary_emb=8),
    "Zamba 2": base(
        "zamba2",
        "Zamba2ForCausalLM",
        **NO_LIMIT,
        num_hidden_layers=4,
        num_key_value_heads=4,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_expand=2,
        n_mamba_heads=2,
        mamba_ngroups=1,
        num_mem_blocks=1,
        hybrid_layer_ids=[2],
        attention_hidden_size=128,
        attention_head_dim=32,
        use_mem_rope=True,
        chunk_size=64,
        adapter_rank=8,
        layers_block_type=["mamba", "mamba", "hybrid", "mamba"],
    ),
    "Mamba 2": {
        **base("mamba2", "Mamba2ForCausalLM"),
        "state_size": 16,
        "head_dim": 16,
        "num_heads": 8,
        "n_groups": 1,
        "chunk_size": 64,
    },
    "GPT-2": base("gpt2", "GPT2LMHeadModel", n_embd=64, n_head=4, n_layer=2, n_positions=1024),
    "Pythia (GPT-NeoX)": base("gpt_neox", "GPTNeoXForCausalLM", hidden_act="gelu", rotary_pct=0.25),
    "BLOOM": base("bloom", "BloomForCausalLM", n_layer=2, n_head=4),
}
"""As the table in docs/start-your-own.md names them."""

FAST = (
    "Mistral Small 3 (text part)",
    "Qwen3-VL-MoE (text part)",
    "Gemma 4 E2B/E4B (shared keys)",
    "gpt-oss (bf16)",
    "DeepSeek V3",
    "LFM2",
    "Falcon-H1",
    "Mamba 2",
)
"""One of each thing that is special: text parts (one with our head), shared keys, windows, experts by name with
a stored buffer, a convolution alone, attention and a recurrence in one layer, no attention at all."""


@torch.no_grad()
def _redraw(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("A_log"):
            p.copy_(torch.rand(p.shape, generator=generator) * math.log(16))
        elif name.endswith("dt_bias"):
            p.copy_(noise * 0.3 - 4.0)
        elif p.ndim <= 1:
            p.add_(noise * 0.2)
        elif p is head or p is embedding:
            p.copy_(noise * (2.5 / math.sqrt(p.shape[-1]) if p is head else 0.7))
        else:
            p.copy_(noise * 1.2 / math.sqrt(p.shape[-1]))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.1)
        elif name.endswith("layer_scalar"):
            buffer.add_(0.25)


def make(name: str, directory: Path) -> Path:
    """A model directory of this architecture: config.json in its published form, weights in bf16."""
    directory.mkdir(parents=True)
    given = ARCHITECTURES[name]
    (directory / "config.json").write_text(json.dumps(given, indent=2))
    config = AutoConfig.from_pretrained(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if "vision_config" in given:
            model = getattr(transformers, given["architectures"][0])(config)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _redraw(model)
        model.to(torch.bfloat16).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(given, indent=2))
    return directory
