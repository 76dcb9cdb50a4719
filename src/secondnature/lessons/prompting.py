"""Prompting alone: what one would do instead of a lesson, measured beside it (server).

The probes of what is taught are asked once more before the lesson, with the corrections as examples in them.
"Could one not just say it?" has an answer then. It decides nothing: a prompt must be sent with every request, and a
lesson need not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from secondnature.errors import BadInput
from secondnature.evidence.statistics import two_sided
from secondnature.lessons.prober import Prober
from secondnature.records import Correction, Message, Outcome, Probe, Prompted

__all__ = ["compared", "prompted"]

LOG = logging.getLogger(__name__)
MAX_PROMPTED = 16
"""Corrections that are put into the question."""


def prompted(
    probes: Sequence[Probe], behaviour: str, corrections: Sequence[Correction], prober: Prober
) -> list[tuple[Probe, Probe]]:
    """(probe, the same with the corrections in its question); empty where none is written, or they do not fit."""
    written = [c for c in corrections if c.chosen][:MAX_PROMPTED]
    shown = "\n\n".join(
        f"Asked: {c.prompt[-1].content}\nAnswer: {c.chosen[0].content}" for c in written if c.chosen
    )
    pairs: list[tuple[Probe, Probe]] = []
    for probe in probes:
        if written and probe.behaviour == behaviour and probe.side == "right":
            last = probe.prompt[-1]
            told = f"Answer as in these examples.\n\n{shown}\n\nAsked: {last.content}\nAnswer:"
            prompt = [*probe.prompt[:-1], Message(role=last.role, content=told)]
            pairs.append((probe, probe.model_copy(update={"prompt": prompt, "margin": None})))
    try:
        prober.check([p for _, p in pairs])
    except BadInput as e:
        LOG.info("prompting alone is not measured: %s", e)
        return []
    return pairs


def compared(
    pairs: Sequence[tuple[Probe, Probe]],
    outcomes: Sequence[Outcome],
    after: Sequence[Outcome],
    num_corrections: int,
) -> Prompted | None:
    """What prompting gave (`outcomes`, of the prompted probes) beside what the lesson gave (`after`, of all)."""
    if not pairs:
        return None
    now = {o.probe: o.passed for o in after}
    both = [(o.passed, now[p.digest()]) for (p, _), o in zip(pairs, outcomes, strict=True)]
    only_prompting = sum(by_prompt and not by_lesson for by_prompt, by_lesson in both)
    only_lesson = sum(by_lesson and not by_prompt for by_prompt, by_lesson in both)
    return Prompted(
        n=len(both),
        num_corrections=min(num_corrections, MAX_PROMPTED),
        prompting=sum(by_prompt for by_prompt, _ in both),
        lesson=sum(by_lesson for _, by_lesson in both),
        only_prompting=only_prompting,
        only_lesson=only_lesson,
        p=two_sided(only_lesson, only_prompting),
    )
