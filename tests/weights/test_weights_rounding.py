"""Law 4: bf16 is rounded stochastically, without bias, with the same bits for the same key."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from secondnature.errors import NonFinite, UnsupportedModel
from secondnature.weights import rounding
from secondnature.weights.rounding import CHUNK, RandomWords, Writer, stochastic_round_


def weights(count: int, seed: int = 0) -> Tensor:
    """Like a trained layer, and like its norms: most of scale 0.02, a part near 1."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * 0.02
    values[: count // 8] = 1 + values[: count // 8]
    return values.bfloat16()


def kept_share(old: Tensor, new: Tensor, update: Tensor) -> float:
    """How much of the intended displacement arrived: the projection of the written change on it."""
    return float(((new.double() - old.double()) * update.double()).sum() / update.double().square().sum())


@pytest.mark.parametrize(("lr", "nearest_keeps"), [(1e-5, 0.35), (5e-7, 0.05)])
def test_the_intended_displacement_arrives(lr: float, nearest_keeps: float) -> None:
    """20 steps of Adam-like size; written by rounding to nearest, nearly all of it is lost."""
    start = weights(400_000)
    generator = torch.Generator().manual_seed(1)
    update = torch.randn(start.shape, generator=generator).sign() * lr
    stochastic, nearest = start.clone(), start.clone()
    for step in range(20):
        stochastic_round_(stochastic, update, seed=3, name="w", step=step)
        nearest.add_(update)
    total = update * 20
    assert 0.97 <= kept_share(start, stochastic, total) <= 1.03
    assert kept_share(start, nearest, total) < nearest_keeps


@pytest.mark.parametrize("value", [0.013, -0.013, 1.0, -1.0, 255.7, 3e-37])
def test_it_is_unbiased(value: float) -> None:
    """Mean over 200,000 roundings within 5 standard errors, both neighbours and nothing else."""
    count = 200_000
    start = torch.full((count,), value).bfloat16()
    gap = float(torch.nextafter(start[0], torch.tensor(math.inf).bfloat16()) - start[0])
    update = torch.full((count,), 0.3 * gap)
    new = start.clone()
    stochastic_round_(new, update, seed=0, name="w", step=0)
    mean = (new.double() - start.double()).mean().item()
    assert abs(mean - 0.3 * gap) <= 5 * gap * math.sqrt(0.3 * 0.7 / count)
    assert len(new.unique()) == 2


def test_same_key_same_bits_other_key_other_bits() -> None:
    start, update = weights(300_001), torch.full((300_001,), 1e-5)

    def rounded(seed: int, name: str, step: int) -> Tensor:
        new = start.clone()
        stochastic_round_(new, update, seed=seed, name=name, step=step)
        return new.view(torch.int16)

    first = rounded(1, "a", 1)
    assert torch.equal(first, rounded(1, "a", 1))
    for key in [(2, "a", 1), (1, "b", 1), (1, "a", 2)]:
        assert not torch.equal(first, rounded(*key))


def test_the_bits_are_those_of_philox_keyed_by_sha256() -> None:
    """Frozen values: a change of the generator would break every stored random counter."""
    assert RandomWords("round", 7, "model.norm.weight", 3)(2).tolist() == FROZEN_WORDS
    stream = RandomWords("a", 1)
    assert np.array_equal(np.concatenate([stream(3), stream(5)]), RandomWords("a", 1)(8)), (
        "the stream must not depend on how it is cut"
    )


FROZEN_WORDS = [16654145509949249482, 13149835574431500195]


def test_elements_without_update_keep_their_bits() -> None:
    start = torch.tensor([0.0, -0.0, 1.5, -1e-40, 3e38]).bfloat16()
    new = start.clone()
    assert stochastic_round_(new, torch.zeros(5), seed=0, name="w", step=0) == 0
    assert torch.equal(start.view(torch.int16), new.view(torch.int16))


def test_the_written_norm_is_that_of_the_change() -> None:
    start = weights(200_000)
    new = start.clone()
    written = stochastic_round_(new, torch.full(start.shape, 1e-4), seed=0, name="w", step=0)
    assert written == pytest.approx((new.double() - start.double()).norm().item(), rel=1e-5)  # summed in fp32


def test_fp32_is_a_plain_addition_of_any_shape() -> None:
    start = torch.randn(7, 5)
    new, update = start.clone(), torch.randn(5, 7).T * 1e-3
    stochastic_round_(new, update, seed=0, name="w", step=0)
    torch.testing.assert_close(new, start + update, rtol=0, atol=1e-7)


def test_what_cannot_be_written_is_refused() -> None:
    huge = torch.tensor([3.38e38]).bfloat16()
    with pytest.raises(NonFinite, match="tensor w"):
        stochastic_round_(huge, torch.tensor([3e38]), seed=0, name="w", step=0)
    assert huge.item() == torch.tensor(3.38e38).bfloat16().item()
    with pytest.raises(UnsupportedModel, match="float16"):
        stochastic_round_(torch.zeros(2, dtype=torch.float16), torch.ones(2), seed=0, name="w", step=0)


def test_elements_of_a_chunk_are_rounded_independently() -> None:
    """They share the lower bits of their noise: over many keys, how many go up varies as if they did not."""
    gap = 2.0**-7
    start = torch.ones(4096).bfloat16()
    update = torch.full((4096,), 2e-3 * gap)
    ups = []
    for step in range(400):
        new = start.clone()
        stochastic_round_(new, update, seed=0, name="w", step=step)
        ups.append(int((new > 1).sum()))
    mean, variance = 4096 * 2e-3, 4096 * 2e-3 * (1 - 2e-3)
    assert abs(np.mean(ups) - mean) <= 5 * math.sqrt(variance / 400)
    assert 0.7 <= np.var(ups) / variance <= 1.35


def test_less_than_a_16_bit_share_of_a_gap_arrives() -> None:
    """Of an update of 0.3 / 65,536 of the gap nothing would arrive without the shared bits."""
    gap = 2.0**-7
    count, keys = 1 << 20, 12
    update = torch.full((count // 1024, 1024), 0.3 / 65536 * gap)
    ups = 0
    for step in range(keys):
        new = torch.ones(update.shape).bfloat16()
        stochastic_round_(new, update, seed=0, name="w", step=step)
        ups += int((new > 1).sum())
    mean = 0.3 / 65536 * count * keys
    assert abs(ups - mean) <= 5 * math.sqrt(mean)


@pytest.mark.parametrize("kind", ["trained", "powers of two", "of all sizes", "with zeros", "subnormal"])
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e-4, 1.0])
def test_most_is_done_in_fp32_with_the_bits_of_fp64(
    monkeypatch: pytest.MonkeyPatch, kind: str, size: float
) -> None:
    """Eight million roundings of each kind and size: some 250 tie in the 16 bits that fp32 has below bf16."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(512, 1024, generator=generator) * 0.02
    if kind == "powers of two":
        start = start.sign() * torch.exp2(torch.randint(-30, 3, start.shape, generator=generator).float())
    if kind == "of all sizes":
        start *= torch.exp(8 * torch.randn(start.shape, generator=generator))
    if kind == "with zeros":
        start[::2, ::3] = -0.0
    if kind == "subnormal":
        start *= 1e-36
    update = torch.randn(start.shape, generator=generator) * size
    update[:, ::2] = 0
    for change in (update, update * start.abs()):
        one, other = start.bfloat16(), start.bfloat16()
        for step in range(8):
            stochastic_round_(one, change, seed=0, name="w", step=step)
            with monkeypatch.context() as patched:
                patched.setattr(rounding, "_rounded_in_fp32", lambda *_: None)
                stochastic_round_(other, change, seed=0, name="w", step=step)
        assert torch.equal(one.view(torch.int16), other.view(torch.int16))


def test_rows_are_written_as_the_whole_is() -> None:
    start = weights(300 * 700).view(300, 700)
    update = torch.full(start.shape, 1e-4)
    whole, by_rows = start.clone(), start.clone()
    norm = stochastic_round_(whole, update, seed=0, name="w", step=0)
    writer = Writer(by_rows, seed=0, name="w", step=0, measure=True)
    chunks = list(writer.chunks())
    assert len(chunks) > 2
    assert all((stop - begin) * 700 <= CHUNK for begin, stop in chunks)
    for begin, stop in chunks:
        writer.add_(begin, stop, update[begin:stop])
    assert torch.equal(whole.view(torch.int16), by_rows.view(torch.int16))
    assert math.sqrt(writer.written) == norm
