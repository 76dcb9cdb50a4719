"""What a reader of shapes is given, and what it gives: rows, drafts of corrections, reasons (client).

A draft is what a row says, before it is a `Correction`: who said what, what was wanted, what was said about it.
A row that says nothing that can be taught, or that would have to be guessed, is a `Refused` with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Context", "Draft", "Options", "Place", "Refused", "Row", "Turn", "Vote"]

Turn = dict[str, str]
"""`{"role": ..., "content": ...}`."""


class Refused(ValueError):
    """A row that is not taken; the message says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row lies."""

    source: str
    number: int
    unit: Literal["line", "row"] = "line"

    def __str__(self) -> str:
        return f"{self.source}, {self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class Row:
    """One value of a file; `problem`: it could not be read."""

    place: Place
    value: Any = None
    problem: str = ""


@dataclass(slots=True)
class Draft:
    """What a row says."""

    prompt: list[Turn]
    said: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    feedback: str | None = None
    rating: int | None = None
    foreign_id: str | None = None
    candidate: bool = False
    """A program found it: a person has to look at it."""
    place: Place | None = None
    """Where that is not the row's."""
    options: dict[str, Any] | None = None
    """`chat_template_kwargs` of the row."""
    whole: dict[str, Any] | None = None
    """A correction in this project's own form, taken as it is."""


@dataclass(frozen=True)
class Options:
    """What the caller chose."""

    turns: Literal["last", "all"] = "all"
    columns: dict[str, str] = field(default_factory=dict[str, str])
    """Column -> field, of --map."""


@dataclass(frozen=True)
class Vote:
    """A thumb of a file of its own (ChatGPT's message_feedback.json)."""

    rating: int
    comment: str | None


@dataclass
class Context:
    """What the files of one import know together, and what was seen on the way."""

    options: Options = field(default_factory=Options)
    votes: dict[str, Vote] = field(default_factory=dict[str, Vote])
    """By the id of the message."""
    num_votes_used: int = 0
    judgements: dict[str, list[dict[str, Any]]] = field(default_factory=dict[str, "list[dict[str, Any]]"])
    """Of a file of their own, by the id of the trace (Langfuse's scores, LangSmith's feedback)."""
    num_judged: int = 0
    unused: dict[str, int] = field(default_factory=dict[str, int])
    """Columns that no shape reads -> rows that have them."""
    passed_over: dict[str, int] = field(default_factory=dict[str, int])
    """What is no correction and no mistake (praise without an answer, failed tool turns) -> how many."""

    def judgements_of(self, trace: Any) -> list[dict[str, Any]]:
        """Those of one trace that lay in another file."""
        found = self.judgements.get(str(trace), [])
        self.num_judged += len(found)
        return found

    def pass_over(self, what: str, number: int = 1) -> None:
        """Count what is left out on purpose."""
        if number:
            self.passed_over[what] = self.passed_over.get(what, 0) + number
