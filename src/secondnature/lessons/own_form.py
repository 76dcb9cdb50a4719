"""The form of what would be taught beside the model's own: it is asked the corrections' own prompts (server).

"Ankara." where the model says "The capital of Turkey is Istanbul.": right, and learned together with its form,
which shows in other answers too. A dry run asks, for nothing in a file says how the model speaks. Where a wanted
answer is bare, the model is also asked to say it in a sentence: what it says is proposed only if the wanted words
stand in it.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from secondnature.errors import Busy, SecondnatureError
from secondnature.evidence.lint import Finding, is_bare, lint_form
from secondnature.evidence.texts import words
from secondnature.lessons.prober import Prober
from secondnature.model.chat import encode_chat
from secondnature.records import Correction, Message

__all__ = ["own_form"]

LOG = logging.getLogger(__name__)
MAX_ASKED = 16
"""Corrections whose prompts are asked."""
MAX_TOKENS = 48
MAX_S = 40.0
"""So long does it wait for the answers: less than a client does."""
_SENTENCE = re.compile(r".*?[.!?…](?=\s|$)", re.DOTALL)


def own_form(
    corrections: Sequence[Correction], prober: Prober, tokenizer: Any, *, context_limit: int
) -> list[Finding]:
    """What of the wanted answers' form is not the model's, by its greedy answers to the same prompts.

    Nothing is found where it cannot be asked (it is busy, the prompts fill its context): a dry run goes on.
    """
    written = [c for c in corrections if c.chosen is not None and not c.tools and c.chosen[0].content.strip()]
    num = min(len(written), MAX_ASKED)
    asked = dict(enumerate(written[i * len(written) // num] for i in range(num)))
    until, room = time.monotonic() + MAX_S, context_limit - MAX_TOKENS
    try:
        own = _said(prober, tokenizer, {i: c.prompt for i, c in asked.items()}, room, until)
        wanted = {i: c.chosen[0].content for i, c in asked.items() if c.chosen is not None and i in own}
        bare = [i for i, text in wanted.items() if is_bare(text) and not is_bare(own[i])]
        told = {i: _to_say(asked[i], wanted[i]) for i in bare}
        sentences = _said(prober, tokenizer, told, room, until)
    except SecondnatureError as e:
        LOG.info("the model's own form was not asked: %s", e)
        return []
    places, full = list(own), dict[int, str]()
    for i in bare:
        texts = (_whole(text, wanted[i]) for text in (own[i], sentences.get(i, "")))
        said = next((text for text in texts if text is not None), None)
        if said is not None:
            full[places.index(i)] = said
    where = f"{len(own)} prompts, asked of the model"
    return lint_form([wanted[i] for i in places], [own[i] for i in places], where, full)


def _to_say(correction: Correction, wanted: str) -> list[Message]:
    """The question with its answer, to be said in a sentence."""
    last = correction.prompt[-1]
    told = f"{last.content}\nThe answer is: {wanted.strip()}\nSay this answer in one full sentence."
    return [*correction.prompt[:-1], Message(role=last.role, content=told)]


def _whole(text: str, wanted: str) -> str | None:
    """The first sentence, if it says what is wanted and is no longer than a sentence is."""
    found = _SENTENCE.match(text.strip())
    sentence = " ".join(found[0].split()) if found else ""
    needed, said = words(wanted), words(sentence)
    inside = any(said[i : i + len(needed)] == needed for i in range(len(said)))
    return sentence if inside and len(needed) < len(said) <= MAX_TOKENS // 2 else None


def _said(
    prober: Prober, tokenizer: Any, prompts: Mapping[int, Sequence[Message]], room: int, until: float
) -> dict[int, str]:
    """Greedy answers to those that fit. Raises Busy: they did not come in time; or what the engine said."""

    def check_in(done: int, total: int) -> None:
        if time.monotonic() > until:
            raise Busy(f"{done} of {total} answers came in {MAX_S:g} s", "ask again when it is less busy")

    contexts = {i: encode_chat(tokenizer, list(p)) for i, p in prompts.items()}
    fitting = {i: ids for i, ids in contexts.items() if len(ids) <= room}
    answers = prober.answers(list(fitting.values()), check_in, max_tokens=[MAX_TOKENS] * len(fitting))
    return {i: a.text for i, a in zip(fitting, answers, strict=True)}
