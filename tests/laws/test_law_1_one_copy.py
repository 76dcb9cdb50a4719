"""Law 1: one copy of the weights, in the arena; what one process writes there, the other computes with."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import hybrid_config, read_weights, save_tiny

from secondnature.model.load import build
from secondnature.records import Example, OptimizerSettings
from secondnature.train.apollo import Apollo
from secondnature.train.step import train_step
from secondnature.weights.arena import Arena

Pair = tuple[Arena, Any, Arena, Any]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The engine's arena and model, and the trainer's, attached by the manifest."""
    torch.set_num_threads(1)
    directory: Path = save_tiny(hybrid_config(), tmp_path_factory.mktemp("law1"))
    arena = Arena.create(read_weights(directory))
    other = Arena.attach(arena.manifest())
    return arena, build(directory, arena.tensors), other, build(directory, other.tensors)


def _address(arena: Arena) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(arena._memory))  # pyright: ignore[reportPrivateUsage]


def test_every_parameter_lies_in_the_mapping(pair: Pair) -> None:
    for arena, model in (pair[:2], pair[2:]):
        start = _address(arena)
        for name, parameter in model.named_parameters():
            assert start <= parameter.data_ptr() < start + arena.nbytes, name
            assert parameter.dtype is torch.bfloat16, name


def test_a_write_is_seen_on_the_other_side_both_ways(pair: Pair) -> None:
    mine, theirs = (dict(model.named_parameters()) for model in (pair[1], pair[3]))
    for name in mine:
        for writer, reader in ((mine, theirs), (theirs, mine)):
            old = writer[name].detach().flatten()[-1].clone()
            writer[name].data.flatten()[-1] = 0.75
            assert float(reader[name].detach().flatten()[-1]) == 0.75, name
            writer[name].data.flatten()[-1] = old


def test_a_step_of_the_trainer_changes_the_engines_answer_and_keeps_no_wide_copy(pair: Pair) -> None:
    _, served, arena, model = pair
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        before = served(input_ids=ids, use_cache=False).logits
    optimizer = Apollo(model, OptimizerSettings(lr=1e-2, rank=8), track=False)
    train_step(
        model, optimizer, [Example(context_ids=[5, 6], continuation_ids=[7, 8])], writing=arena.writing
    )
    with torch.inference_mode():
        after = served(input_ids=ids, use_cache=False).logits
        assert torch.equal(after, model(input_ids=ids, use_cache=False).logits)
    assert not torch.equal(before, after)
    del before, after
    gc.collect()
    weights = {tuple(p.shape): p for p in model.parameters() if p.ndim == 2}
    known = {t.data_ptr() for s in optimizer._states.values() for t in (s.m, s.v)}  # pyright: ignore[reportPrivateUsage]
    kept = [
        x
        for x in gc.get_objects()
        if type(x) in (torch.Tensor, torch.nn.Parameter)
        and tuple(x.shape) in weights
        and x.dtype in (torch.float32, torch.float64)
        and x.data_ptr() not in known
        and torch.allclose(x.float(), weights[tuple(x.shape)].float(), atol=1e-3)
    ]
    assert kept == []
