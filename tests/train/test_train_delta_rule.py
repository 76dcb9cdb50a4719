"""A fused delta rule is used where it computes what the reference does, forward and backward; here on a CPU."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, in_arena, save_tiny
from torch import Tensor

from secondnature.train import delta_rule
from secondnature.train.delta_rule import RULE, choose


class Refusing(torch.autograd.Function):
    """What a library does whose backward is wrong with this compiler."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("this Triton computes wrong gradients")


def wrong_backward(output: Tensor) -> Tensor:
    return output.detach() + 2 * (output - output.detach())


def refusing(output: Tensor) -> Tensor:
    return Refusing.apply(output)  # pyright: ignore[reportReturnType]


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "right": (lambda output: output * 1.001, ""),
    "refuses backward": (refusing, "RuntimeError: this Triton computes wrong gradients"),
    "wrong backward": (wrong_backward, "the gradient of query differs by 1 of its norm"),
    "wrong forward": (lambda output: 1.2 * output, "its output differs by 0.2 of its norm"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong_gives_way_to_the_reference(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change, said = KINDS[kind]
    _, model = in_arena(save_tiny(CONFIGS["hybrid"](), tmp_path / "hybrid"))
    (name,) = {n for n in {type(m).__module__ for m in model.modules()} if hasattr(sys.modules[n], RULE)}
    module = sys.modules[name]
    reference = getattr(module, RULE).__wrapped__

    @functools.wraps(reference)
    def fused(*args: Any, **kwargs: Any) -> Any:
        output, state = reference(*args, **kwargs)
        return change(output), state

    monkeypatch.setattr(module, RULE, fused)
    with caplog.at_level(logging.WARNING, delta_rule.LOG.name):
        assert choose(model) == ([name] if said else [])
    assert getattr(module, RULE) is (reference if said else fused)
    assert said in caplog.text


def test_a_model_without_one_is_left_alone(tmp_path: Path) -> None:
    _, model = in_arena(save_tiny(CONFIGS["dense"](), tmp_path / "dense"))
    assert choose(model) == []
