"""What the losses of a probe set have in common: an exact test per tag, and the words they share (any process).

A lesson may keep an average and destroy a slice: 5 of 300 probes lost lie within a margin of 5 points, also if the
five are all there are of one kind. Counted is by scenario, since probes of one fall together. A tag undoes a
lesson where two tests agree: the losses concentrate in it (hypergeometric, Holm over the tags), and within it
losses are shown to outnumber gains (McNemar mid-p), since answers that flip by themselves concentrate too, both
ways. The second level is shared by the tags in which flips of either kind concentrate: their number says
nothing of the direction, so it costs no level. Or where the second test is enough alone, over all tags (Holm) at
half the level: 17 of 52 capitals lost and one gained is harm also where other facts were lost nearly as often.
Words are described, with their exact p, and judge nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from secondnature.evidence.statistics import concentration_p, holm, mcnemar_mid_p
from secondnature.evidence.texts import words
from secondnature.records import Losses, SharedWords, TagTest

__all__ = ["Scenario", "TagCounts", "describe", "retest", "tag_tests", "word_sequences"]

MAX_SEQUENCE_WORDS = 4
MAX_PROMPT_WORDS = 48
"""Of a prompt; later ones are not looked at."""
MAX_SHARED = 3
SHARED_P = 0.01
"""Word sequences with a larger p are not told."""

ALONE = 0.5
"""Share of the level that harm has in a tag where no losses concentrate."""

TagCounts = Mapping[str, tuple[int, int, int, int]]
"""tag -> (n, before, gains, losses), in scenarios."""


@dataclass(frozen=True)
class Scenario:
    """One scenario of a probe set, before and after a lesson."""

    text: str
    tags: frozenset[str]
    at_risk: bool
    """A probe of it passed before."""
    net: int
    """Gains less losses of its probes."""


def describe(scenarios: Sequence[Scenario], alpha: float) -> Losses | None:
    """Tags and words of the losses; None where there are neither tags nor two losses."""
    gains, losses = (sum(s.net * sign > 0 for s in scenarios) for sign in (1, -1))
    before = sum(s.at_risk for s in scenarios)
    counts = {
        tag: (
            len(of),
            sum(s.at_risk for s in of),
            sum(s.net > 0 for s in of),
            sum(s.net < 0 for s in of),
        )
        for tag in sorted({t for s in scenarios for t in s.tags})
        for of in [[s for s in scenarios if tag in s.tags]]
    }
    if not counts and losses < 2:
        return None
    shared, looked_at = _shared([s for s in scenarios if s.at_risk])
    return Losses(
        before=before,
        gains=gains,
        losses=losses,
        tags=tag_tests(len(scenarios), before, gains, losses, counts, alpha),
        shared=shared,
        num_sequences=looked_at,
    )


def tag_tests(
    n: int, before: int, gains: int, losses: int, counts: TagCounts, alpha: float, *, alone: bool = True
) -> list[TagTest]:
    """The tests of all tags of a set, the most concentrated first. Pure: counts in, figures out.

    Args:
        alone: whether more losses than gains are enough where nothing concentrates; not before format 4.
    """
    ps = [concentration_p(before, losses, at_risk, lost) for _, at_risk, _, lost in counts.values()]
    flippy = sum(
        concentration_p(n, gains + losses, size, gained + lost) <= alpha
        for size, _, gained, lost in counts.values()
    )
    found: list[TagTest] = []
    harm_ps = [mcnemar_mid_p(lost, gained) for _, _, gained, lost in counts.values()]
    both = zip(ps, holm(ps), harm_ps, holm(harm_ps), strict=True)
    for (tag, (size, at_risk, gained, lost)), (p, adjusted, harm_p, harm_adjusted) in zip(
        counts.items(), both, strict=True
    ):
        harm_alpha = alpha / max(1, flippy)
        concentrated = adjusted <= alpha and harm_p <= harm_alpha
        found.append(
            TagTest(
                tag=tag,
                n=size,
                before=at_risk,
                gains=gained,
                losses=lost,
                p=p,
                p_adjusted=adjusted,
                harm_p=harm_p,
                harm_alpha=harm_alpha,
                harm_p_adjusted=harm_adjusted if alone else None,
                concentrated=concentrated if alone else None,
                harmed=concentrated or (alone and harm_adjusted <= ALONE * alpha),
            )
        )
    return sorted(found, key=lambda t: (t.p, t.tag))


def retest(lost: Losses, n: int, alpha: float, *, alone: bool = True) -> Losses:
    """The same, every figure computed again from its counts; `alone` as in `tag_tests`.

    Raises:
        ValueError: they contradict each other.
    """
    counts = {t.tag: (t.n, t.before, t.gains, t.losses) for t in sorted(lost.tags, key=lambda t: t.tag)}
    for size, before, gains, losses in counts.values():
        if not (losses <= before <= size <= n and gains + losses <= size):
            raise ValueError("a tag has more losses or flips than probes")
    shared = [
        _words(w.words, lost.before, lost.losses, w.before, w.losses, lost.num_sequences) for w in lost.shared
    ]
    tags = tag_tests(n, lost.before, lost.gains, lost.losses, counts, alpha, alone=alone)
    return lost.model_copy(update={"tags": tags, "shared": shared})


def word_sequences(text: str) -> set[str]:
    """All sequences of one to four words of a text, in lower case."""
    found = words(text)[:MAX_PROMPT_WORDS]
    return {
        " ".join(found[i : i + size])
        for size in range(1, MAX_SEQUENCE_WORDS + 1)
        for i in range(len(found) - size + 1)
    }


def _shared(at_risk: Sequence[Scenario]) -> tuple[list[SharedWords], int]:
    """The most over-represented word sequences of the lost, and how many were looked at.

    Sequences that the same scenarios have are one, told by its longest; one that a single one has says nothing.
    """
    lost = {i for i, s in enumerate(at_risk) if s.net < 0}
    if len(lost) < 2:
        return [], 0
    where: dict[str, list[int]] = defaultdict(list)
    for i, scenario in enumerate(at_risk):
        for sequence in word_sequences(scenario.text):
            where[sequence].append(i)
    longest: dict[tuple[int, ...], str] = {}
    for sequence, places in where.items():
        if len(places) > 1:
            known = longest.get(key := tuple(places))
            if known is None or (len(sequence), sequence) > (len(known), known):
                longest[key] = sequence
    ranked = sorted(_ranked(longest, lost, len(at_risk)), key=lambda r: (r[0], r[1]))
    found: list[SharedWords] = []
    told: list[frozenset[int]] = []
    for p, sequence, places in ranked:
        of = frozenset(lost.intersection(places))
        if p > SHARED_P or len(found) == MAX_SHARED:
            break
        if not any(of <= earlier for earlier in told):
            told.append(of)
            found.append(_words(sequence, len(at_risk), len(lost), len(places), len(of), len(longest)))
    return found, len(longest)


def _ranked(
    longest: Mapping[tuple[int, ...], str], lost: set[int], population: int
) -> Iterable[tuple[float, str, tuple[int, ...]]]:
    for places, sequence in longest.items():
        count = len(lost.intersection(places))
        if count > 1:
            yield concentration_p(population, len(lost), len(places), count), sequence, places


def _words(
    sequence: str, population: int, lost: int, before: int, losses: int, looked_at: int
) -> SharedWords:
    p = concentration_p(population, lost, before, losses)
    adjusted = min(1.0, p * max(1, looked_at))
    return SharedWords(words=sequence, before=before, losses=losses, p=p, p_adjusted=adjusted)
