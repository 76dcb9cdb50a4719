"""The retention guard: what kept lessons taught is asked again beside the probes of a new one (server).

A lesson leaves the probes of its behaviour, and every pinned one, in its directory. A later lesson that is judged
asks some of them, at most `MAX_RETAINED`, before and after: a fall that is shown undoes it, a set too small to show
one keeps nobody from a verdict. What the new lesson asks itself, or reads in training, says nothing of the old one
and is left out, as is what does not fit or cannot be read: an old lesson never breaks a new one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

from secondnature.errors import BadInput
from secondnature.records import Probe, Side

__all__ = ["MAX_RETAINED", "Kept", "Retention", "choose", "left_behind"]

MAX_RETAINED = 200
"""Probes of all earlier lessons together that a lesson asks again, before and after."""
MAX_NAMED = 3
"""Lessons in the name of a set."""


@dataclass(frozen=True)
class Kept:
    """A lesson in force, and the probes that it left behind."""

    number: int
    probes: Sequence[Probe]


@dataclass(frozen=True)
class Retention:
    """What of earlier lessons is asked again."""

    sets: dict[str, list[Probe]] = field(default_factory=dict[str, list[Probe]])
    """By name: `listening (lesson 0003)`."""
    left_out: dict[str, int] = field(default_factory=dict[str, int])
    """What is not asked, and why."""

    @property
    def probes(self) -> list[Probe]:
        """All of them."""
        return [p for of in self.sets.values() for p in of]

    def without(self, num_unreadable: int) -> Retention:
        """The same, with lessons counted whose probes cannot be read."""
        more = {"unreadable lessons": num_unreadable} if num_unreadable else {}
        return Retention(self.sets, {**self.left_out, **more})

    def summary(self) -> dict[str, Any]:
        """What a dry run answers."""
        return {"sets": {name: len(of) for name, of in self.sets.items()}, "left_out": self.left_out}


def left_behind(probes: Sequence[Probe], behaviour: str | None) -> list[Probe]:
    """Which of a lesson's probes later ones ask again: those of its behaviour, and what is pinned."""
    return [p for p in probes if p.pin or p.behaviour == behaviour]


def choose(
    kept: Sequence[Kept],
    context_of: Callable[[Probe], Sequence[int]],
    asked: Container[tuple[int, ...]],
    read: Container[tuple[int, ...]],
    most: int = MAX_RETAINED,
) -> Retention:
    """The probes that are asked again: what is pinned first, then in turn of each lesson, the newest first.

    Args:
        kept: lessons in force, oldest first.
        context_of: token ids of what a probe asks. Raises BadInput: it does not fit this model.
        asked: contexts of the lesson's own probes.
        read: contexts that it reads in training.
        most: so many are asked.
    """
    left_out: Counter[str] = Counter()
    numbers: dict[tuple[str, Side], set[int]] = defaultdict(set)
    chosen: dict[tuple[str, Side], list[Probe]] = defaultdict(list)
    taken: set[tuple[int, ...]] = set()
    places = list(_in_turn(kept))
    for place, (number, probe) in enumerate(places):
        if len(taken) >= most:
            left_out[f"more than {most}"] += len(places) - place
            break
        try:
            context = tuple(context_of(probe))
        except BadInput:
            left_out["does not fit the model"] += 1
            continue
        known = {
            "asked by the lesson": context in asked or context in taken,
            "read in training": context in read,
        }
        reason = next((why for why, holds in known.items() if holds), None)
        if reason is not None:
            left_out[reason] += 1
            continue
        taken.add(context)
        numbers[probe.behaviour, probe.side].add(number)
        chosen[probe.behaviour, probe.side].append(probe)
    sets = {_name(*key, numbers[key]): of for key, of in sorted(chosen.items())}
    return Retention(sets, dict(left_out))


def _in_turn(kept: Sequence[Kept]) -> Iterator[tuple[int, Probe]]:
    """All probes: the pinned, then one of each lesson in turn, the newest lesson first each time."""
    newest = [(k.number, _spread(k.probes)) for k in reversed(kept)]
    pinned = ((number, p) for number, probes in newest for p in probes if p.pin)
    columns = [[(number, p) for p in probes if not p.pin] for number, probes in newest]
    rest = (x for row in zip_longest(*columns) for x in row if x is not None)
    return chain(pinned, rest)


def _spread(probes: Sequence[Probe]) -> list[Probe]:
    """In an order of which every beginning stands for the whole: one of each scenario before the second of any."""
    seen: Counter[str] = Counter()
    ranked: list[tuple[int, str, Probe]] = []
    for digest, probe in sorted({p.digest(): p for p in probes}.items()):
        ranked.append((seen[probe.cluster], digest, probe))
        seen[probe.cluster] += 1
    return [p for _, _, p in sorted(ranked, key=lambda x: x[:2])]


def _name(behaviour: str, side: Side, numbers: set[int]) -> str:
    """Of a set. Each side of a behaviour is one: gains of one must not hide losses of the other."""
    newest = [f"{n:04d}" for n in sorted(numbers, reverse=True)]
    told = ", ".join(newest[:MAX_NAMED]) + (
        f" and {more} more" if (more := len(newest) - MAX_NAMED) > 0 else ""
    )
    label = behaviour if side == "right" else f"{behaviour}, other side"
    return f"{label} (lesson{'s'[: len(newest) > 1]} {told})"
