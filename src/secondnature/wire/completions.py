"""The bodies of completions, as OpenAI's clients send them (any process; the OpenAPI document is made from them).

Clients send much that says nothing: nulls, empty lists, defaults written out, what an answer carried when it came.
All of that is accepted. What would change an answer and cannot be honoured stays in the body as an unknown field,
so one validation names every field that is wrong.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from secondnature.records import Message, Role, Text, ToolCall, Unicode
from secondnature.wire.tools import ResponseFormat, ToolChoice, Tools

__all__ = [
    "ALWAYS_NEUTRAL",
    "NEUTRAL",
    "ChatCompletionRequest",
    "ChatMessage",
    "CompletionRequest",
    "StreamOptions",
    "plain_message",
    "with_plain_messages",
]

MAX_CHOICES = 1024
"""Prompts of one request times `n`."""
MAX_PROMPT_CHARACTERS = 2_000_000
"""Of one prompt given as text."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "continue_final_message": (False,),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "modalities": ([], ["text"]),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "structured_outputs": ({},),
    "suffix": ("",),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
"""Fields of OpenAI's and vLLM's that are not honoured here, each with the values that change no answer; null is
one of every field."""
ALWAYS_NEUTRAL = frozenset(
    {
        *("include_reasoning", "prediction", "priority", "prompt_cache_key"),
        *("prompt_cache_retention", "request_id", "safety_identifier", "service_tier", "store"),
        "spaces_between_special_tokens",
    }
)
"""Fields that change no answer, whatever they say: they are about bookkeeping or speed."""
OF_CLIENTS = frozenset({"id", "parsed"})
"""What a client adds to a turn: the turn says it already."""
SAYS_NOTHING: tuple[Any, ...] = (None, "", [], {})
NOT_OF_THE_TEMPLATE = frozenset(
    {
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents"),
        *("max_length", "messages", "padding", "processor_kwargs", "return_assistant_tokens_mask"),
        *("return_dict", "return_tensors", "tokenize", "tokenizer_kwargs", "tools", "truncation"),
    }
)
"""Names that would change how a template is rendered, not what it writes."""
TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
IGNORED_IN_PARTS = frozenset({"annotations", "cache_control", "logprobs", "type"})


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


# ------------------------------------------------------------------------------------------------ messages


def plain_message(given: dict[str, Any]) -> dict[str, Any]:
    """A turn without what says nothing: empty fields, `id`; `developer` is `system`, parts are joined.

    Raises:
        ValueError: a part of the content is no text.
    """
    kept = {
        k: v for k, v in given.items() if k == "content" or (k not in OF_CLIENTS and v not in SAYS_NOTHING)
    }
    if "reasoning" in kept:  # what newer servers call it
        kept.setdefault("reasoning_content", kept.pop("reasoning"))
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_call(call) for call in kept["tool_calls"]]
    if kept.get("role") == "developer":
        kept["role"] = "system"
    content: Any = kept.get("content")
    if isinstance(content, list):
        kept["content"] = _joined(cast("list[Any]", content))
    return kept


def _joined(parts: list[Any]) -> str:
    """The text of content parts. Raises ValueError."""
    texts: list[str] = []
    for i, part in enumerate(parts):
        found = cast("dict[str, Any]", part) if isinstance(part, dict) else {"type": "text", "text": part}
        text, kind = found.get("text"), str(found.get("type"))[:40]
        if kind not in TEXT_PARTS:
            raise ValueError(
                f"part {i} of `content` is of the type `{kind}`; this model reads text only: send parts of the "
                "type `text`"
            )
        more = sorted(k for k, v in found.items() if k not in IGNORED_IN_PARTS | {"text"} and v is not None)
        if not isinstance(text, str) or more:
            what = f"the unknown field `{more[0][:40]}`" if more else "no text"
            raise ValueError(f"part {i} of `content` has {what}; expected `type` and `text`")
        texts.append(text)
    return "".join(texts)


def with_plain_messages(correction: Any) -> Any:
    """A correction whose turns may be given as clients send them: see `plain_message`. Raises ValueError."""
    if not isinstance(correction, dict):
        return correction
    found = cast("dict[str, Any]", correction)
    return {
        key: _plain_turns(cast("list[Any]", value)) if isinstance(value, list) else value
        for key, value in found.items()
    }


def _plain_turns(turns: list[Any]) -> list[Any]:
    return [
        _kept(plain_message(cast("dict[str, Any]", turn)))
        if isinstance(turn, dict) and "role" in turn and turn.keys() & {"content", "tool_calls"}
        else turn
        for turn in turns
    ]


