"""What people and the model said: messages, prompts, and answers before and after a lesson (any process)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from secondnature.records.base import Name, Record, Text, Unicode

Role = Literal["system", "user", "assistant", "tool"]
"""`tool`: what a call of a tool came to."""


def is_none(value: object) -> bool:
    """Whether a field was not given; a new one is left out of dumps, so that digests stay what they were."""
    return value is None


class CalledFunction(Record):
    """What was called, with arguments that are JSON in a text."""

    name: Annotated[Unicode, Field(min_length=1, max_length=200, pattern=r"^[\w.:/-]+$")]
    arguments: Text = "{}"


class ToolCall(Record):
    """A call of a tool, as OpenAI's clients know it."""

    id: Annotated[Unicode, Field(max_length=200)] = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Record):
    """One turn of a conversation."""

    role: Role
    content: Text
    tool_calls: list[ToolCall] | None = Field(default=None, exclude_if=is_none)
    """What the assistant called; then there may be nothing that it said."""
    tool_call_id: Annotated[Unicode, Field(max_length=200)] | None = Field(default=None, exclude_if=is_none)
    """Of a tool's turn: which call it answers."""
    name: Annotated[Unicode, Field(max_length=200)] | None = Field(default=None, exclude_if=is_none)
    """Of a tool's turn: the tool."""

    @model_validator(mode="before")
    @classmethod
    def _may_only_call(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("tool_calls") and data.get("content") is None:  # pyright: ignore[reportUnknownMemberType]
            return {**data, "content": ""}  # pyright: ignore[reportUnknownVariableType]
        return data  # pyright: ignore[reportUnknownVariableType]

    @model_validator(mode="after")
    def _has_what_its_role_has(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(
                f"`tool_calls` in a turn of the role {self.role!r}; only the assistant calls tools"
            )
        if self.role != "tool" and (self.tool_call_id is not None or self.name is not None):
            raise ValueError(f"`tool_call_id` or `name` in a turn of the role {self.role!r}; expected `tool`")
        return self

    @property
    def has_calls(self) -> bool:
        """Whether a tool is called here, or answers."""
        return self.role == "tool" or bool(self.tool_calls)


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
