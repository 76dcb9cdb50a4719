"""Contexts that begin alike: planned from token ids alone, computed once, within a cap, equal to computing each."""

from __future__ import annotations

import random
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, VOCAB_SIZE, in_arena, save_tiny
from torch import nn

from secondnature.errors import BadExample, StalePrefix
from secondnature.train import forest
from secondnature.train.forest import StateSize, Stem, num_tokens, plan, portions, prefixes, state_size
from secondnature.train.prefix import Prefix, continuation_logps, extend, freeze

KINDS = list(CONFIGS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: in_arena(save_tiny(make(), root / name))[1] for name, make in CONFIGS.items()}


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=count)


def conversation() -> list[list[int]]:
    """A tree: a start of 40, which is a context too; two go on to 60, one of these to 75; a stranger."""
    start, left, right = tokens(40, 1), [0, *tokens(19, 2)], [1, *tokens(19, 3)]
    return [
        start + left,
        start + right,
        [96, *tokens(9, 4)],
        start,
        start + left + tokens(15, 5),
        start + left,
    ]


def peak_bytes(stems: Sequence[Stem], size: StateSize) -> int:
    """Of all states that are alive at a time: those that something is still to continue from, and the newest."""
    peak = 0
    for now in range(len(stems)):
        bases = {s.base for s in stems[now:] if s.base is not None and s.base < now}
        peak = max(peak, sum(size(len(stems[b].ids)) for b in bases) + size(len(stems[now].ids)))
    return peak


def covered(stems: Sequence[Stem], contexts: Sequence[Sequence[int]]) -> bool:
    """Each context is one stem's, is that stem's text, and each stem begins with its base, which came before it."""
    found = sorted(i for s in stems for i in s.contexts)
    return (
        found == list(range(len(contexts)))
        and all(list(s.ids) == list(contexts[i]) for s in stems for i in s.contexts)
        and all(
            s.base is None or (s.base < k and s.ids[: len(stems[s.base].ids)] == stems[s.base].ids)
            for k, s in enumerate(stems)
        )
    )


def test_a_conversation_tree_is_computed_once() -> None:
    contexts = conversation()
    stems = plan(contexts, min_saved_tokens=1)
    assert [(len(s.ids), s.base, s.contexts) for s in stems] == [
        (40, None, (3,)),
        (60, 0, (0, 5)),
        (75, 1, (4,)),
        (60, 0, (1,)),
        (10, None, (2,)),
    ]
    assert covered(stems, contexts)
    assert num_tokens(stems) == 39 + 20 + 15 + 20 + 9
    assert num_tokens([Stem(tuple(c), None, (i,)) for i, c in enumerate(contexts)]) == 59 * 3 + 39 + 74 + 9


def test_a_beginning_of_its_own_has_to_pay() -> None:
    """Three that share 30 tokens save 60 of them; where a context ends, the others go on from it in any case."""
    three = [[*tokens(30, 1), k, *tokens(5, 2)] for k in range(3)]
    assert [len(s.ids) for s in plan(three, min_saved_tokens=61)] == [36, 36, 36]
    assert [len(s.ids) for s in plan(three, min_saved_tokens=60)] == [30, 36, 36, 36]
    assert plan(three, min_saved_tokens=60)[0].contexts == ()
    inside = [three[0][:3], *three]
    assert [(len(s.ids), s.base) for s in plan(inside, min_saved_tokens=61)] == [
        (3, None),
        (36, 0),
        (36, 0),
        (36, 0),
    ]
    # what is saved counts from the stem that is there already
    assert len(plan(inside, min_saved_tokens=60)) == 4
    assert len(plan(inside, min_saved_tokens=54)) == 5


def test_identical_contexts_are_one() -> None:
    assert plan([[1, 2], [3], [1, 2]]) == [Stem((1, 2), None, (0, 2)), Stem((3,), None, (1,))]
    assert plan([]) == []


def test_beyond_the_cap_a_beginning_is_computed_again() -> None:
    contexts = conversation()
    size = StateSize(fixed_bytes=1000, bytes_per_token=10)
    free = plan(contexts, min_saved_tokens=1, size=size)
    seen = []
    for max_bytes in range(0, peak_bytes(free, size) + 1, 10):
        stems = plan(contexts, min_saved_tokens=1, size=size, max_bytes=max_bytes)
        assert covered(stems, contexts)
        assert peak_bytes(stems, size) <= max(max_bytes, size(75))
        seen.append(num_tokens(stems))
    assert seen == sorted(seen, reverse=True), "more memory never costs tokens here"
    assert seen[0] == 59 * 2 + 39 + 74 + 9, "no branch at all: identical contexts are still one"
    assert seen[-1] == num_tokens(free) == 103
    assert len(set(seen)) > 2, "something between all and nothing"


