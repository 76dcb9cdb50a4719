"""How a chat is asked and its answer read where tools or a shape of the answer are wanted (server).

The template shows the tools, the client runs them: this server only finds the calls. A call that `tool_choice`
demands is shaped as it is generated, so it always is one. Many templates show no tools, and some clients send
theirs with every message (Open WebUI: 36). With the setting `ignore_tools` such a chat is answered: what is only
offered is left out, and a header says so; what is demanded is still made; turns with calls are written as text.

A shape begins behind the thoughts that the template lets a model begin with: they are `reasoning_content`, and the
text is what was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secondnature.engines.base import Engine
from secondnature.errors import BadInput
from secondnature.model.rendering import Rendering
from secondnature.model.thoughts import Thoughts, thoughts_before
from secondnature.model.tools import as_object, takes_tools
from secondnature.web.reading import Read, Reader
from secondnature.web.tool_calls import SPECIAL, Call
from secondnature.wire import ChatCompletionRequest, ChatMessage
from secondnature.wire.tools import FunctionTool, any_of, call_shape

__all__ = ["Asking", "asking", "tool_calls"]

IGNORED_HEADER = "x-tools-ignored"
HINT = (
    "turn tools off in the client (Open WebUI: the model's Function calling: Legacy, and Built-in tools off), or "
    "serve with the setting `ignore_tools`, which is the default"
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
    turns = any(m.tool_calls or m.role == "tool" for m in body.messages)
    shown = takes_tools(tokenizer) if tools or turns else True
    if not shown and not ignore_tools:
        what = f"{len(tools)} tools were sent" if tools else "the conversation has turns with calls of tools"
        error = BadInput(f"{what}, and this model's chat template shows none to the model", HINT)
        raise error.about("tools" if tools else "messages", "unsupported_parameter")
    demanded = body.tool_choice not in ("none", "auto")
    ignored = 0 if shown else len(tools)
    if not shown and not demanded:
        tools = []
    wanted = body.response_format.wanted()
    shapes: list[dict[str, Any]] = [] if wanted is None or demanded else [wanted]
    if demanded:
        shapes.append(_demanded(body, tools))
    elif shapes and tools:  # a call, or an answer that fits
        shapes.append(call_shape(tools, "required"))
    messages = [_turn(m) if shown else _written(_turn(m)) for m in body.messages]
    given = [tool.shown() for tool in tools] if tools and shown else None
    thoughts: Thoughts | None = None
    if shapes:
        rendering = Rendering(tokenizer, messages, tools=given, options=body.template_options())
        thoughts = thoughts_before(tokenizer, rendering)
    return Asking(
        messages,
        given,
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


def _written(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn for a template that knows no tools: calls, and what came of them, as most models write them."""
    if turn["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
    called = [call["function"] for call in turn.get("tool_calls", ())]
    calls = [{"name": f["name"], "arguments": as_object(f["arguments"])} for f in called]
    written = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls]
    return {"role": turn["role"], "content": "\n".join(part for part in (turn["content"], *written) if part)}


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
