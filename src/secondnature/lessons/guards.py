"""What guards a lesson beside the probes that came with it: shipped packs, as far as they suit it (server).

A pack is named in the request and put in here, once, before the job is planned. What the lesson teaches or looks
at, and what does not fit the model, is left out of a pack and counted; of probes that a user sends it is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from secondnature.errors import BadInput
from secondnature.evidence.packs import COVERS, pack, packs
from secondnature.lessons.prober import Prober
from secondnature.records import Correction, GuardPack, Probe, guard_name
from secondnature.wire import TrainRequest

__all__ = ["Guarded", "guarded"]


@dataclass(frozen=True)
class Guarded:
    """A request with all its probes, and what its packs became."""

    request: TrainRequest
    told: list[dict[str, object]] = field(default_factory=list[dict[str, object]])
    """Per pack: `pack`, `guard`, `covers`, `num`, `left_out`."""


def guarded(request: TrainRequest, ledger: Sequence[Correction], prober: Prober) -> Guarded:
    """The request with the probes of its packs among its own."""
    if not request.guards:
        return Guarded(request)
    corrections = ledger if request.ledger else request.corrections or []
    read = [x.prompt for x in (*corrections, *request.development)]
    found = [p for p in packs(request.guards, read) if _fits(p, prober)]
    told = [_told(name, found) for name in request.guards]
    return Guarded(request.model_copy(update={"probes": [*request.probes, *found], "guards": []}), told)


def _fits(probe: Probe, prober: Prober) -> bool:
    try:
        prober.check([probe])
    except BadInput:
        return False
    return True


def _told(name: GuardPack, found: Sequence[Probe]) -> dict[str, object]:
    num = sum(p.behaviour == guard_name(name) for p in found)
    return {
        "pack": name,
        "guard": guard_name(name),
        "covers": COVERS[name],
        "num": num,
        "left_out": len(pack(name)) - num,
    }
