"""An adapter: the best of its rank, its error as it is told, and what it cannot hold by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import dense_config, gpt2_config, hybrid_config, save_tiny
from torch import Tensor
from transformers import PretrainedConfig, Qwen3_5Config

from secondnature.errors import BadInput, UnsupportedModel
from secondnature.model.load import build
from secondnature.weights import checkpoint, lora


def changed(weights: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Every matrix moved by a product of that rank, every vector by a little."""
    torch.manual_seed(1)
    found = {n: t.clone() for n, t in weights.items()}
    for tensor in found.values():
        if tensor.ndim == 2:
            tensor.add_(0.1 * torch.randn(tensor.shape[0], rank) @ torch.randn(rank, tensor.shape[1]))
        else:
            tensor.add_(0.01)
    return found


@pytest.mark.parametrize(
    "config", [dense_config(), gpt2_config(), hybrid_config()], ids=lambda c: c.model_type
)
def test_an_update_of_that_rank_is_held_whole(config: PretrainedConfig, tmp_path: Path) -> None:
    """With the adapter the logits are those of the changed model, where nothing else was changed."""
    model = save_tiny(config, tmp_path / "model")
    own = {n: t.float() for n, t in checkpoint.read(model).items()}
    after = changed(own, 3)

    def changes() -> Iterator[tuple[str, Tensor]]:
        return ((n, after[n] - own[n]) for n in own)

    made = lora.write(tmp_path / "adapter", changes, model, 3, "base")
    assert made.carried
    assert all(c.error < 1e-5 for c in made.carried.values())
    assert set(made.carried) | set(made.left_out) == set(own)
    wanted = {n: after[n] if n in made.carried else own[n] for n in own}
    applied = dict(lora.applied(own.items(), tmp_path / "adapter"))
    ids = torch.arange(20)[None]
    one, other = (build(model, w)(input_ids=ids).logits for w in (wanted, applied))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    lacks = sum(n**2 for n in made.left_out.values()) ** 0.5
    whole = sum(float((after[n] - own[n]).square().sum()) for n in own) ** 0.5
    assert made.error == pytest.approx(lacks / whole, rel=1e-3)


def test_no_other_product_of_that_rank_is_nearer() -> None:
    """Eckart and Young: the error is what the singular values beyond the rank make; also by random projections."""
    torch.manual_seed(0)
    change = torch.randn(80, 120) @ torch.diag(torch.logspace(0, -3, 120))
    values = torch.linalg.svdvals(change)
    for most in (lora.MAX_EXACT, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lora, "MAX_EXACT", most)
            left, right = lora.factors(change, 10)
        error = float(torch.linalg.vector_norm(change - left @ right))
        assert error == pytest.approx(float(values[10:].square().sum().sqrt()), rel=2e-2), most
    left, right = lora.factors(change[:5], 10)  # no higher rank than there is
    torch.testing.assert_close(left @ right, change[:5], atol=1e-5, rtol=1e-4)


def test_what_no_adapter_holds_is_named(tmp_path: Path) -> None:
    """Embeddings with a tied head, norms, convolutions; and what lies unchanged is not in it."""
    model = save_tiny(hybrid_config(), tmp_path / "model")
    own = checkpoint.read(model)
    after = {n: t.clone() for n, t in own.items()}
    moved = ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight")
    for name in moved:
        after[name] += 0.25
    made = lora.write(
        tmp_path / "adapter", lambda: ((n, after[n].float() - own[n].float()) for n in own), model, 4, "base"
    )
    assert set(made.carried) == {moved[0]}
    assert set(made.left_out) == set(moved[1:])
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    held = load_file(tmp_path / "adapter" / lora.ADAPTER_FILE)
    assert {n: tuple(t.shape) for n, t in held.items()} == {
        key.format("A"): (4, 48),
        key.format("B"): (80, 4),
    }
    config = json.loads((tmp_path / "adapter" / lora.CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (
        4,
        4,
        ["model.layers.0.mlp.up_proj"],
    )
    for n in moved[:1]:
        after[n] = own[n]
    with pytest.raises(BadInput, match=r"no linear layer changed \(2 other tensors did\)"):
        lora.write(
            tmp_path / "other",
            lambda: ((n, after[n].float() - own[n].float()) for n in own),
            model,
            4,
            "base",
        )
    assert not (tmp_path / "other").exists()


def test_the_text_part_of_another_model_is_refused(tmp_path: Path) -> None:
    save_tiny(hybrid_config(), tmp_path)
    inner = hybrid_config().to_dict()
    Qwen3_5Config(text_config=inner, architectures=["Qwen3_5ForConditionalGeneration"]).save_pretrained(
        tmp_path
    )
    with pytest.raises(UnsupportedModel, match="text part of another"):
        lora.write(tmp_path / "adapter", lambda: iter(()), tmp_path, 4, "base")
