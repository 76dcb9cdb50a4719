"""Numbers that are read for many tensors at once are those that are read one by one, and so is the step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, VOCAB_SIZE, read_weights, save_tiny
from torch import Tensor

from secondnature.model.load import build
from secondnature.records import Example, OptimizerSettings
from secondnature.train import readback
from secondnature.train.apollo import Apollo
from secondnature.train.readback import Reading, together
from secondnature.train.step import train_step


def counting(first: float, num_reads: int, log: list[str]) -> Reading[float]:
    value = first
    for i in range(num_reads):
        log.append(f"{first:g}.{i}")
        value, other = yield [torch.tensor(value + 1), torch.tensor(0.5, dtype=torch.float64)]
        assert other == 0.5
    return value


@pytest.mark.parametrize("at_once", [False, True])
def test_each_gets_its_own_numbers_and_the_results_keep_their_order(at_once: bool) -> None:
    log: list[str] = []
    found = together(
        [counting(10.0, 2, log), counting(20.0, 0, log), counting(30.0, 1, log)], at_once=at_once
    )
    assert found == [12.0, 20.0, 31.0]
    assert log == (["10.0", "30.0", "10.1"] if at_once else ["10.0", "10.1", "30.0"])


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_step_is_the_same_and_reads_a_few_times(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_tiny(CONFIGS[kind](), tmp_path / kind)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCAB_SIZE, (40,), generator=generator).tolist()
    batch = [Example(context_ids=ids[:30], continuation_ids=ids[30:])]
    reads: list[int] = []
    one_by_one = readback.floats

    def counted(scalars: Sequence[Tensor]) -> list[float]:
        reads.append(len(scalars))
        return one_by_one(scalars)

    monkeypatch.setattr(readback, "floats", counted)
    found: list[dict[str, Tensor]] = []
    for at_once in (False, True):
        model = build(directory, read_weights(directory))
        optimizer = Apollo(model, OptimizerSettings(lr=1e-3, rank=8), seed=3, track=False)
        optimizer._on_gpu = at_once
        reads.clear()
        for _ in range(2):
            train_step(model, optimizer, batch, learned_loss=0.0)
        state = optimizer.state_dict()[0]
        found.append({**{n: p.detach().clone() for n, p in model.named_parameters()}, **state})
        if at_once:
            assert len(reads) <= 2 * 3, "rounds of each step: norms of gradients, norms of updates, an end"
        else:
            assert len(reads) > len(list(model.parameters()))
    one, other = found
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
