"""Models that also see, whose text part transformers has no causal language model for: Qwen's vision models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from secondnature.model.load import build, bystanders, plan
from secondnature.weights import checkpoint

VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "embed_dim": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]},
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WHOLE: dict[str, dict[str, Any]] = {
    "Qwen2VLForConditionalGeneration": {"model_type": "qwen2_vl", **TEXT, "tie_word_embeddings": True},
    "Qwen2_5_VLForConditionalGeneration": {"model_type": "qwen2_5_vl", **TEXT, "tie_word_embeddings": False},
    "Qwen3VLForConditionalGeneration": {
        "model_type": "qwen3_vl",
        "text_config": {"model_type": "qwen3_vl_text", **TEXT},
        "tie_word_embeddings": True,
    },
    "Qwen3VLMoeForConditionalGeneration": {
        "model_type": "qwen3_vl_moe",
        "text_config": {"model_type": "qwen3_vl_moe_text", **TEXT, **EXPERTS},
        "tie_word_embeddings": False,
    },
}


@torch.no_grad()
def made(architecture: str, directory: Path) -> Any:
    """The whole model, saved in bf16 as transformers saves it; in fp32."""
    directory.mkdir()
    written = {"architectures": [architecture], **WHOLE[architecture], "vision_config": VISION}
    (directory / "config.json").write_text(json.dumps(written))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(transformers, architecture)(AutoConfig.from_pretrained(directory))
        for name, parameter in model.named_parameters():
            drawn = torch.randn_like(parameter) * 0.2 + (1.0 if "norm" in name else 0.0)
            parameter.copy_(drawn.bfloat16())
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(directory)  # its buffers are rounded, too
    (directory / "config.json").write_text(json.dumps(written))
    return model.eval()


@pytest.mark.parametrize("architecture", WHOLE)
def test_the_text_part_computes_what_the_whole_does(architecture: str, tmp_path: Path) -> None:
    whole = made(architecture, tmp_path / "model")
    part = build(tmp_path / "model", checkpoint.read(tmp_path / "model"))
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        found = part(input_ids=ids).logits
        assert torch.equal(found, whole(input_ids=ids).logits)
        torch.testing.assert_close(part(input_ids=ids, logits_to_keep=1).logits, found[:, -1:])
    tower = [key for key in bystanders(tmp_path / "model") if "visual" in key]
    assert len(tower) == len([n for n, _ in whole.named_parameters() if "visual" in n])
    assert (
        "lm_head.weight" in {s.name for s in plan(tmp_path / "model")}
    ) is not whole.config.tie_word_embeddings


def test_experts_are_read_the_way_round_that_they_are_published_in(tmp_path: Path) -> None:
    """Qwen3-VL-MoE's files have the two dimensions of each expert the other way round."""
    whole = made("Qwen3VLMoeForConditionalGeneration", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    experts = [key for key in tensors if ".experts." in key]
    assert experts
    save_file(tensors | {k: tensors[k].transpose(1, 2).contiguous() for k in experts}, file, {"format": "pt"})
    part = build(tmp_path / "model", checkpoint.read(tmp_path / "model"))
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        assert torch.equal(part(input_ids=ids).logits, whole(input_ids=ids).logits)
