"""The head in slices: the same log-probabilities and gradients, never all logits; and only where that is right."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, VOCAB_SIZE, dense_config, hybrid_config, in_arena, save_tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
)

from secondnature.model.head import find_head, target_logps, token_logps
from secondnature.model.upcast import collect
from secondnature.train import prefix as prefix_module
from secondnature.train.prefix import continuation_logits, continuation_logps, freeze

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def phi_config() -> PhiConfig:
    """A head with a bias."""
    return PhiConfig(**SMALL)


def model_of(config: PretrainedConfig, directory: Path, dtype: torch.dtype | None = None) -> nn.Module:
    return in_arena(save_tiny(config, directory), compute_dtype=dtype)[1]


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=count)


def score(model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Log-probabilities of three answers of different lengths, and the gradient of an uneven sum of them."""
    answers = [tokens(n, n) for n in (12, 1, 7)]
    with collect(model) as gradients:
        found = continuation_logps(model, freeze(model, tokens(9, 1)), answers)
        torch.stack([(k + 1) * x.sin().sum() for k, x in enumerate(found)]).sum().backward()
    return [x.detach() for x in found], dict(gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [*CONFIGS, "bias"])
def test_slices_equal_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    """Tied and untied heads, with and without bias; slices of several sizes, also of one token."""
    model = model_of({**CONFIGS, "bias": phi_config}[kind](), tmp_path, dtype)
    tolerance = {"rtol": 0, "atol": 3e-6 if dtype is torch.float32 else 1e-13}
    wanted, gradients = score(model)
    for rows in (96, 49, 10, 1):
        monkeypatch.setattr(prefix_module, "token_logps", partial(token_logps, max_logits=20 * rows))
        found, d_found = score(model)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, **tolerance)
        assert d_found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            scale = 10 * float(gradient.norm())
            torch.testing.assert_close(
                d_found[name] / scale, gradient / scale, **tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )
    assert ("lm_head.bias" in gradients) == (kind == "bias")


class Largest(TorchDispatchMode):
    """The largest tensor that anything puts out, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_the_logits_are_never_all_in_memory(tmp_path: Path) -> None:
    """200 positions and 1,000 tokens: 200,000 logits; the largest thing is the head's gradient, 48,000."""
    model = model_of(dense_config(vocab_size=1000), tmp_path)
    head = find_head(model)
    assert head is not None
    hidden = torch.randn(200, 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.arange(200) * 5
    with collect(model) as gradients, Largest() as seen:
        token_logps(head, hidden, targets, max_logits=20_000).sum().backward()
    assert seen.numel == 48_000
    found = hidden.grad
    assert found is not None
    hidden.grad = None
    with collect(model) as plain, Largest() as seen:
        token_logps(head, hidden, targets, max_logits=200_000).sum().backward()
    assert seen.numel == 200_000
    assert hidden.grad is not None
    torch.testing.assert_close(found, hidden.grad)
    torch.testing.assert_close(gradients["lm_head.weight"], plain["lm_head.weight"])


@pytest.mark.parametrize("config", [hybrid_config(), dense_config(), LlamaConfig(**SMALL), phi_config()])
def test_ordinary_heads_are_found(tmp_path: Path, config: PretrainedConfig) -> None:
    model: Any = model_of(config, tmp_path)
    head = find_head(model)
    assert head is not None
    assert head.linear is model.lm_head
    assert head.body is model.model


def test_a_head_is_found_in_a_broken_model(tmp_path: Path) -> None:
    """Its logits are NaN, and so are the parts'; the error comes later, with a name."""
    arena, model = in_arena(save_tiny(hybrid_config(), tmp_path))
    arena.tensors["model.norm.weight"][3] = torch.nan
    assert find_head(model) is not None


def capped(module: nn.Module, args: Any, output: Any) -> None:
    """Soft caps, as a model's own forward would."""
    output.logits = torch.tanh(output.logits / 0.5) * 0.5


@pytest.mark.parametrize("kind", ["granite", "cohere", "capped"])
def test_scaled_and_capped_logits_take_the_plain_way(tmp_path: Path, kind: str) -> None:
    """The log-probabilities are those of the model's own logits."""
    configs = {
        "granite": GraniteConfig(**SMALL, logits_scaling=4.0),
        "cohere": CohereConfig(**SMALL, logit_scale=0.0625),
        "capped": LlamaConfig(**SMALL),
    }
    model = model_of(configs[kind], tmp_path)
    if kind == "capped":
        model.register_forward_hook(capped)
    assert find_head(model) is None
    context, answers = tokens(9, 1), [tokens(5, 2), tokens(3, 3)]
    prefix = freeze(model, context)
    found = continuation_logps(model, prefix, answers)
    logits = continuation_logits(model, prefix, answers, last=[2, 3])
    for logps, tail, answer, count in zip(found, logits, answers, (2, 3), strict=True):
        ids = torch.tensor([context + answer[:-1]])
        whole = model(input_ids=ids, use_cache=False).logits[0, -len(answer) :]
        torch.testing.assert_close(logps, target_logps(whole, torch.tensor(answer)), rtol=0, atol=1e-5)
        torch.testing.assert_close(tail, whole[-count:], rtol=0, atol=1e-5)
