"""An exported adapter, loaded by peft itself onto the model's own weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import dense_config, gpt2_config, hybrid_config, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from secondnature.weights import checkpoint, lora


@pytest.mark.parametrize(
    "config", [dense_config(), gpt2_config(), hybrid_config()], ids=lambda c: c.model_type
)
@pytest.mark.filterwarnings("default")
def test_peft_gives_the_logits_that_are_promised(config: PretrainedConfig, tmp_path: Path) -> None:
    """With every linear layer moved: the same as our own sum; and another than without."""
    peft: Any = pytest.importorskip(
        "peft", reason="peft is not installed here; `make test-peers` makes its environment"
    )

    model = save_tiny(config, tmp_path / "model")
    own = {n: t.float() for n, t in checkpoint.read(model).items()}
    torch.manual_seed(1)
    after = {n: t + 0.05 * torch.randn_like(t) if t.ndim == 2 else t for n, t in own.items()}

    def changes() -> list[tuple[str, Tensor]]:
        return [(n, after[n] - own[n]) for n in own]

    made = lora.write(tmp_path / "adapter", changes, model, 8, str(model))
    ids = torch.arange(20)[None]
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        without = base(input_ids=ids).logits
        with warnings.catch_warnings(record=True) as said:
            adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert not [
            str(w.message) for w in said if "missing" in str(w.message) or "unexpected" in str(w.message)
        ]
        theirs = adapted(input_ids=ids).logits
        ours: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        applied = dict(lora.applied(own.items(), tmp_path / "adapter"))
        for name, parameter in ours.named_parameters():
            parameter.copy_(applied[name])
        wanted = ours(input_ids=ids).logits
    torch.testing.assert_close(theirs, wanted, atol=1e-4, rtol=1e-4)
    assert float((theirs - without).abs().max()) > 0.01
    assert len(adapted.peft_config["default"].target_modules) == len(made.carried)