def test_random_trees_are_covered_and_never_cost_more() -> None:
    dice = random.Random(7)
    for _ in range(200):
        contexts = [dice.choices(range(2), k=dice.randint(1, 12)) for _ in range(dice.randint(1, 12))]
        size = StateSize(dice.randint(0, 9), dice.randint(0, 3))
        max_bytes, least = dice.randint(0, 120), dice.randint(0, 20)
        stems = plan(contexts, min_saved_tokens=least, size=size, max_bytes=max_bytes)
        assert covered(stems, contexts)
        longest = max(size(len(c)) for c in contexts)
        assert peak_bytes(stems, size) <= max(max_bytes, longest)
        different = {tuple(c) for c in contexts}
        assert num_tokens(stems) <= sum(len(c) - 1 for c in different)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_state_is_predicted(models: dict[str, nn.Module], kind: str) -> None:
    size = state_size(models[kind])
    for num_context in (2, 30, 70):
        assert size(num_context) == freeze(models[kind], tokens(num_context, 1)).num_bytes
    assert (size.fixed_bytes > 0) == (kind == "hybrid")


@pytest.mark.parametrize("max_bytes", [2**30, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_of_prefixes_equals_separate_ones(
    models: dict[str, nn.Module], kind: str, max_bytes: int
) -> None:
    """To 3e-5 nats in fp32; with no memory to share in it is separate prefixes, to the bit."""
    model, contexts = models[kind], conversation()
    answers = [tokens(n, n) for n in (8, 1)]
    seen: list[int] = []
    for prefix, members in prefixes(model, contexts, min_saved_tokens=1, max_bytes=max_bytes, version="a"):
        seen.extend(members)
        assert all(list(contexts[i]) == contexts[members[0]] for i in members)
        with torch.no_grad():
            found = continuation_logps(model, prefix, answers, version="a")
            alone = continuation_logps(model, freeze(model, contexts[members[0]]), answers)
        for a, b in zip(found, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=3e-5 if max_bytes else 0)
    assert sorted(seen) == list(range(len(contexts)))


def test_the_plan_is_what_is_run(models: dict[str, nn.Module]) -> None:
    model, contexts = models["hybrid"], conversation()
    size = state_size(model)
    max_bytes = size(40) + size(60) + size(75) - 1  # one branch has to be computed again
    stems = plan(contexts, min_saved_tokens=1, size=size, max_bytes=max_bytes)
    assert num_tokens(stems) == 103 + 20
    run: list[int] = []
    layer = model.get_submodule("model.layers.0")
    handle = layer.register_forward_pre_hook(lambda module, args: run.append(args[0].shape[1]))
    try:
        list(prefixes(model, contexts, min_saved_tokens=1, max_bytes=max_bytes))
    finally:
        handle.remove()
    assert sum(run) == num_tokens(stems), "the size of a state was measured before"


def test_states_are_dropped_when_nothing_continues_from_them(
    models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, contexts = models["hybrid"], conversation()
    size = state_size(model)
    made: list[weakref.ref[Prefix]] = []

    def noted(make: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Prefix:
            prefix = make(*args, **kwargs)
            made.append(weakref.ref(prefix))
            return prefix

        return wrapped

    monkeypatch.setattr(forest, "freeze", noted(freeze))
    monkeypatch.setattr(forest, "extend", noted(extend))
    alive = []
    for max_bytes in (2**30, size(40) + size(75)):
        made.clear()
        for prefix, _ in prefixes(model, contexts, min_saved_tokens=1, max_bytes=max_bytes):
            alive.append(sum(p.num_bytes for p in [ref() for ref in made] if p is not None))
            del prefix
        assert max(alive) <= max_bytes
        assert not any(ref() for ref in made)
    assert alive[:5] == [size(40), size(40) + size(60), size(40) + size(75), size(60), size(10)]


def test_portions_keep_within_their_caps() -> None:
    """Whole groups, similar lengths together, padded tokens and copies of the prefix counted."""
    lengths = [[3, 9], [1], [8], [2, 2], [30]]
    groups = [[[0] * n for n in group] for group in lengths]
    assert portions(groups, 100, max_tokens=10**6) == [[1, 3, 2, 0, 4]]
    assert portions(groups, 100, max_tokens=32) == [[1, 3, 2], [0], [4]]
    assert portions(groups, 100, max_tokens=31) == [[1, 3], [2, 0], [4]]
    assert portions(groups, 100, max_tokens=1) == [[1], [3], [2], [0], [4]], "a group is never split"
    assert portions(groups, 100, max_bytes=499) == [[1, 3, 2], [0, 4]]
    assert portions(groups, 100, max_bytes=0) == [[1], [3], [2], [0], [4]]
    assert portions(groups, 0, max_bytes=10**6) == [[1, 3, 2, 0, 4]], "a context of one token has no state"
    assert portions([], 100) == []
    many = portions([[[0]]] * 100, 0)
    assert [len(p) for p in many] == [32, 32, 32, 4]


def test_what_does_not_fit_is_refused(models: dict[str, nn.Module]) -> None:
    model = models["dense"]
    with pytest.raises(BadExample, match="context is empty"):
        list(prefixes(model, [[1], []]))
    ((prefix, _),) = prefixes(model, [[1, 2, 3]], version="before")
    with pytest.raises(StalePrefix, match="'before'; expected 'after'"):
        extend(model, prefix, [4], version="after")
