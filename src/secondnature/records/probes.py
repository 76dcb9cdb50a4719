"""Held-out scenarios, how an answer to one is checked, and what came of it (any process)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from secondnature.records.base import Name, Record, Text, Unicode, digest
from secondnature.records.conversation import Conversation, with_messages

Side = Literal["right", "other"]
GuardPack = Literal["facts", "arithmetic", "instructions", "code", "refusal"]
"""The packs of guards that are shipped (`pack:facts`)."""


def guard_name(pack: GuardPack) -> str:
    """What the guard of a pack is called in a certificate."""
    return f"pack-{pack}"


class Check(Record):
    """How an answer is judged: exactly one of the fields."""

    matches: Unicode | None = None
    """A regular expression that the answer must contain (`re.search`)."""
    not_matches: Unicode | None = None
    """A regular expression that the answer must not contain."""
    prefers: tuple[Text, Text] | None = None
    """(A, B): the model must give A the higher log-probability."""
    python: Text | None = None
    """Assertions that must hold after the answer was run as Python, in a subprocess with limits."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [k for k in ("matches", "not_matches", "prefers", "python") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"found {given or 'no check'}; expected one of matches, not_matches, prefers, python"
            )
        for key in ("matches", "not_matches"):
            pattern: str | None = getattr(self, key)
            if pattern is not None:
                if len(pattern) > 2000:
                    raise ValueError(f"`{key}` has {len(pattern)} characters; expected at most 2000")
                try:
                    re.compile(pattern)
                except (re.error, OverflowError, RecursionError) as e:
                    raise ValueError(f"`{key}` is not a regular expression: {e}") from None
        return self


class Probe(Record):
    """A held-out scenario with a check.

    The behaviour that a lesson teaches is measured on the probes of that name; `side: other` marks the scenarios
    where it must *not* show; probes of every other name are guards.
    """

    prompt: Conversation
    behaviour: Name
    check: Check
    seed: Annotated[Unicode, Field(max_length=200)] | None = None
    """The scenario this probe is a variation of: the unit of the cluster test. None: a scenario of its own."""
    side: Side = "right"
    margin: tuple[Text, Text] | None = None
    """(wanted, unwanted) answers whose log-probability margin is the smooth curve beside the yes/no."""
    pin: bool = False
    """It must not break: passed before a lesson and failed after it, it alone undoes the lesson, however few are
    asked. A guard all of whose probes are pinned needs no minimum number and no margin."""
    max_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """So long may its answer be; never longer than 160."""
    tags: Annotated[list[Name], Field(max_length=16)] = []
    """What it belongs to (`refund`, `geography`): whether losses concentrate in a tag is tested."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return with_messages(data)

    def digest(self) -> str:
        """Content hash of the probe (16 hex digits); what was added later counts only where it is given."""
        raw = self.model_dump(mode="json")
        return digest({k: v for k, v in raw.items() if v or k not in ("pin", "tags", "max_tokens")})

    @property
    def cluster(self) -> str:
        """The scenario id, or the hash of the prompt where none was given."""
        return self.seed if self.seed is not None else digest([m.model_dump() for m in self.prompt])


class Outcome(Record):
    """One probe asked once."""

    probe: str
    """`Probe.digest`."""
    passed: bool
    answer: str = ""
    """As far as it was generated."""
    whole: bool = True
    """False: it was generated no further than to where its check was decided."""
    margin: float | None = None
    """log p(wanted) - log p(unwanted), nats over the whole answers; None where the probe names no pair."""
