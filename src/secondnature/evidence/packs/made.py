"""One probe of a pack as it is made: the question, its check, and two answers that show what it takes (data).

`right` must pass and `wrong` must not: the tests ask every check of every pack.
"""

from __future__ import annotations

from dataclasses import dataclass

from secondnature.records import Check, Message, Probe

__all__ = ["Made"]


@dataclass(frozen=True)
class Made:
    """A probe to be."""

    prompt: str
    tag: str
    """The kind of question: whether losses concentrate in one is tested."""
    check: dict[str, str]
    right: str
    wrong: str
    max_tokens: int

    def probe(self, name: str) -> Probe:
        """The probe, as one of the guard `name`."""
        return Probe(
            prompt=[Message(role="user", content=self.prompt)],
            behaviour=name,
            check=Check.model_validate(self.check),
            tags=[self.tag],
            max_tokens=self.max_tokens,
        )
