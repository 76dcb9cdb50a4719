"""The arena: one copy, seen by another process, filled and written one tensor at a time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from secondnature.errors import WeightsError
from secondnature.weights.arena import Arena
from secondnature.weights.content import content_id


def some_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "a.weight": torch.randn(7, 5).to(torch.bfloat16),
        "b.weight": torch.randn(3, 1, 4).to(torch.bfloat16),
        "c": torch.randn(11).to(torch.bfloat16),
    }


def test_create_copies_the_values_and_aligns_them() -> None:
    weights = some_weights()
    arena = Arena.create(weights)
    assert content_id(arena.tensors) == content_id(weights)
    for tensor in arena.tensors.values():
        assert tensor.data_ptr() % 64 == 0
        assert tensor.is_contiguous()


def test_another_process_writes_into_the_same_memory() -> None:
    arena = Arena.create(some_weights())
    code = """
import sys, torch
from secondnature.weights.arena import Arena
arena = Arena.attach(sys.stdin.read())
with arena.writing():
    arena.tensors["a.weight"][0, 0] = 42.0
"""
    subprocess.run([sys.executable, "-c", code], input=arena.manifest(), text=True, check=True, timeout=120)
    assert float(arena.tensors["a.weight"][0, 0]) == 42.0
    assert arena.writes == (1, 1)


def test_the_write_counter_never_goes_back() -> None:
    arena = Arena.create(some_weights())
    before = {n: t.clone() for n, t in arena.tensors.items()}
    with arena.writing():
        assert arena.writes == (1, 0)
        arena.tensors["c"].zero_()
    arena.write(before)
    assert content_id(arena.tensors) == content_id(before)
    assert arena.writes == (2, 2)


def test_a_torn_write_is_settled() -> None:
    arena = Arena.create(some_weights())
    arena.counters._words[1] = 5
    assert arena.writes == (5, 0)
    arena.close_torn_write()
    with arena.writing():
        assert arena.writes == (6, 5)


def test_attach_refuses_what_is_no_arena() -> None:
    with pytest.raises(WeightsError, match="manifest"):
        Arena.attach("{}")
    plan = json.loads(Arena.create(some_weights()).manifest())
    with pytest.raises(WeightsError, match="cannot map"):
        Arena.attach(json.dumps({**plan, "fd": 9999}))
    with pytest.raises(WeightsError, match="does not fit"):
        Arena.attach(json.dumps({**plan, "nbytes": plan["nbytes"] + 4096}))


def test_write_refuses_a_wrong_shape_before_writing_anything() -> None:
    arena = Arena.create(some_weights())
    before = content_id(arena.tensors)
    bad = {"c": torch.zeros(11, dtype=torch.bfloat16), "a.weight": torch.zeros(2, 2, dtype=torch.bfloat16)}
    with pytest.raises(WeightsError, match=r"a\.weight"):
        arena.write(bad)
    assert content_id(arena.tensors) == before


def test_the_load_is_seen_by_the_other_process_and_is_never_negative() -> None:
    arena = Arena.create(some_weights())
    other = Arena.attach(arena.manifest())
    assert other.load == 0
    arena.load = 3
    assert other.load == 3
    arena.load = -1
    assert other.load == 0
    assert arena.writes == (0, 0)


def test_seen_as_other_names_and_cuts_of_the_same_memory() -> None:
    arena = Arena.create(some_weights())
    manifest = arena.manifest()
    whole = arena.tensors["a.weight"]
    arena.seen_as({"top": whole[:3], "rest": whole[3:]})
    assert arena.manifest() == manifest
    arena.write({"top": torch.ones(3, 5, dtype=torch.bfloat16)})
    attached = Arena.attach(manifest)
    assert attached.tensors["a.weight"][:3].eq(1).all()
    assert not attached.tensors["a.weight"][3:].eq(1).all()
    with pytest.raises(WeightsError, match="does not fit"):
        arena.write({"a.weight": whole})


def test_seen_as_refuses_copies() -> None:
    arena = Arena.create(some_weights())
    before = arena.tensors
    with pytest.raises(WeightsError, match="tensor x is no view"):
        arena.seen_as({"c": arena.tensors["c"], "x": arena.tensors["c"].clone()})
    assert arena.tensors is before