def _kept(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn without what a record does not hold: who spoke, and what an answer thought."""
    named = _without(turn, "reasoning_content")
    return named if turn.get("role") == "tool" else _without(named, "name")


def _call(given: Any) -> Any:
    """A call without what clients that put one together add to it."""
    if not isinstance(given, dict):
        return given
    call = cast("dict[str, Any]", _without(given, "index"))
    return {k: _without(v, "parsed_arguments") if k == "function" else v for k, v in call.items()}


def _without(given: Any, key: str) -> Any:
    if not isinstance(given, dict):
        return given
    return {k: v for k, v in cast("dict[str, Any]", given).items() if k != key}


class ChatMessage(BaseModel):
    """A turn as OpenAI's clients send it: what an answer carries beside its text may come back, as long as it says
    nothing (`refusal: null`, `tool_calls: []` and the like). Anything that would change the answer is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Role
    """`developer` is taken as `system`; `tool` is what a call came to."""
    content: Text | None = None
    """Text, or a list of parts of the type `text`, which are joined. Null only beside `tool_calls`."""
    name: Annotated[Unicode, Field(max_length=64)] | None = None
    """Accepted and not shown to the model, unless it is a tool's."""
    tool_calls: list[ToolCall] | None = None
    """What the model called."""
    tool_call_id: Annotated[Unicode, Field(max_length=200)] | None = None
    reasoning_content: Text | None = None
    """What the assistant thought; its template may show it. Not kept in corrections."""

    @model_validator(mode="before")
    @classmethod
    def _as_clients_send_it(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = plain_message(cast("dict[str, Any]", data))
        if given.get("content", "") is None and not given.get("tool_calls"):
            raise ValueError("`content` is null; expected text (an empty one is text)")
        return given

    @model_validator(mode="after")
    def _is_a_turn(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("a turn without `content`; expected text (an empty one is text)")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(
                f"`tool_calls` in a turn of the role {self.role!r}; only the assistant calls tools"
            )
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError(f"`tool_call_id` in a turn of the role {self.role!r}; it belongs to `tool`")
        if self.reasoning_content is not None and self.role != "assistant":
            raise ValueError(f"`reasoning_content` in a turn of the role {self.role!r}")
        return self

    def plain(self) -> Message:
        """The turn as it is kept."""
        name = self.name if self.role == "tool" else None
        calls = {"tool_calls": self.tool_calls, "tool_call_id": self.tool_call_id, "name": name}
        return Message(role=self.role, content=self.content or "", **calls)  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------ completions


def _without_what_says_nothing(data: Any) -> Any:
    """A body without its fields that change no answer: null, neutral, or about bookkeeping."""
    if not isinstance(data, dict):
        return data
    return {
        k: v
        for k, v in cast("dict[str, Any]", data).items()
        if v is not None and k not in ALWAYS_NEUTRAL and not _is_neutral(k, v)
    }


def _is_neutral(name: str, value: Any) -> bool:
    # 1 == True in Python; in JSON they are two things
    return any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in NEUTRAL.get(name, ()))


def _as_list(value: Any) -> Any:
    """One stop string as a list; empty ones stop nothing."""
    given = cast("list[Any]", value) if isinstance(value, list) else [value]
    return [s for s in given if s != ""] if value is not None else []


Stops = Annotated[
    list[Annotated[Unicode, Field(min_length=1, max_length=200)]],
    Field(max_length=16),
    BeforeValidator(_as_list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Sampling(BaseModel):
    """Fields that both kinds of completion share; null is a field that was not sent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[Unicode, Field(max_length=500)] | None = None
    """A name that this server goes by; another one is answered 404."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    """Answers to each prompt. With a seed, the i-th has the seed + i."""
    temperature: Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)] | None = None
    """0: greedy. Default: the model's own (`generation_config.json`), else 1."""
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """Default: the model's own, else 1."""
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """0 and -1: all tokens. Default: the model's own, else all."""
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """Least probability of a token, as a share of the best one's. Default: the model's own, else 0."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    """Counts the prompt's tokens, too. Default: the model's own, else 1."""
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] = {}
    """By token id."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops = []
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] = []
    ignore_eos: bool = False
    """Go on after the model's end token; `stop` and `stop_token_ids` still end the answer."""
    response_format: ResponseFormat = ResponseFormat()
    """What the answer has to be; vLLM's `guided_json` and `structured_outputs.json` are read as this."""
    user: Annotated[Unicode, Field(max_length=500)] | None = None
    metadata: dict[Unicode, Unicode] | None = None
    cache_salt: Annotated[Unicode, Field(max_length=500)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_says_nothing(cls, data: Any) -> Any:
        return _with_format(_without_what_says_nothing(data))


def _with_format(data: Any) -> Any:
    """A body that says what the answer has to be in OpenAI's way. Raises ValueError."""
    if not isinstance(data, dict):
        return data
    given = dict(cast("dict[str, Any]", data))
    outputs = given.get("structured_outputs")
    wanted = cast("dict[str, Any]", outputs) if isinstance(outputs, dict) else {}
    said = {k: v for k, v in wanted.items() if v is not None}
    if said.keys() == {"json"}:
        del given["structured_outputs"]
        given.setdefault("guided_json", said["json"])
    schema = given.pop("guided_json", None)
    if schema is None:
        return given
    if "response_format" in given:
        raise ValueError("found both `response_format` and `guided_json`; expected one of them")
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise ValueError("`guided_json` is a text that is no JSON; expected a JSON schema") from None
    return {**given, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


def _of_the_template(options: dict[str, Any]) -> dict[str, Any]:
    """Options that the template reads, and none that says how it is rendered. Raises ValueError."""
    wrong = sorted(options.keys() & NOT_OF_THE_TEMPLATE)
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: not the template's own; expected options that it reads")
    return options


class ChatCompletionRequest(_Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: Annotated[dict[Unicode, Any], AfterValidator(_of_the_template)] = {}
    """Handed to the model's chat template, such as `enable_thinking`."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """Handed to the model's chat template, which may not look at it."""
    add_special_tokens: Literal[False] = False
    """The template writes them."""
    tools: Tools = []
    """Shown to the model by its chat template; for one that shows none, see `ignore_tools` in the settings."""
    tool_choice: ToolChoice = "auto"
    """`none`: tools are not shown. `required`, or a name: the answer is one call whose arguments fit."""
    parallel_tool_calls: bool = True
    """False: of several calls the first one is given."""

    def plain(self) -> list[Message]:
        """The conversation as it is kept."""
        return [m.plain() for m in self.messages]

    def num_characters(self) -> int:
        """Of what is rendered, tools left out."""
        return sum(len(m.content or "") for m in self.messages)

    def template_options(self) -> dict[str, Any]:
        """What the chat template gets besides the conversation."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **self.chat_template_kwargs}


def _prompts(value: Any) -> list[str | list[int]]:
    """The prompts of a completion: a text, token ids, or a list of either. Raises ValueError."""
    given = cast("list[Any]", value) if isinstance(value, list) else [value]
    if given and all(_is_id(x) for x in given):
        given = [given]
    if not given or len(given) > MAX_CHOICES:
        raise ValueError(f"a list of {len(given)} prompts; expected 1 to {MAX_CHOICES}")
    return [_prompt(prompt, f"prompt {i}: " if len(given) > 1 else "") for i, prompt in enumerate(given)]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _prompt(value: Any, where: str) -> str | list[int]:
    if isinstance(value, str):
        if not 0 < len(value) <= MAX_PROMPT_CHARACTERS:
            raise ValueError(f"{where}{len(value):,} characters; expected 1 to {MAX_PROMPT_CHARACTERS:,}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}a lone surrogate; expected Unicode text") from None
        return value
    if not isinstance(value, list) or not all(map(_is_id, cast("list[Any]", value))) or not value:
        raise ValueError(f"{where}expected a text, token ids, or a list of texts or of lists of token ids")
    ids = cast("list[int]", value)
    wrong = next((i for i in ids if not 0 <= i < 2**31), None)
    if wrong is not None:
        raise ValueError(f"{where}token id {str(wrong)[:30]}; expected 0 to {2**31 - 1:,}")
    return ids


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_TEXT = {"type": "string", "minLength": 1}


class CompletionRequest(_Sampling):
    """`POST /v1/completions`: texts or token ids; one choice for each prompt and each of `n`."""

    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(_prompts),
        WithJsonSchema({"anyOf": [_TEXT, _IDS, {"type": "array", "items": {"anyOf": [_TEXT, _IDS]}}]}),
    ]
    """A text, token ids, or a list of either."""
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """Default 16."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    add_special_tokens: Literal[True] = True

    @model_validator(mode="before")
    @classmethod
    def _no_tools(cls, data: Any) -> Any:
        """Those of a chat, as far as they say nothing."""
        nothing: dict[str, tuple[Any, ...]] = {
            "tools": ([],),
            "tool_choice": ("none", "auto"),
            "parallel_tool_calls": (True, False),
        }
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in cast("dict[str, Any]", data).items() if v not in nothing.get(k, ())}

    @model_validator(mode="before")
    @classmethod
    def _no_logprobs(cls, data: Any) -> Any:
        """`logprobs: false`, as chats say it."""
        given = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
        return {k: v for k, v in given.items() if k != "logprobs"} if given.get("logprobs") is False else data  # pyright: ignore[reportUnknownVariableType]

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionRequest:
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise ValueError(
                f"{len(self.prompt)} prompts and n = {self.n}; expected {MAX_CHOICES} answers at most"
            )
        return self
