"""The text part of models that also see, where transformers has no causal language model for it (any engine).

Most such models name a language model that transformers knows by itself. Qwen's vision models do not: their text
model exists (`AutoModel`), but its head only in the class of the whole. So the two are put together here, as the
whole does it: a linear head on the last hidden state, nothing scaled or capped. That this is so was looked up for
each kind on the list, and the tests compare with the whole model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.modeling_outputs import CausalLMOutputWithPast

__all__ = ["KINDS", "TextPart", "conversions"]

KINDS = {
    "qwen2_vl_text": "qwen2_vl",
    "qwen2_5_vl_text": "qwen2_5_vl",
    "qwen3_vl_text": "qwen3_vl",
    "qwen3_vl_moe_text": "qwen3_vl_moe",
}
"""model_type of the text config -> that of the whole, under which transformers keeps how tensors are converted."""


class TextPart(PreTrainedModel):
    """A text model with a linear head; names as in the files of a causal language model."""

    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (transformers' own word)
    _supports_sdpa = True

    def __init__(self, config: PretrainedConfig, *, attention: str) -> None:
        """`attention`: transformers' name of how it is computed."""
        config._attn_implementation = attention
        super().__init__(config)
        self.model = AutoModel.from_config(config, attn_implementation=attention, dtype=torch.float32)
        text: Any = config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """input_ids, position_ids: (B, T); logits of the last `logits_to_keep` positions (0: all), (B, T, V)."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)


def conversions(model: nn.Module) -> list[Any]:
    """How the files' tensors become those of the text part, by transformers' table for the whole; else none."""
    if not isinstance(model, TextPart):
        return []
    return get_checkpoint_conversion_mapping(KINDS[model.config.model_type]) or []
