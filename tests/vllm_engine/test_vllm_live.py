"""Every parameter of the running model is live: what is written there is what the next answer is computed with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm_core import Core, Make, conditional, llama, started


def check(core: Core) -> None:
    ids = core.prompt(70)
    before = core.fresh(ids, 2)
    generator = torch.Generator().manual_seed(0)
    dead: list[str] = []
    for name, was in core.original.items():
        noise = torch.randn(was.shape, generator=generator)
        core.arena.write({name: (was.float() + noise * (was.float().std().nan_to_num() + 0.1)).to(was.dtype)})
        if core.fresh(ids, 2).scores == before.scores:
            dead.append(name)
        core.arena.write({name: was})
    assert dead == []
    assert core.fresh(ids, 2) == before


def test_each_parameter_changes_the_next_answer(core: Core) -> None:
    check(core)


@pytest.mark.parametrize("make", [llama, conditional])
def test_so_it_is_with_other_architectures(tmp_path: Path, make: Make) -> None:
    with started(make, tmp_path / "model") as core:
        check(core)


def test_a_prompt_of_one_token_is_answered(core: Core) -> None:
    """vLLM alone dies of it where the convolution has a kernel of its own."""
    alone = core.fresh([7], 3)
    core.begin([7], 3)
    core.begin(core.prompt(20), 3)
    beside = []
    while core.engine.has_unfinished_requests():
        beside += core.step()
    assert alone.token_ids in [answer.token_ids for answer in beside]
