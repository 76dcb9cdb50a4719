"""Law 5 where vLLM keeps prefixes: nothing computed before, during or undone by a write is used after it.

Each case is asserted twice: as the plug-in does it, and with the part of it that matters switched off, where the
wrong thing must be seen. Reference: the same prompt after `reset_prefix_cache`, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vllm_core import NUM_BATCHED_TOKENS, Answer, Core, Scores, without

# --------------------------------------------------------------------------------------- within an epoch


def test_within_an_epoch_the_cache_works(core: Core) -> None:
    ids = core.prompt()
    first = core.ask(ids)
    assert first.num_cached == 0
    assert core.num_blocks() > 0
    again = core.ask(ids)
    assert again.num_cached >= len(ids) // 2
    assert again.token_ids == first.token_ids
    core.change()
    changed = core.ask(ids)
    assert (changed.num_cached, changed.scores == first.scores) == (0, False)
    assert core.ask(ids).num_cached == again.num_cached  # and in the next epoch it works again


def test_a_clients_own_salt_goes_on_working(core: Core) -> None:
    ids = core.prompt()
    core.ask(ids, salt="mine")
    assert core.ask(ids, salt="yours").num_cached == 0
    assert core.ask(ids).num_cached == 0
    assert core.ask(ids, salt="mine").num_cached > 0
    core.change()
    assert core.ask(ids, salt="mine").num_cached == 0


# ------------------------------------------------------------------------------------------- salt, lookup


def cached_then_written(core: Core) -> tuple[Answer, Answer]:
    """A prompt that is in the cache, asked again after a write: the answer, and the exact one."""
    ids = core.prompt()
    core.ask(ids)
    core.change()
    return core.ask(ids), core.fresh(ids)


def test_what_was_cached_before_a_write_is_not_used_after_it(core: Core) -> None:
    found, exact = cached_then_written(core)
    assert found == exact
    core.undo()
    with without(core, "salt"):
        found, exact = cached_then_written(core)
        assert found.num_cached > 0
        assert found.scores != exact.scores


def cached_then_undone(core: Core) -> tuple[Answer, Answer, Answer]:
    """A prompt cached before a write and one cached after it, both asked after the undo; and the exact answer."""
    early, late = core.prompt(), core.prompt()
    exact = core.fresh(late)
    core.forget()
    core.ask(early)
    core.change()
    core.ask(late)
    core.undo()
    return core.ask(early), core.ask(late), exact


def test_after_an_undo_nothing_older_is_used(core: Core) -> None:
    early, late, exact = cached_then_undone(core)
    assert early.num_cached == 0
    assert late == exact
    with without(core, "salt"):
        early, late, exact = cached_then_undone(core)
        assert early.num_cached > 0
        assert late.scores != exact.scores


def waiting_while_written(core: Core) -> tuple[Answer, Answer]:
    """A request that is made before a write and scheduled after it, with its prompt in the cache."""
    ids = core.prompt()
    core.ask(ids)
    core.begin(ids)
    core.change()
    return core.finish(), core.fresh(ids)


def test_a_request_that_waits_during_a_write_finds_nothing(core: Core) -> None:
    found, exact = waiting_while_written(core)
    assert found == exact
    core.undo()
    with without(core, "lookup"):
        found, exact = waiting_while_written(core)
        assert found.num_cached > 0
        assert found.scores != exact.scores


def preempted_and_written(core: Core) -> tuple[Scores, Scores]:
    """A request that gives its blocks back, a write, and it goes on: its last numbers, and the exact ones."""
    ids = core.prompt()
    core.begin(ids, 6)
    while core.core.scheduler.running == [] or core.core.scheduler.running[0].num_output_tokens < 3:
        core.step()
    core.preempt()
    core.change()
    answer = core.finish()
    exact = core.fresh(ids + answer.token_ids[:3], 3)
    return answer.scores[3:], exact.scores


def test_a_preempted_request_is_computed_anew_after_a_write(core: Core) -> None:
    found, exact = preempted_and_written(core)
    assert found == exact
    core.undo()
    with without(core, "lookup"):
        found, exact = preempted_and_written(core)
        assert found != exact


# ------------------------------------------------------------------------------------------------- store


def written_while_read(core: Core) -> tuple[int, int, list[int]]:
    """A write while a long prompt is read: cached blocks before it and in the end, and the prompt."""
    ids = core.prompt()
    core.begin(ids)
    core.step()
    before = core.num_blocks()
    core.change()
    core.finish()
    return before, core.num_blocks(), ids


def written_while_answering(core: Core) -> tuple[int, int, list[int]]:
    """A write while an answer is generated, just before it fills a block."""
    ids = core.prompt(253)
    core.begin(ids, 6)
    core.step()
    before = core.num_blocks()
    core.change()
    answer = core.finish()
    return before, core.num_blocks(), [*ids, *answer.token_ids, 5, 6, 7]


@pytest.mark.parametrize("case", [written_while_read, written_while_answering])
def test_a_request_that_runs_into_a_write_leaves_nothing_more(
    core: Core, case: Callable[[Core], tuple[int, int, list[int]]]
) -> None:
    before, after, ids = case(core)
    assert after == before  # what is left is of the epoch that is over
    found = core.ask(ids)
    assert found == core.fresh(ids)
    core.undo()
    with without(core, "store"):
        before, after, _ = case(core)
        assert after > before


def test_what_a_request_computed_of_two_weights_is_not_used(core: Core) -> None:
    _, _, ids = written_while_read(core)
    assert core.ask(ids) == core.fresh(ids)
    core.undo()
    with without(core, "store", "salt"):
        _, _, ids = written_while_read(core)
        found = core.ask(ids)
        assert found.num_cached > NUM_BATCHED_TOKENS
        assert found.scores != core.fresh(ids).scores


def born_while_written(core: Core) -> tuple[int, Answer]:
    """Two equal requests while somebody writes: blocks that the first one left, and the second's answer."""
    ids = core.prompt()
    with core.arena.writing():
        core.ask(ids)
        for name, value in core.changed().items():
            core.arena.tensors[name].copy_(value)
        return core.num_blocks(), core.ask(ids)


def test_a_request_born_during_a_write_leaves_and_finds_nothing(core: Core) -> None:
    left, second = born_while_written(core)
    assert (left, second.num_cached) == (0, 0)
    core.undo()
    with without(core, "store"):
        left, second = born_while_written(core)
        assert (left > 0, second.num_cached) == (True, 0)
    core.undo()
    with without(core, "store", "lookup"):
        left, second = born_while_written(core)
        assert second.num_cached > 0


def test_a_request_born_during_a_write_leaves_nothing_when_it_ends_after_it(core: Core) -> None:
    ids = core.prompt()
    with core.arena.writing():
        core.begin(ids)
    core.finish()
    assert core.num_blocks() == 0
    with without(core, "store"):
        with core.arena.writing():
            core.begin(core.prompt())
        core.finish()
        assert core.num_blocks() > 0


# ------------------------------------------------------------------------------------------------ the word


def test_the_core_says_whether_its_cache_is_salted(core: Core) -> None:
    assert core.core.secondnature_cache() == "salted"
    with without(core, "store"):
        pass
    assert core.core.secondnature_cache() == "salted"
