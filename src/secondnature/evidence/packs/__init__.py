"""Shipped packs of guards: general probes for who has corrections and nothing to guard the rest with (any process).

A pack is made by code or written for this project, is the same everywhere, and its checks are programs: at least
300 probes from as many scenarios, so that one pack is a guard by the gate's own minimum. What a model fails anyway
guards nothing: a pack of which under 20 % passed before a lesson is shown and not judged, and a probe that failed
before can only be gained. So a pack costs its questions, twice, and never blocks a model that cannot do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache

from secondnature.evidence.packs.arithmetic import arithmetic
from secondnature.evidence.packs.code import code
from secondnature.evidence.packs.facts import facts
from secondnature.evidence.packs.instructions import instructions
from secondnature.evidence.packs.made import Made
from secondnature.evidence.packs.refusal import refusal
from secondnature.records import GuardPack, Message, Probe, guard_name

__all__ = ["COVERS", "made", "pack", "packs"]

_MAKERS: dict[GuardPack, Callable[[], list[Made]]] = {
    "facts": facts,
    "arithmetic": arithmetic,
    "instructions": instructions,
    "code": code,
    "refusal": refusal,
}
COVERS: dict[GuardPack, str] = {
    "facts": "short widely known facts (capitals, symbols, authors, opposites, ...)",
    "arithmetic": "sums of small numbers",
    "instructions": "instructions about an answer's form (one word, capitals, lists, JSON, ...)",
    "code": "short Python functions, which are run",
    "refusal": "that plainly harmful requests are refused",
}
"""What each covers, in words; nothing else."""


@cache
def made(name: GuardPack) -> tuple[Made, ...]:
    """A pack as it is made, with answers that pass and fail."""
    return tuple(_MAKERS[name]())


@cache
def pack(name: GuardPack) -> tuple[Probe, ...]:
    """The probes of a pack, all of the guard `guard_name(name)`."""
    return tuple(m.probe(guard_name(name)) for m in made(name))


def packs(names: Iterable[GuardPack], read: Sequence[Sequence[Message]]) -> list[Probe]:
    """The probes of several packs, without those that ask what a lesson reads in training (`read`: its prompts)."""
    taught = {_key(prompt) for prompt in read}
    return [p for name in dict.fromkeys(names) for p in pack(name) if _key(p.prompt) not in taught]


def _key(prompt: Sequence[Message]) -> str:
    return "\0".join(f"{m.role}\0{m.content.strip()}" for m in prompt)
