"""How a chat is asked and its answer read where tools or a shape of the answer are wanted (server).

The template shows the tools, the client runs them: this server only finds the calls. A call that `tool_choice`
demands is shaped as it is generated, so it always is one. Many templates show no tools, and some clients send
theirs with every message (Open WebUI: 36). With the setting `ignore_tools` such a chat is answered: what is only
offered is left out, and a header says so; what is demanded is still made; turns with calls are written as text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from secondnature.engines.base import Engine
from secondnature.errors import BadInput
from secondnature.model.tools import takes_tools
from secondnature.web.tool_calls import SPECIAL, Call, CallScanner, find_calls
from secondnature.wire import ChatCompletionRequest, ChatMessage
from secondnature.wire.tools import FunctionTool, any_of, call_shape

__all__ = ["Asking", "asking", "tool_calls"]

HINT = (
    "turn tools off in the client (Open WebUI: the model's Function calling: Legacy, and Built-in tools off), or "
    "serve with the setting `ignore_tools`, which is the default"
)


@dataclass(frozen=True)
class Asking:
    """How one chat is asked, and how its answers are read."""

    messages: Sequence[Mapping[str, Any]]
    """For the template: calls with their arguments taken apart."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """For the template."""
    shape: Any = None
    """For the engine."""
    marks: tuple[str, ...] = ()
    offered: Mapping[str, Mapping[str, Any]] | None = None
    """The schema of each tool that the model was shown; None: the answer is text."""
    demanded: bool = False
    """The answer is one call, whatever it is."""
    single: bool = False
    """At most one call is wanted."""
    num_ignored: int = 0
    """Tools that were sent and not shown."""
    has_calls: bool = False
    """The conversation has turns with calls, or one is demanded: more than a correction can hold."""

    @property
    def headers(self) -> dict[str, str]:
        """What the answer says besides."""
        return {"x-tools-ignored": str(self.num_ignored)} if self.num_ignored else {}

    def read(self, text: str) -> tuple[str, list[Call]]:
        """What a whole answer says and what it calls."""
        if self.offered is None:
            return text, []
        said, calls = find_calls(text, self.offered)
        return said, calls[:1] if self.single else calls

    def scanner(self) -> CallScanner | None:
        """What reads a streamed answer; None: all of it is text."""
        return None if self.offered is None else CallScanner(self.offered)


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
    return Asking(
        [_turn(m) if shown else _written(_turn(m)) for m in body.messages],
        [tool.shown() for tool in tools] if tools and shown else None,
        engine.shape(any_of(shapes)) if shapes else None,
        SPECIAL if tools else (),
        {t.function.name: t.function.parameters or {} for t in tools} if tools else None,
        demanded,
        demanded or not body.parallel_tool_calls,
        ignored,
        demanded or turns,
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
    """A turn as templates expect it: arguments are objects, and no content is an empty one."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        turn |= {"tool_call_id": message.tool_call_id or ""} | (
            {"name": message.name} if message.name else {}
        )
    return turn


def _written(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn for a template that knows no tools: calls, and what came of them, as most models write them."""
    calls = [
        json.dumps(
            {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}, ensure_ascii=False
        )
        for call in turn.get("tool_calls", ())
    ]
    if turn["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
    parts = [turn["content"], *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
    return {"role": turn["role"], "content": "\n".join(part for part in parts if part)}


def _arguments(text: str) -> Any:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return cast("dict[str, Any]", found) if isinstance(found, dict) else text


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
