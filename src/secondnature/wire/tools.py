"""Tools and answers of a given shape, as OpenAI's clients send them (any process).

A tool is what the client will run, never the server: its name, what it is for and the JSON schema of its arguments
are shown to the model, and what the model calls comes back. What is not a function is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from secondnature.records import Text, Unicode

ToolName = Annotated[Unicode, Field(min_length=1, max_length=200, pattern=r"^[\w.:/-]+$")]
Schema = dict[Unicode, Any]


class _Given(BaseModel):
    """What clients add is refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Function(_Given):
    """What a tool is called, what it does, and the JSON schema of its arguments."""

    name: ToolName
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None
    """Calls that `tool_choice` demands always fit the schema; others are what the model writes."""


class FunctionTool(_Given):
    """One tool."""

    type: Literal["function"] = "function"
    function: Function

    def shown(self) -> dict[str, Any]:
        """As chat templates expect it."""
        parameters = self.function.parameters or {"type": "object", "properties": {}}
        given = {"name": self.function.name, "description": self.function.description or ""}
        return {"type": "function", "function": {**given, "parameters": parameters}}


class NamedFunction(_Given):
    """The name of a tool."""

    name: ToolName


class NamedTool(_Given):
    """`tool_choice` that demands one tool."""

    type: Literal["function"] = "function"
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool
Tools = Annotated[list[FunctionTool], Field(max_length=256)]


class JsonSchema(_Given):
    """A schema with its name."""

    name: Annotated[Unicode, Field(min_length=1, max_length=200)] = "answer"
    description: Text | None = None
    schema_: Annotated[Schema, Field(alias="schema")] = {}
    strict: bool | None = None
    """Without meaning here: the answer always fits."""


class ResponseFormat(_Given):
    """`response_format`: text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("`json_schema` goes with the type `json_schema`, and only with it")
        return self

    def wanted(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must fit; None: any text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


def call_shape(tools: list[FunctionTool], choice: ToolChoice) -> dict[str, Any]:
    """The schema of the one call that `tool_choice` demands: `{"name": ..., "arguments": {...}}`.

    Raises:
        ValueError: the tool that is demanded is not among the tools.
    """
    if isinstance(choice, NamedTool):
        wanted = choice.function.name
        tools = [tool for tool in tools if tool.function.name == wanted]
        if not tools:
            raise ValueError(f"`tool_choice` names {wanted!r}, which is not among `tools`")
    return any_of([_call(tool.function) for tool in tools])


def _call(function: Function) -> dict[str, Any]:
    """The schema of a call."""
    arguments = function.parameters or {"type": "object", "properties": {}}
    return {
        "type": "object",
        "properties": {
            "name": {"const": function.name},
            "arguments": _moved(arguments, "#/properties/arguments"),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    """The schema of what fits one of several, each with its own definitions."""
    if len(schemas) == 1:
        return schemas[0]
    parts = {f"part{i}": _moved(schema, f"#/$defs/part{i}") for i, schema in enumerate(schemas)}
    return {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in parts], "$defs": parts}


def _moved(schema: Any, to: str) -> Any:
    """A schema that stands at `to` in a larger one: its references to itself lead there."""
    if isinstance(schema, list):
        return [_moved(part, to) for part in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    return {
        k: to + v[1:] if k == "$ref" and isinstance(v, str) and v.startswith("#") else _moved(v, to)
        for k, v in cast("dict[str, Any]", schema).items()
    }
