"""How a chat is asked and its answer read where tools or a shape of the answer are wanted (server).

The template shows the tools, the client runs them: this server only finds the calls. A call that `tool_choice`
demands is shaped as it is generated, so it always is one. A template that shows no tools is no reason to forget
them: they are refused, with what to turn off, unless the setting `ignore_tools` says otherwise; then a header does.

A shape begins behind the thoughts that the template lets a model begin with: they are `reasoning_content`, and the
text is what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secondnature.engines.base import Engine
from secondnature.errors import BadInput
from secondnature.model.rendering import Rendering
from secondnature.model.thoughts import Thoughts, thoughts_before
from secondnature.model.tools import takes_tools
from secondnature.web.reading import Read, Reader
from secondnature.web.tool_calls import SPECIAL, Call
from secondnature.wire import ChatCompletionRequest, ChatMessage
from secondnature.wire.tools import FunctionTool, any_of, call_shape

__all__ = ["Asking", "asking", "tool_calls"]

IGNORED_HEADER = "x-tools-ignored"
HINT = (
    "turn tools off in the client (Open WebUI: the model's Function calling: Legacy, and Built-in tools off), or "
    "serve with the setting `ignore_tools`"
)


@dataclass(frozen=True)
class Asking:
    """How one chat is asked, and how its answers are read."""

    messages: Sequence[Mapping[str, Any]]
    """For the template."""
    tools: list[dict[str, Any]] | None = None
    """For the template."""
    shape: Any = None
    """For the engine."""
    marks: tuple[str, ...] = ()
    offered: Mapping[str, Mapping[str, Any]] | None = None
    """The schema of each tool that the model was shown; None: it calls none."""
    thoughts: Thoughts | None = None
    """What the answer may begin with; None: all of it is said."""
    single: bool = False
    """At most one call is wanted."""
    num_ignored: int = 0
    """Tools that were sent and not shown."""

    @property
    def headers(self) -> dict[str, str]:
        """What the answer says besides."""
        return {IGNORED_HEADER: str(self.num_ignored)} if self.num_ignored else {}

    def reader(self) -> Reader:
        """What reads one answer."""
        return Reader(self.offered, self.thoughts, single=self.single)

    def read(self, text: str) -> Read:
        """A whole answer, taken apart."""
        return self.reader().whole(text)


def asking(engine: Engine, tokenizer: Any, body: ChatCompletionRequest, *, ignore_tools: bool) -> Asking:
    """How a chat is asked.

    Raises:
        BadInput: the template shows no tools, a tool that is demanded is not there, or a shape cannot be compiled.
    """
    tools = [] if body.tool_choice == "none" else body.tools
    ignored = len(tools) if ignore_tools and tools and not takes_tools(tokenizer) else 0
    if ignored:
        tools = []
    turns = any(m.tool_calls or m.role == "tool" for m in body.messages)
    if (tools or turns) and not takes_tools(tokenizer):
        what = f"{len(tools)} tools were sent" if tools else "the conversation has turns with calls of tools"
        error = BadInput(f"{what}, and this model's chat template shows none to the model", HINT)
        raise error.about("tools" if tools else "messages", "unsupported_parameter")
    wanted = body.response_format.wanted()
    demanded = not ignored and body.tool_choice not in ("none", "auto")
    shapes: list[dict[str, Any]] = [] if wanted is None or demanded else [wanted]
    if demanded:
        shapes.append(_demanded(body, tools))
    elif shapes and tools:  # a call, or an answer that fits
        shapes.append(call_shape(tools, "required"))
    messages = [_turn(m) for m in body.messages]
    shown = [tool.shown() for tool in tools] or None
    thoughts: Thoughts | None = None
    if shapes:
        rendering = Rendering(tokenizer, messages, tools=shown, options=body.template_options())
        thoughts = thoughts_before(tokenizer, rendering)
    return Asking(
        messages,
        shown,
        engine.shape(any_of(shapes), thoughts) if shapes else None,
        marks=(*(SPECIAL if tools else ()), *((thoughts.open, thoughts.close) if thoughts else ())),
        offered={t.function.name: t.function.parameters or {} for t in tools} if tools else None,
        thoughts=thoughts,
        single=demanded or not body.parallel_tool_calls,
        num_ignored=ignored,
    )


def _demanded(body: ChatCompletionRequest, tools: list[FunctionTool]) -> dict[str, Any]:
    if not tools:
        raise BadInput("`tool_choice` demands a call, but no `tools` were sent", "send tools, or none").about(
            "tool_choice"
        )
    try:
        return call_shape(tools, body.tool_choice)
    except ValueError as e:
        raise BadInput(str(e), "name one of them").about("tool_choice") from None


def _turn(message: ChatMessage) -> dict[str, Any]:
    """A turn as it is rendered: with what the assistant thought, which its record does not hold."""
    turn = message.plain().model_dump()
    return turn | ({"reasoning_content": message.reasoning_content} if message.reasoning_content else {})


def tool_calls(calls: Sequence[Call], *, streamed: bool = False) -> list[dict[str, Any]]:
    """Calls as OpenAI's clients read them; in a stream each says which one it is."""
    return [
        {
            **({"index": i} if streamed else {}),
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for i, call in enumerate(calls)
    ]
