"""What people and the model said: messages, prompts, and answers before and after a lesson (any process)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from secondnature.records.base import Name, Record, Text

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
