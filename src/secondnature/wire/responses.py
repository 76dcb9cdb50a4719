"""The body of `POST /v1/responses`, OpenAI's newer form of a chat: read as the chat that it means (any process).

Nothing is stored: the conversation comes whole with every request. `store`, true or false, changes no answer and is
accepted; what would need the store (`previous_response_id`, `conversation`, `background`) is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from secondnature.records import Text, Unicode, describe_errors
from secondnature.wire.completions import ChatCompletionRequest
from secondnature.wire.tools import Schema, ToolName

__all__ = ["ResponsesRequest"]

STORED = frozenset({"previous_response_id", "conversation", "background", "prompt"})
"""Fields that need answers or prompts kept by the server."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "include": ([], ["reasoning.encrypted_content"]),
    "stream_options": ({},),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
"""Values that change no answer, of fields that are not honoured; null is one of every field."""
ALWAYS_NEUTRAL = frozenset(
    {"prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store"}
)


class _Given(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ResponseTool(_Given):
    """A tool, flat: the functions of chats have these fields one level deeper."""

    type: Literal["function"]
    name: ToolName
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class NamedChoice(_Given):
    """`tool_choice` that demands one tool."""

    type: Literal["function"]
    name: ToolName


class TextFormat(_Given):
    """Text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Annotated[Unicode, Field(min_length=1, max_length=200)] | None = None
    description: Text | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(_Given):
    """What the text of the answer is to be."""

    format: TextFormat = TextFormat()
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(_Given):
    """How much the model is to think."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """Handed to the model's chat template, which may not look at it."""
    summary: None = None


class ResponsesRequest(_Given):
    """`POST /v1/responses`: text or a list of items, tools that are functions, `text.format`."""

    model: Annotated[Unicode, Field(max_length=500)] | None = None
    input: (
        Annotated[Text, Field(min_length=1)]
        | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000)]
    )
    """Text, or items of the types message, reasoning, function_call and function_call_output."""
    instructions: Text | None = None
    """Goes before the conversation, as the system's turn."""
    tools: Annotated[list[ResponseTool], Field(max_length=256)] = []
    tool_choice: Literal["none", "auto", "required"] | NamedChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    stream: bool = False
    user: Annotated[Unicode, Field(max_length=500)] | None = None
    metadata: dict[Unicode, Unicode] | None = None
    _chat: ChatCompletionRequest = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_says_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = cast("dict[str, Any]", data)
        kept = {
            k: _without_nulls(v) if k in ("reasoning", "stream_options", "text") else v
            for k, v in given.items()
            if v is not None and k not in ALWAYS_NEUTRAL
        }
        kept = {k: v for k, v in kept.items() if not any(v is x or v == x for x in NEUTRAL.get(k, ()))}
        if isinstance(kept.get("stream_options"), dict):  # it pads events against eavesdroppers; here: never
            del kept["stream_options"]
        for name in sorted(STORED & kept.keys()):
            raise ValueError(
                f"`{name}`: this server keeps no answers; send the whole conversation as `input`"
            )
        return kept

    @model_validator(mode="after")
    def _is_a_chat(self) -> Self:
        if self.__pydantic_private__:  # it was read before
            return self
        options: dict[str, Any] = {
            "model": self.model,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [
                {"type": "function", "function": t.model_dump(exclude={"type"}, exclude_none=True)}
                for t in self.tools
            ],
            "tool_choice": self.tool_choice
            if isinstance(self.tool_choice, str)
            else {"type": "function", "function": {"name": self.tool_choice.name}},
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort,
            "response_format": self._response_format(),
        }
        try:
            self._chat = ChatCompletionRequest.model_validate({"messages": self._messages(), **options})
        except ValidationError as e:
            raise ValueError(f"read as a chat: {describe_errors(e.errors())}") from None
        return self

    def chat(self) -> ChatCompletionRequest:
        """The chat that this asks for."""
        return self._chat

    def _response_format(self) -> dict[str, Any] | None:
        wanted = self.text.format
        if wanted.type != "json_schema":
            return {"type": wanted.type}
        if wanted.schema_ is None:
            raise ValueError("`text.format` of the type `json_schema` has no `schema`")
        return {
            "type": "json_schema",
            "json_schema": {"name": wanted.name or "answer", "schema": wanted.schema_},
        }

    def _messages(self) -> list[dict[str, Any]]:
        """The turns of the conversation; calls belong to the assistant's turn before them. Raises ValueError."""
        turns: list[dict[str, Any]] = []
        if self.instructions:
            turns.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*turns, {"role": "user", "content": self.input}]
        thoughts = ""
        for i, item in enumerate(self.input):
            kind = item.get("type", "message")
            if kind == "message":
                turns.append({k: v for k, v in item.items() if k not in ("type", "id", "status", "phase")})
            elif kind == "reasoning":
                thoughts += _thoughts(item)
                continue
            elif kind == "function_call":
                if not turns or turns[-1].get("role") != "assistant":
                    turns.append({"role": "assistant", "content": None})
                call = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
                called = {"id": item.get("call_id") or "", "type": "function", "function": call}
                turns[-1].setdefault("tool_calls", []).append(called)
            elif kind == "function_call_output":
                said = item.get("output")
                turns.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": said})
            else:
                raise ValueError(
                    f"item {i} of `input` is of the type {str(kind)[:40]!r}; expected message, reasoning, "
                    "function_call or function_call_output"
                )
            if thoughts and turns[-1].get("role") == "assistant":
                turns[-1]["reasoning_content"] = thoughts
            thoughts = ""
        return turns


def _thoughts(item: dict[str, Any]) -> str:
    """The text of an item of the type reasoning; of what is encrypted, nothing. Raises ValueError."""
    parts: Any = item.get("content") or []
    if not isinstance(parts, list) or not all(isinstance(p, dict) for p in cast("list[Any]", parts)):
        raise ValueError("`content` of an item of the type reasoning: expected a list of parts")
    return "".join(str(part.get("text") or "") for part in cast("list[dict[str, Any]]", parts))


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: v for k, v in cast("dict[str, Any]", value).items() if v is not None}
