"""What a lesson would teach, in words: the decoded examples of a dry run, and what one might not expect (server).

Decoded from the token ids that would get a gradient, not from what was sent: so a person sees an answer that was
taken otherwise than it was meant before it is taught.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from secondnature import wire
from secondnature.model.chat import Taught, control_tokens_in
from secondnature.records import Contradictions, Correction
from secondnature.records import doubts as doubts_of

__all__ = ["Shown", "counted", "doubts", "shown"]

MAX_SHOWN = 20
"""Examples of which the texts are sent."""
CONTEXT_CHARACTERS = 200
"""Of the end of a context."""
TEXT_CHARACTERS = 2000
"""Of an answer; what is left out is said."""
_MARKS = re.compile(
    r"\n\n(?:Human|Assistant):|\[/?INST\]|<\|(?:im_start|im_end|user|assistant|system|eot_id|start_header_id)\|>"
    r"|<(?:start|end)_of_turn>|^### (?:Instruction|Response):",
    re.MULTILINE,
)
"""What the turns of rendered conversations begin and end with, whatever the model."""

Shown = dict[str, Any]


def doubts(tokenizer: Any, corrections: Sequence[Correction]) -> list[list[str]]:
    """What about each correction may be meant otherwise than it is taken."""
    contradictions = Contradictions()
    found: list[list[str]] = []
    for number, correction in enumerate(corrections):
        other = contradictions.take(correction, number)
        against = [f"{Contradictions.KIND}: correction {other} wants what this one rejects, or the reverse"]
        found.append(_doubts(tokenizer, correction) + (against if other is not None else []))
    return found


def _doubts(tokenizer: Any, correction: Correction) -> list[str]:
    found = doubts_of(correction)
    said = [m for m in correction.prompt if m.role == "assistant"]
    if said:
        found.append(
            f"turns not taught: {len(said)} earlier answer{'s'[: len(said) != 1]}, which are read only"
        )
    for message in correction.prompt:
        text = message.content if isinstance(message.content, str) else ""
        marks = sorted({*(m.strip() for m in _MARKS.findall(text)), *control_tokens_in(tokenizer, text)})
        if marks:
            found.append(
                f"perhaps rendered already: a message of the {message.role} holds {', '.join(marks)}: it is "
                "taken as its text; if these are turns, send them as messages"
            )
            break
    return found


def _cut(text: str, most: int, *, end: bool = False) -> str:
    if len(text) <= most:
        return text
    left_out = f"[{len(text) - most:,} characters]"
    return f"{left_out} {text[-most:]}" if end else f"{text[:most]} {left_out}"


def shown(
    tokenizer: Any,
    example: wire.TokenExample,
    notes: Sequence[str] = (),
) -> Shown:
    """One example as text: the end of what is read, what is taught, what is rejected."""

    def decoded(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    rejected = None if example.rejected is None else _cut(decoded(example.rejected), TEXT_CHARACTERS)
    return {
        "example": example.label,
        "end_of_context": _cut(decoded(example.context), CONTEXT_CHARACTERS, end=True),
        "taught": _cut(decoded(example.continuation), TEXT_CHARACTERS),
        "rejected": rejected,
        "num_taught_tokens": len(example.continuation),
        "notes": list(notes),
    }


def counted(doubted: Sequence[Sequence[str]], taught: Sequence[Taught]) -> dict[str, int]:
    """How often each thing is to be said, over all corrections."""
    notes = Counter(note.split(": ")[0] for found in doubted for note in found)
    notes.update(note.split(": ")[0] for t in taught for note in t.notes)
    return dict(notes)
