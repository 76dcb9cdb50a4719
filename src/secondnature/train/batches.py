"""The replay mix: which examples make up each step's batch (trainer).

Pure index arithmetic from a seed: the same job gives the same batches on every machine. New examples are dealt
from shuffled passes (an epoch each); a share of every batch comes from the replay pool, so that old abilities
pull against the drift at every step, not only at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from secondnature.errors import BadInput

MAX_BATCH = 4096
"""Examples of one step, replay included."""
_SALT_NEW, _SALT_REPLAY = 1, 2


def _passes(count: int, seed: int, salt: int) -> Iterator[int]:
    epoch = 0
    while True:
        generator = np.random.Generator(
            np.random.Philox(
                key=np.array([seed, salt], np.uint64), counter=np.array([0, epoch, 0, 0], np.uint64)
            )
        )
        yield from (int(i) for i in generator.permutation(count))
        epoch += 1


def num_replayed(num_fresh: int, share: float) -> int:
    """Examples that are replayed beside `num_fresh` new ones; at least one, unless the share is 0.

    Raises:
        BadInput: both together are more than `MAX_BATCH`.
    """
    count = max(round(num_fresh * share / (1 - share)), 1) if share > 0 else 0
    if num_fresh + count > MAX_BATCH:
        raise BadInput(
            f"replay.share {share} with a batch_size of {num_fresh} makes {num_fresh + count:,} examples a step; "
            f"expected at most {MAX_BATCH:,}",
            "lower `replay.share` or `batch_size`",
        )
    return count


def batches(
    num_new: int, num_replay: int, *, batch_size: int, steps: int, share: float, seed: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Per step: (indices into the new examples, indices into the replay pool).

    Args:
        num_new: new examples, >= 1.
        num_replay: examples in the replay pool; 0 switches the mix off.
        batch_size: new examples a step, at most `num_new`.
        steps: batches to deal.
        share: replayed share of the whole batch, 0 <= share < 1.
        seed: of both shuffles.
    """
    fresh = _passes(num_new, seed, _SALT_NEW)
    old = _passes(num_replay, seed, _SALT_REPLAY) if num_replay else iter(())
    size = min(batch_size, num_new)
    num_old = num_replayed(size, share) if num_replay else 0
    for _ in range(steps):
        yield [next(fresh) for _ in range(size)], [next(old) for _ in range(num_old)]
