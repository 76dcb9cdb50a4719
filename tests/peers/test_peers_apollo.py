"""The dense optimizer goes where the public APOLLO goes; runs where that is installed (`make test-peers`).

Only the first step can be compared: the public one corrects the bias after its limiter, and grows from there (see
`train/apollo.py` for what is done differently). Projections are drawn differently too, so the directions are close
and not equal.
"""

from __future__ import annotations

import importlib
import math
import warnings
from typing import Any

import pytest
import torch

from secondnature.train.optimizer import ApolloOptimizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip(
        "apollo_torch", reason="apollo-torch is not installed here; `make test-peers` makes its environment"
    )

pytestmark = pytest.mark.filterwarnings("ignore")

RANK = 64


@pytest.mark.parametrize("shape", [(192, 320), (320, 192)])
def test_first_step_has_the_public_ones_direction_and_length(shape: tuple[int, int]) -> None:
    public: Any = importlib.import_module("apollo_torch")
    source = torch.Generator().manual_seed(0)
    sizes = torch.rand(shape[0], generator=source).mul(4).exp().unsqueeze(1)
    others = torch.rand(shape[1], generator=source).mul(4).exp()
    gradient = torch.randn(shape, generator=source) * sizes * others * 1e-4
    moved: list[torch.Tensor] = []
    for theirs in (True, False):
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = gradient.clone()
        if theirs:
            group = {"params": [weight], "rank": RANK, "proj": "random", "proj_type": "std"}
            group |= {"scale_type": "channel", "scale": 1, "update_proj_gap": 200}
            optimizer = public.APOLLOAdamW([group], lr=1e-2, eps=1e-8)
        else:
            scale = 1 / math.sqrt(min(shape) / RANK)  # the public one leaves alpha to the user
            optimizer = ApolloOptimizer([("weight", weight)], lr=1e-2, rank=RANK, scale=scale)
        optimizer.step()
        moved.append(weight.detach().clone())
    expected, found = moved
    cosine = float((expected * found).sum() / (expected.norm() * found.norm()))
    assert cosine > 0.98
    assert float(found.norm() / expected.norm()) == pytest.approx(1, rel=0.1)
