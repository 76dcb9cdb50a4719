"""A forest over a batch: contexts that begin alike are computed alike, once, up to where they part (trainer).

Turns of one conversation, variants of one prompt, several answers to one question: the contexts of a batch are
often the same, or the same for a while. `plan` finds that from the token ids alone and says which beginnings to
compute on their own (`Stem`) and what continues from where; `prefixes` walks the plan depth first with a model, so
that only the states on the way from a root to the context at hand are in memory. A beginning is only worth a pass
of its own if enough tokens are saved by it, and only if its state can be kept while its branches are computed:
beyond the cap on memory the branches compute it again instead.

Contexts of a batch over one prefix, tree or no tree: Tree Training (Wang et al. 2025, arXiv 2511.00413); here the
context is frozen, so that nothing of the tree is kept for backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from secondnature.train.prefix import Prefix, extend, extend_all, freeze, side_by_side

__all__ = [
    "MAX_BYTES",
    "MIN_SAVED_TOKENS",
    "StateSize",
    "Stem",
    "forwards",
    "num_tokens",
    "plan",
    "prefixes",
    "state_size",
]

MIN_SAVED_TOKENS = 64
"""A shared beginning that saves fewer is computed again with each context: a pass has a price of its own, and the
delta rule works in chunks of 64."""
MAX_BYTES = 2**30
"""Of all states that are kept at a time, the one in use among them; and of the copies that one forward reads."""
MAX_TOKENS = 512
"""Of the continuations in one forward, padding included: bounds what is kept for backward."""
MAX_ROWS = 32
"""Continuations in one forward: the delta rule pads each to a chunk of 64."""


@dataclass(frozen=True)
class Stem:
    """A context, or the beginning that several contexts share; computed once."""

    ids: tuple[int, ...]
    """All of it, from the first token on."""
    base: int | None
    """The stem it continues (its place in the plan, where it comes earlier); None: computed from nothing."""
    contexts: tuple[int, ...]
    """Which of the given contexts it is, exactly; empty if it is only the beginning of others."""


@dataclass(frozen=True)
class StateSize:
    """How the state of a model grows with the context."""

    fixed_bytes: int = 0
    """Recurrent states: the same for every length."""
    bytes_per_token: int = 0
    """Keys and values."""

    def __call__(self, num_context: int) -> int:
        """Bytes of the prefix of that many context tokens, the last of which is not in it."""
        return self.fixed_bytes + self.bytes_per_token * (num_context - 1)


def plan(
    contexts: Sequence[Sequence[int]],
    *,
    min_saved_tokens: int = MIN_SAVED_TOKENS,
    size: StateSize | None = None,
    max_bytes: int = MAX_BYTES,
) -> list[Stem]:
    """What to compute, in depth-first order; every context is the `contexts` of exactly one stem.

    `size` None: memory is no object.
    """
    size = size or StateSize()
    texts = [tuple(c) for c in contexts]
    stems: list[Stem] = []
    # contexts that begin alike, the stem they may continue from, its length, bytes kept on the way to them
    waiting: list[tuple[list[int], int | None, int, int]] = [
        (group, None, 0, 0) for group in reversed(_parted(texts, range(len(texts)), 0))
    ]
    while waiting:
        members, base, reached, held = waiting.pop()
        rows = [texts[i] for i in members]
        shared = _num_shared(min(rows), max(rows))
        ends = [i for i in members if len(texts[i]) == shared]
        branches = _parted(texts, [i for i in members if len(texts[i]) > shared], shared)
        worth = bool(ends) or (len(branches) - 1) * (shared - reached) >= min_saved_tokens
        fits = held + size(shared) + max(size(len(row)) for row in rows) <= max_bytes
        kept = bool(branches) and worth and fits
        if ends or kept:
            stems.append(Stem(rows[0][:shared], base, tuple(ends)))
        if kept:
            base, reached, held = len(stems) - 1, shared, held + size(shared)
        waiting.extend((branch, base, reached, held) for branch in reversed(branches))
    return stems


def _num_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two contexts have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _parted(contexts: Sequence[Sequence[int]], members: Sequence[int], at: int) -> list[list[int]]:
    """The members by their token at that place, in the order of the first of each."""
    groups: dict[int, list[int]] = {}
    for i in members:
        groups.setdefault(contexts[i][at], []).append(i)
    return list(groups.values())


def portions(
    groups: Sequence[Sequence[Sequence[int]]],
    prefix_bytes: int,
    *,
    max_tokens: int = MAX_TOKENS,
    max_bytes: int = MAX_BYTES,
) -> list[list[int]]:
    """How to spread groups of continuations over forwards: per forward, which groups.

    A group (the answers of one example) stays together; a forward has one group at least, and no more than the
    caps allow: each continuation is padded to the longest and reads a copy of a prefix, of `prefix_bytes` at most.
    Groups of similar length go together.
    """
    max_rows = min(MAX_ROWS, max_bytes // max(1, prefix_bytes))
    found: list[list[int]] = []
    rows = 0
    for i in sorted(range(len(groups)), key=lambda i: max(map(len, groups[i]), default=0)):
        longest = max(map(len, groups[i]), default=0)
        rows += len(groups[i])
        if not found or rows > max_rows or rows * longest > max_tokens:
            found.append([])
            rows = len(groups[i])
        found[-1].append(i)
    return found


def num_tokens(stems: Sequence[Stem]) -> int:
    """How many tokens a plan runs through the model."""
    return sum(len(s.ids) - (1 if s.base is None else len(stems[s.base].ids)) for s in stems)


_SIZES: WeakKeyDictionary[nn.Module, StateSize] = WeakKeyDictionary()


def state_size(model: nn.Module) -> StateSize:
    """Measured on the prefix of one token, once per model."""
    if model not in _SIZES:
        _SIZES[model] = _measured(model)
    return _SIZES[model]


def _measured(model: nn.Module) -> StateSize:
    prefix = freeze(model, [0, 0])
    per_token = sum(t.numel() * t.element_size() for s in prefix.states for t in s.attention or ())
    return StateSize(prefix.num_bytes - per_token, per_token)


def prefixes(
    model: nn.Module,
    contexts: Sequence[Sequence[int]],
    *,
    min_saved_tokens: int = MIN_SAVED_TOKENS,
    max_bytes: int = MAX_BYTES,
    version: str | None = None,
) -> Iterator[tuple[Prefix, tuple[int, ...]]]:
    """The prefix of each different context, and which of the given contexts it is the prefix of.

    Each is dropped here once nothing is to continue from it: a caller that holds on to none has at most `max_bytes`
    of them in memory, or the two that the longest context needs.

    Raises:
        BadExample: a context is empty.
        UnsupportedModel: the model keeps state of a kind that cannot be frozen.
    """
    if not all(contexts):
        freeze(model, [])  # says what is wrong
    stems = plan(contexts, min_saved_tokens=min_saved_tokens)
    if any(s.base is not None for s in stems):
        stems = plan(contexts, min_saved_tokens=min_saved_tokens, size=state_size(model), max_bytes=max_bytes)
    last_use = {s.base: i for i, s in enumerate(stems)}
    kept: dict[int, Prefix] = {}
    ready: dict[int, Prefix] = {}
    for i, stem in enumerate(stems):
        siblings = [] if i in ready else _siblings(model, stems, i, last_use, kept, max_bytes)
        if siblings:
            first = stem.ids[:1] if stem.base is None else stems[stem.base].ids
            base = freeze(model, first, version=version) if stem.base is None else kept[stem.base]
            mores = [stems[k].ids[len(first) :] for k in siblings]
            ready.update(zip(siblings, extend_all(model, base, mores, version=version), strict=True))
            del base
        if i in ready:
            prefix = ready.pop(i)
            if stem.base is not None and last_use[stem.base] == i:
                del kept[stem.base]
        elif stem.base is None:
            prefix = freeze(model, stem.ids, version=version)
        else:
            base = kept.pop(stem.base) if last_use[stem.base] == i else kept[stem.base]
            prefix = extend(model, base, stem.ids[len(stems[stem.base].ids) :], version=version)
            del base
        if i in last_use:
            kept[i] = prefix
        if stem.contexts:
            yield prefix, stem.contexts
        del prefix


def _siblings(
    model: nn.Module,
    stems: Sequence[Stem],
    at: int,
    last_use: Mapping[int | None, int],
    kept: Mapping[int, Prefix],
    max_bytes: int,
) -> list[int]:
    """The stems from `at` on that can be read in one forward: leaves of one base, of a model that pads; or none."""
    first = stems[at]
    found: list[int] = []
    reached = 1 if first.base is None else len(stems[first.base].ids)
    for k in range(at, min(at + MAX_ROWS, len(stems))):
        if stems[k].base != first.base or stems[k].ids[0] != first.ids[0] or len(stems[k].ids) == reached:
            break
        found.append(k)
    if len(found) < 2 or not side_by_side(model):
        return []
    size, held, longest = state_size(model), sum(p.num_bytes for p in kept.values()), 0
    for count, k in enumerate(found):
        held += size(len(stems[k].ids))
        longest = max(longest, len(stems[k].ids) - reached)
        if k in last_use or held > max_bytes or (count + 1) * longest > MAX_TOKENS:
            found = found[:count]
            break
    return found if len(found) > 1 else []


def forwards(
    model: nn.Module,
    contexts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Sequence[int]]],
    *,
    max_tokens: int = MAX_TOKENS,
    max_bytes: int = MAX_BYTES,
    copy_share: float = 1.0,
    version: str | None = None,
) -> Iterator[tuple[list[Prefix], list[int]]]:
    """All forwards that score each group of continuations on the context of its place: prefixes, and which groups.

    `prefixes` and `portions` in one; their caps and what they raise. Groups of different contexts share a forward
    if the model reads them `side_by_side`, as far as half of `max_bytes` holds their prefixes. `copy_share`: how
    much of each continuation's copy of the prefix is in memory at a time; less than all where layers are recomputed
    one by one.
    """
    together = len({tuple(c) for c in contexts}) > 1 and side_by_side(model)
    waiting: list[tuple[Prefix, int]] = []
    held = 0
    for prefix, members in prefixes(model, contexts, max_bytes=max_bytes, version=version):
        if waiting and held + prefix.num_bytes > max_bytes // 2:
            yield from _portioned(waiting, groups, max_tokens, max_bytes, copy_share)
            waiting, held = [], 0
        waiting += [(prefix, i) for i in members]
        held += prefix.num_bytes
        del prefix
        if not together:  # before the next is computed
            yield from _portioned(waiting, groups, max_tokens, max_bytes, copy_share)
            waiting, held = [], 0
    yield from _portioned(waiting, groups, max_tokens, max_bytes, copy_share)


def _portioned(
    waiting: Sequence[tuple[Prefix, int]],
    groups: Sequence[Sequence[Sequence[int]]],
    max_tokens: int,
    max_bytes: int,
    copy_share: float,
) -> Iterator[tuple[list[Prefix], list[int]]]:
    copied = int(max((p.num_bytes for p, _ in waiting), default=0) * copy_share)
    of_these = [groups[i] for _, i in waiting]
    for portion in portions(of_these, copied, max_tokens=max_tokens, max_bytes=max_bytes):
        yield [waiting[k][0] for k in portion], [waiting[k][1] for k in portion]
