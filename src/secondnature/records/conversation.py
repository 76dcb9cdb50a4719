"""What people and the model said: messages, prompts, corrections, and answers before and after (any process)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from secondnature.records.base import Name, Record, Text, digest

Role = Literal["system", "user", "assistant"]


class Message(Record):
    """One turn of a conversation."""

    role: Role
    content: Text


Conversation = Annotated[list[Message], Field(min_length=1, max_length=200)]


def as_messages(value: Any, role: Role) -> Any:
    """Plain text where the data-set formats allow it: a string is one message of that role."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def with_messages(data: Any) -> Any:
    """A record whose `prompt` may be given as text."""
    if isinstance(data, dict) and isinstance(data.get("prompt"), str):  # pyright: ignore[reportUnknownMemberType]
        return {**data, "prompt": as_messages(data["prompt"], "user")}  # pyright: ignore[reportUnknownVariableType]
    return data  # pyright: ignore[reportUnknownVariableType]


class Prompt(Record):
    """Something to ask: the user's turn last. A string stands for one message of the user."""

    prompt: Conversation

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"prompt": data}
        return with_messages(data)

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if self.prompt[-1].role == "assistant":
            raise ValueError("`prompt` ends with the assistant; expected the user's turn last")
        return self


class Correction(Record):
    """A moment when the model said one thing and the user wanted another.

    Accepted shapes (the data-set formats that TRL users know): `{prompt, chosen, rejected?}`,
    `{prompt, completion}` or `{messages}` whose last turn is the assistant's; a string stands for one message.
    """

    prompt: Conversation
    chosen: list[Message] | None = None
    """The wanted answer: one assistant message. None when only `feedback` says what was wrong."""
    rejected: list[Message] | None = None
    """What the model said: one assistant message."""
    behaviour: Name | None = None
    feedback: Text | None = None
    """What the user said about the answer."""
    rating: Annotated[int, Field(ge=-1, le=1)] | None = None
    id: str | None = None
    completion_id: str | None = None
    weights_version: str | None = None
    created_at: datetime | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_dataset_formats(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        messages = data.pop("messages", None)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        if messages is not None:
            if "prompt" in data:
                raise ValueError("found both `messages` and `prompt`; expected one of them")
            if not isinstance(messages, list) or len(messages) < 2:  # pyright: ignore[reportUnknownArgumentType]
                raise ValueError("`messages` needs at least a user turn and the assistant's answer")
            data["prompt"], data["chosen"] = messages[:-1], messages[-1:]
        completion = data.pop("completion", None)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        if completion is not None:
            if data.get("chosen") is not None:  # pyright: ignore[reportUnknownMemberType]
                raise ValueError("found both `completion` and `chosen`; expected one of them")
            data["chosen"] = completion
        data["prompt"] = as_messages(data.get("prompt"), "user")  # pyright: ignore[reportUnknownMemberType]
        for key in ("chosen", "rejected"):
            data[key] = as_messages(data.get(key), "assistant")  # pyright: ignore[reportUnknownMemberType]
        return data  # pyright: ignore[reportUnknownVariableType]

    @model_validator(mode="after")
    def _is_teachable(self) -> Self:
        for key in ("chosen", "rejected"):
            answer: list[Message] | None = getattr(self, key)
            if answer is not None and (len(answer) != 1 or answer[0].role != "assistant"):
                raise ValueError(f"`{key}` must be exactly one assistant message")
            if answer is not None and not answer[0].content:
                raise ValueError(f"`{key}` is empty; expected the text of the answer")
        if self.prompt[-1].role == "assistant":
            raise ValueError("`prompt` ends with the assistant; expected the user's turn last")
        if self.chosen is None and self.feedback is None and self.rating is None:
            raise ValueError("nothing to learn: expected `chosen` (or `completion`), `feedback` or `rating`")
        return self

    def digest(self) -> str:
        """Content hash of what is taught (16 hex digits): the same correction twice has the same digest."""
        return digest(self.model_dump(mode="json", include={"prompt", "chosen", "rejected", "feedback"}))


class SampleAnswer(Record):
    """A line of answers.jsonl: the same prompt answered before and after the lesson (greedy)."""

    prompt: Conversation
    before: Text
    after: Text
    wanted: Text | None = None
    """The answer that the user wanted, where this prompt was corrected."""
    behaviour: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return with_messages(data)
