"""A correction: what was asked, what the model said, what was wanted, what people thought of it (any process).

What was said is not by itself *rejected*: that follows from the rating or from the correction, here and nowhere
else. So praise is never taught away and a thumbs-down never taught as wanted, whoever wrote the record.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, Field, model_validator

from secondnature.records.base import Name, Record, Text, Unicode, digest
from secondnature.records.conversation import Conversation, Message, as_messages, is_none
from secondnature.records.migrations import newest

__all__ = ["CUT_SHORT", "Correction", "Provenance"]

CUT_SHORT = frozenset({"length", "unfinished"})
"""Reasons for which an answer ended where the model had not ended it."""
MAX_OPTIONS_CHARACTERS = 10_000
"""Of `chat_template_kwargs`, as JSON."""
_Identifier = Annotated[Unicode, Field(min_length=1, max_length=200)]


def _short(options: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError: longer than any options of a template."""
    length = len(json.dumps(options))
    if length > MAX_OPTIONS_CHARACTERS:
        raise ValueError(f"{length:,} characters; at most {MAX_OPTIONS_CHARACTERS:,} are kept")
    return options


class Provenance(Record):
    """Where a correction comes from. A string stands for the kind alone."""

    kind: Literal["observed", "written", "dreamed"]
    """`observed`: a person, in use. `written`: a person, in a file. `dreamed`: generated."""
    source: Annotated[Unicode, Field(min_length=1, max_length=1000)] | None = None
    """The file or the application."""
    line: Annotated[int, Field(ge=1)] | None = None
    """Of the file, from 1 on."""
    foreign_id: Annotated[Unicode, Field(min_length=1, max_length=1000)] | None = None
    """Its id there."""
    by_key: Literal["correct"] | None = None
    """Set by the server: `correct`, it came with the key that may only correct, which may take it back."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return {"kind": data} if isinstance(data, str) else data


class Correction(Record):
    """A moment when the model said one thing and the user wanted another, or was pleased.

    Accepted shapes (the data-set formats that TRL users know): `{prompt, chosen, rejected?}`,
    `{prompt, completion}` or `{messages}` whose last turn is the assistant's, each with `rating` or `label`; a
    string stands for one message. A completion, or a last turn, that is rated below 0, or has `feedback` and no
    answer beside it, is what the model said, not what was wanted.
    """

    prompt: Conversation
    said: list[Message] | None = None
    """What the model said: one assistant message. None: not known."""
    finish_reason: Name | None = None
    """Why `said` ended: `stop`, `length` (cut by `max_tokens`), `unfinished` (the user did not wait)."""
    chosen: list[Message] | None = None
    """The wanted answer: one assistant message. None when only `feedback` or `rating` says what was wrong."""
    rejected: list[Message] | None = None
    """A worse answer: one assistant message. Not given, it is `said` where that was rated below 0, or where another
    answer was wanted. Never what was praised."""
    behaviour: Name | None = None
    feedback: Text | None = None
    """What the user said about the answer."""
    rating: Annotated[int, Field(ge=-1, le=1)] | None = None
    """Of `said`; above 0: praise, which is never taught away. `label: false` is -1, `true` is 1."""
    tools: Annotated[list[dict[Unicode, Any]], Field(min_length=1, max_length=256)] | None = Field(
        default=None, exclude_if=is_none
    )
    """That the model was shown, as OpenAI's clients send them."""
    chat_template_kwargs: Annotated[dict[Unicode, Any], AfterValidator(_short)] | None = None
    """What the chat template was told when `said` was asked for, such as `enable_thinking`: it is taught so too."""
    state: Literal["candidate"] | None = None
    """`candidate`: found by a program, confirmed by nobody; it lies in the ledger and is not taught."""
    provenance: Provenance | None = None
    id: _Identifier | None = None
    """In the ledger; one that is there already is replaced."""
    completion_id: _Identifier | None = None
    """Of `said`; one that was corrected before is corrected anew."""
    conversation_id: _Identifier | None = None
    """What the client calls the conversation."""
    weights_version: str | None = None
    """That gave `said`."""
    created_at: datetime | None = None
    amended_at: datetime | None = None
    """When it became what it is, where that was later."""

    @model_validator(mode="before")
    @classmethod
    def _from_dataset_formats(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = dict(cast("dict[str, Any]", data))
        form = given.get("schema_version")  # a line of a ledger, read as a file
        if isinstance(form, int) and 1 <= form <= newest("correction"):
            del given["schema_version"]
        _take_label(given)
        answer = _take_answer(given)
        if "prompt" in given:
            given["prompt"] = as_messages(given["prompt"], "user")
        for key in ("said", "chosen", "rejected"):
            given[key] = as_messages(given.get(key), "assistant")
        if answer is not None:
            alone = all(given[key] is None for key in ("said", "rejected"))
            commented = given.get("feedback") is not None and given.get("rating") is None
            was_said = _sign(given.get("rating")) < 0 or (commented and alone)
            if was_said and not alone:
                raise ValueError("found a rating below 0 and two answers; say which was wanted: `chosen`")
            given["said" if was_said else "chosen"] = as_messages(answer, "assistant")
        return given

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        for key in ("said", "chosen", "rejected"):
            answer: list[Message] | None = getattr(self, key)
            if answer is not None and (len(answer) != 1 or answer[0].role != "assistant"):
                raise ValueError(f"`{key}` must be exactly one assistant message")
            if answer is not None and not answer[0].content and not answer[0].tool_calls:
                raise ValueError(f"`{key}` is empty; expected the text of the answer")
        if self.prompt[-1].role == "assistant":
            raise ValueError("`prompt` ends with the assistant; expected the user's turn last")
        if self.chosen is None and self.feedback is None and self.rating is None:
            raise ValueError("nothing to learn: expected `chosen` (or `completion`), `feedback` or `rating`")
        self._judge()
        return self

    def _judge(self) -> None:
        """What was said is rejected where it was rated down or corrected, and never where it was praised."""
        said, rejected, rating = self.said, self.rejected, self.rating or 0
        if rating > 0 and rejected is not None and said in (None, rejected):
            said, rejected = rejected, None
        elif said is not None and rejected is None and rating <= 0:
            corrected = self.chosen is not None and self.chosen != said
            called = any(m.tool_calls for m in said)  # a call is recorded, and not taught away as text
            rejected = said if (rating < 0 or corrected) and not called else None
        # the record is frozen for everybody else
        object.__setattr__(self, "said", said)
        object.__setattr__(self, "rejected", rejected)

    @property
    def is_praise(self) -> bool:
        """Whether the user was pleased with what was said."""
        return (self.rating or 0) > 0

    @property
    def answered(self) -> list[Message] | None:
        """What the user had before them, as far as it is known: what was said, else the worse answer of a pair."""
        return self.said or self.rejected

    @property
    def is_cut(self) -> bool:
        """Whether `rejected` is an answer that the model had not ended."""
        return self.rejected is not None and self.rejected == self.said and self.finish_reason in CUT_SHORT

    def digest(self) -> str:
        """Content hash of what is taught (16 hex digits): the same correction twice has the same digest."""
        return digest(
            {
                "prompt": _plain(self.prompt),
                "chosen": _plain(self.chosen),
                "rejected": _plain(self.rejected or self.said),
                "feedback": self.feedback,
                **({"tools": self.tools} if self.tools else {}),
                **({"options": self.chat_template_kwargs} if self.chat_template_kwargs else {}),
            }
        )

    def identity(self) -> str:
        """Content hash of all that it says, but not of where it comes from: the same record twice has the same."""
        said = [_plain(self.said), self.rating, self.behaviour, self.completion_id]
        said += [self.tools] if self.tools else []
        said += [self.chat_template_kwargs] if self.chat_template_kwargs else []
        return digest([_plain(self.prompt), _plain(self.chosen), _plain(self.rejected), self.feedback, *said])


def _plain(messages: list[Message] | None) -> Any:
    return None if messages is None else [m.model_dump(mode="json", exclude_none=True) for m in messages]


def _sign(rating: Any) -> int:
    """Of a rating that has not been checked yet."""
    try:
        number = float(rating)
    except (TypeError, ValueError, OverflowError):
        return 0
    return (number > 0) - (number < 0)


def _take_label(given: dict[str, Any]) -> None:
    """`label` of unpaired preferences becomes the rating. Raises ValueError."""
    label = given.pop("label", None)
    if label is None:
        return
    if not isinstance(label, bool):
        raise ValueError("`label` must be true or false")
    rating = 1 if label else -1
    if given.get("rating") is not None and _sign(given["rating"]) != rating:
        raise ValueError("`label` and `rating` say different things; expected one of them")
    given["rating"] = rating


def _take_answer(given: dict[str, Any]) -> Any:
    """The answer of `messages` or `completion`, of which nobody has said yet who wanted it. Raises ValueError."""
    messages, completion = given.pop("messages", None), given.pop("completion", None)
    if messages is not None:
        if "prompt" in given:
            raise ValueError("found both `messages` and `prompt`; expected one of them")
        turns = cast("list[Any]", messages) if isinstance(messages, list) else []
        if len(turns) < 2:
            raise ValueError("`messages` needs at least a user turn and the assistant's answer")
        if completion is not None:
            raise ValueError("found both `messages` and `completion`; expected one of them")
        given["prompt"], completion = turns[:-1], turns[-1:]
        if given.get("chosen") is not None:
            raise ValueError("found both `messages` and `chosen`; expected one of them")
    elif completion is not None and given.get("chosen") is not None:
        raise ValueError("found both `completion` and `chosen`; expected one of them")
    return completion
