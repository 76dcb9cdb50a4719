"""The sums of intended updates: of a large model they are no private memory, and they change nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from tiny_models import hybrid_config, save_tiny

from secondnature.model.load import build
from secondnature.records import Example, OptimizerSettings
from secondnature.train.apollo import Apollo
from secondnature.train.step import train_step
from secondnature.train.sums import Sums
from secondnature.weights import checkpoint
from secondnature.weights.arena import Arena


def private_bytes() -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def test_of_a_large_model_they_are_not_private_memory(tmp_path: Path) -> None:
    like = torch.empty(16, 1 << 20, dtype=torch.bfloat16)
    before = private_bytes()
    held = Sums(tmp_path, min_bytes=0).zeros(like, 4 * like.numel())
    assert held.dtype is torch.float32
    held.add_(1.0)
    grown = private_bytes() - before
    assert grown < held.nbytes // 4, "64 MB were written"
    assert held.eq(1.0).all(), "they began at zero"
    assert not list(tmp_path.iterdir()), (
        "the file has no name: nothing is left of it, however the process ends"
    )


def test_small_ones_and_those_without_a_folder_stay_in_memory(tmp_path: Path) -> None:
    like = torch.empty(1000, dtype=torch.bfloat16)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    held = [Sums(tmp_path).zeros(like, 4000), Sums(None, min_bytes=0).zeros(like, 4000)]
    now = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert mapped == now
    assert not any(t.any() for t in held)


def test_what_the_disk_refuses_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    sums = Sums(tmp_path, min_bytes=0)
    like = torch.empty(3, 5, dtype=torch.bfloat16)
    assert torch.equal(sums.zeros(like, 60), torch.zeros(3, 5))
    assert torch.equal(sums.zeros(like, 60), torch.zeros(3, 5)), "and it is not asked again"


def test_a_lesson_is_the_same_to_the_bit(tmp_path: Path) -> None:
    save_tiny(hybrid_config(), tmp_path / "model")
    example = Example(context_ids=[1, 2, 3], continuation_ids=[4, 5])
    results: list[tuple[dict[str, torch.Tensor], list[dict[str, object]]]] = []
    for folder in (None, tmp_path):
        arena = Arena.create(checkpoint.read(tmp_path / "model"))
        model = build(tmp_path / "model", arena.tensors)
        optimizer = Apollo(model, OptimizerSettings(lr=1e-3, rank=4))
        optimizer._sums = Sums(folder, min_bytes=0)
        for _ in range(3):
            train_step(model, optimizer, [example], learned_loss=0.0)
        results.append(
            ({n: t.clone() for n, t in arena.tensors.items()}, [m.model_dump() for m in optimizer.moved()])
        )
        assert bool(optimizer._sums._end) == (folder is not None), "they are where they are said to be"
    (weights, moved), (mapped_weights, mapped_moved) = results
    assert moved == mapped_moved
    assert all(torch.equal(weights[n], t) for n, t in mapped_weights.items())


def test_a_gradient_that_is_used_up_gives_the_same_step(tmp_path: Path) -> None:
    save_tiny(hybrid_config(), tmp_path / "model")
    results: list[dict[str, torch.Tensor]] = []
    for use_up in (False, True):
        arena = Arena.create(checkpoint.read(tmp_path / "model"))
        model = build(tmp_path / "model", arena.tensors)
        optimizer = Apollo(model, OptimizerSettings(lr=1e-3, rank=4))
        torch.manual_seed(1)
        gradients = {n: torch.randn(p.shape) for n, p in model.named_parameters()}
        before = {n: g.clone() for n, g in gradients.items()}
        optimizer.step(gradients, use_up=use_up)
        kept = all(torch.equal(g, before[n]) for n, g in gradients.items())
        assert kept != use_up, "without it they are as they were; with it their memory was used"
        results.append({**arena.tensors, **optimizer.state_dict()[0]})
    assert all(torch.equal(results[0][n], t) for n, t in results[1].items())
