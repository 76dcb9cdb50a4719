"""What about a correction may be meant otherwise than it is taken, and what cannot be meant (any process).

Said before anything is taught: by an import's summary, by `learn`, by a dry run. A record is refused only where it
asks nothing; all else may be what somebody wants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from secondnature.records.conversation import Message
from secondnature.records.corrections import Correction

__all__ = ["Contradictions", "doubts", "kind_of_doubt", "kinds_of_doubt", "nothing_asked"]


def nothing_asked(correction: Correction) -> str | None:
    """Why nobody can have meant a correction; None: one can."""
    if not any(m.content.strip() for m in correction.prompt):
        return "the prompt is blank: what was asked is not known"
    last = correction.prompt[-1]
    if last.role == "user" and not last.content.strip():
        return "the user's last turn is blank: what was asked is not known"
    return None


def doubts(correction: Correction) -> list[str]:
    """What may be meant otherwise, a line each: its kind, a colon, how it is taken."""
    found: list[str] = []
    prompt, chosen = correction.prompt, correction.chosen
    blank = [f"{i + 1} ({m.role})" for i, m in enumerate(prompt) if not m.content.strip()]
    if blank:
        found.append(f"a blank turn in the conversation: message {', '.join(blank)}")
    if all(m.role == "system" for m in prompt):
        found.append("nobody asks: the prompt is a system message alone")
    elif prompt[-1].role == "system":
        found.append("the system has the last word: a system message follows the user's last turn")
    if chosen is None:
        return found
    text, asked = chosen[0].content, prompt[-1].content.strip()
    if asked and len(text.strip()) > len(asked) and text.strip().startswith(asked):
        found.append("the answer begins with the prompt: it is taught whole, with the prompt in it")
    if text.strip() and text[0].isspace():
        found.append(
            "the answer begins with a space or a line end: where the template keeps it, it is taught"
        )
    if (correction.rating or 0) < 0 and correction.said is None and correction.rejected is None:
        found.append(
            "rated down beside a wanted answer alone: the rating is taken to be of what the model said, "
            "which is not there"
        )
    return found


def kind_of_doubt(doubt: str) -> str:
    """Its kind, under which doubts are counted."""
    return doubt.partition(": ")[0]


def kinds_of_doubt(corrections: Iterable[Correction]) -> dict[str, int]:
    """Kind -> how many corrections have it, those that contradict an earlier one among them."""
    found: dict[str, int] = {}
    contradictions = Contradictions()
    for number, correction in enumerate(corrections):
        other = contradictions.take(correction, number)
        kinds = [
            *map(kind_of_doubt, doubts(correction)),
            *([Contradictions.KIND] if other is not None else []),
        ]
        for kind in kinds:
            found[kind] = found.get(kind, 0) + 1
    return found


class Contradictions:
    """Finds corrections of which one wants what another one rejects, asked the same; keeps a digest of each."""

    KIND = "contradicts another one"

    def __init__(self) -> None:
        self._wanted: dict[int, int] = {}
        self._rejected: dict[int, int] = {}

    def take(self, correction: Correction, number: int) -> int | None:
        """The number of an earlier one that this one contradicts; None: there is none."""
        wanted = _key(correction.prompt, correction.chosen)
        rejected = _key(correction.prompt, correction.rejected)
        other = self._rejected.get(wanted, self._wanted.get(rejected)) if wanted != rejected else None
        if correction.chosen is not None:
            self._wanted.setdefault(wanted, number)
        if correction.rejected is not None:
            self._rejected.setdefault(rejected, number)
        return other


def _key(prompt: list[Message], answer: list[Message] | None) -> int:
    """0: there is no answer."""
    if answer is None:
        return 0
    told = hashlib.blake2b(digest_size=8)
    for message in (*prompt, *answer):
        for part in (message.role, message.content.strip()):
            told.update(f"{len(part)}:{part}".encode())
    return int.from_bytes(told.digest())
