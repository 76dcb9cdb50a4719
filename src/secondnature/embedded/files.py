"""The embedded model's directory: how it is written, and how it is read for measuring (on its own, no server).

`build` writes it and `evaluate` reads it; each would otherwise import the other.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM

__all__ = ["load_model", "save_model"]


def save_model(model: Qwen3_5ForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a loadable bf16 directory: built beside `directory`, then swapped in."""
    import copy

    from transformers import GenerationConfig

    fresh = directory.with_name(f"{directory.name}.{os.getpid()}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    rounded = copy.deepcopy(model).bfloat16()
    rounded.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    rounded.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    old = directory.with_name(f"{directory.name}.{os.getpid()}.old")
    if directory.exists():
        directory.rename(old)
    fresh.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def load_model(directory: Path) -> tuple[Qwen3_5ForCausalLM, PreTrainedTokenizerFast]:
    """The model with its bf16 values, computing in fp32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from secondnature.embedded.tokenizer import load_tokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), load_tokenizer(directory)
