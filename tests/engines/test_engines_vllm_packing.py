"""A product with a plain weight, whichever way it is multiplied."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from secondnature.engines.vllm import packing


@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (packing.FEW,), (packing.FEW + 1,), (0,), ()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_product(rows: tuple[int, ...], dtype: torch.dtype, biased: bool) -> None:
    generator = torch.Generator().manual_seed(len(rows))
    x = torch.randn(*rows, 48, generator=generator).to(dtype)
    weight = torch.randn(40, 48, generator=generator).to(dtype)
    bias = torch.randn(40, generator=generator).to(dtype) if biased else None
    found = packing._linear(x, weight, bias)
    assert (found.shape, found.dtype, found.is_contiguous()) == ((*rows, 40), dtype, True)
    torch.testing.assert_close(found, linear(x, weight, bias))


def test_it_multiplies_with_the_memory_that_it_was_given() -> None:
    x, weight = torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16)
    assert packing._linear(x, weight, None).tolist() == [[8.0] * 4] * 2
    weight.zero_()
    assert packing._linear(x, weight, None).tolist() == [[0.0] * 4] * 2


def test_compiled_code_multiplies_as_torch_does() -> None:
    """One graph for all numbers of rows: no branch on them is traced."""
    traced: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, _: object) -> object:
        traced.append(module)
        return module.forward

    compiled = torch.compile(packing._linear, backend=keep, dynamic=True, fullgraph=True)
    weight = torch.randn(4, 8).to(torch.bfloat16)
    for rows in (2, 7, packing.FEW + 7):
        x = torch.randn(rows, 8).to(torch.bfloat16)
        torch.testing.assert_close(compiled(x, weight, None), linear(x, weight))
    assert len(traced) == 1
