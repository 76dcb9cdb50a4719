"""Which epoch a request belongs to, by the arena's counters alone (in vLLM itself: tests/vllm_engine)."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from secondnature.engines.vllm.cache import PARTS, Epochs
from secondnature.weights.arena import Arena


def arena() -> Arena:
    return Arena.create({"a": torch.zeros(8, dtype=torch.bfloat16)})


def born(epochs: Epochs) -> SimpleNamespace:
    return SimpleNamespace(secondnature_epoch=epochs.now())


def test_before_the_weights_are_known_nothing_is_watched() -> None:
    epochs = Epochs()
    assert (epochs.watching, epochs.now(), epochs.parts) == (False, 0, PARTS)
    epochs.watch(arena().counters)
    assert (epochs.watching, epochs.now()) == (True, 0)


def test_a_request_is_fresh_until_somebody_writes() -> None:
    weights, epochs = arena(), Epochs()
    epochs.watch(weights.counters)
    before = born(epochs)
    assert epochs.fresh(before)
    with weights.writing():
        assert epochs.now() % 2 == 1
        during = born(epochs)
        assert not epochs.fresh(before)
        assert not epochs.fresh(during)
    after = born(epochs)
    assert [epochs.fresh(r) for r in (before, during, after)] == [False, False, True]


def test_an_undo_is_a_new_epoch() -> None:
    weights, epochs = arena(), Epochs()
    epochs.watch(weights.counters)
    original = {n: t.clone() for n, t in weights.tensors.items()}
    seen = [epochs.now()]
    for values in ({"a": torch.ones(8, dtype=torch.bfloat16)}, original):
        weights.write(values)
        seen.append(epochs.now())
    assert seen == [0, 2, 4]


def test_a_torn_write_stays_a_write_until_it_is_settled() -> None:
    weights, epochs = arena(), Epochs()
    epochs.watch(weights.counters)
    weights.counters._words[1] = 1  # a writer that died
    request = born(epochs)
    assert not epochs.fresh(request)
    weights.close_torn_write()
    assert not epochs.fresh(request)
    assert epochs.fresh(born(epochs))


def test_a_write_between_the_two_looks_at_the_counters_is_no_epoch() -> None:
    """`now` reads begun, then done: a whole write in between makes an odd sum, in which nobody is fresh."""
    weights, epochs = arena(), Epochs()
    epochs.watch(weights.counters)
    words = weights.counters._words
    words[1], words[2] = 6, 7
    assert not epochs.fresh(born(epochs))


def test_the_salt_holds_the_epoch_the_clients_own_and_the_process() -> None:
    one, two = Epochs(), Epochs()
    salts = {
        one.salt(0, None),
        one.salt(2, None),
        one.salt(0, "mine"),
        one.salt(0, "yours"),
        two.salt(0, None),
    }
    assert len(salts) == 5
    assert one.salt(0, "mine") == one.salt(0, "mine")


def test_a_write_after_one_that_was_never_done_is_still_an_odd_epoch() -> None:
    """On a GPU that fails, neither the lesson's write nor the undo's may ever be done."""
    weights, epochs = arena(), Epochs()
    epochs.watch(weights.counters)
    seen, begun = [epochs.now()], 0
    for _ in range(2):
        begun = weights.counters.begin()
        seen.append(epochs.now())
        assert not epochs.fresh(born(epochs))
    weights.counters.end(begun)
    assert [*seen, epochs.now()] == [0, 1, 3, 4]
