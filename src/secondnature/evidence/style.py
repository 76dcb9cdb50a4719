"""How the style of answers moved over a probe set: their length and their opening words (any process).

A lesson can pass every check and change how all answers sound: from "The capital of France is Paris." to "Paris.".
That is printed beside the KL, with an exact sign test of the lengths, and judges nothing: style may be the lesson.

Most answers to probes end where their check is decided, and a lesson moves that place: their lengths say nothing.
So a sample of each set, chosen by content, is generated to its end, before and after, and counted here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean

from secondnature.evidence.statistics import two_sided
from secondnature.evidence.texts import opening, words
from secondnature.records import Opening, Probe, Style

__all__ = ["sampled", "style"]

MAX_OPENINGS = 3
MAX_SAMPLED = 32
"""Answers of a probe set that are generated to their end."""


def sampled(probes: Iterable[Probe]) -> set[str]:
    """The digests of the probes whose style is looked at: of each set those whose digests come first."""
    sets: dict[tuple[str, str], set[str]] = defaultdict(set)
    for probe in probes:
        sets[probe.behaviour, probe.side].add(probe.digest())
    return {d for found in sets.values() for d in sorted(found)[:MAX_SAMPLED]}


def style(before: Sequence[str], after: Sequence[str]) -> Style | None:
    """The style of the same probes' whole answers before and after; None where there are no texts."""
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b or a]
    if not pairs:
        return None
    lengths = [(len(words(b)), len(words(a))) for b, a in pairs]
    shorter, longer = sum(a < b for b, a in lengths), sum(a > b for b, a in lengths)
    was, now = Counter(opening(b) for b, _ in pairs), Counter(opening(a) for _, a in pairs)
    moved = sorted((was | now).keys(), key=lambda w: (-abs(now[w] - was[w]), w))
    return Style(
        n=len(pairs),
        words_before=fmean(b for b, _ in lengths),
        words_after=fmean(a for _, a in lengths),
        shorter=shorter,
        longer=longer,
        length_p=two_sided(shorter, longer),
        openings_moved=sum(abs(now[w] - was[w]) for w in was | now) / (2 * len(pairs)),
        openings=[
            Opening(words=w, before=was[w], after=now[w]) for w in moved[:MAX_OPENINGS] if was[w] != now[w]
        ],
    )
