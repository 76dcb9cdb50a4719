"""`POST /v1/responses`, OpenAI's newer form of a chat, as `openai`'s `client.responses` and agents ask it (server).

It is the chat that it means: the same rendering, engine, stamps and scope. Only the answer looks otherwise: a list
of items, and in a stream the events in OpenAI's order, each with its number. Nothing is stored; feedback takes the
id of a response as it takes that of a completion.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from secondnature.engines.generation import Delta, Event, Finished, GenerationResult
from secondnature.errors import SecondnatureError
from secondnature.web.choices import Asked, finish_of
from secondnature.web.reading import Read, Reader
from secondnature.web.refusals import error_body
from secondnature.web.stamps import stamps
from secondnature.web.tool_calls import Call
from secondnature.wire.responses import ResponsesRequest

__all__ = ["ResponseForm"]


def _usage(result: GenerationResult) -> dict[str, Any]:
    prompt, answer = result.num_prompt_tokens, result.num_completion_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": answer,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + answer,
    }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(identity: str, text: str | None, status: str) -> dict[str, Any]:
    """An item of text; None: nothing of it is there yet."""
    content = [] if text is None else [_text_part(text)]
    return {"id": identity, "type": "message", "role": "assistant", "status": status, "content": content}


def _thought_part(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _reasoning(identity: str, text: str | None, status: str = "completed") -> dict[str, Any]:
    """An item of thoughts; None: nothing of it is there yet."""
    content = [] if text is None else [_thought_part(text)]
    return {"id": identity, "type": "reasoning", "summary": [], "content": content, "status": status}


def _call(call: Call, status: str = "completed", arguments: str | None = None) -> dict[str, Any]:
    """An item of a call."""
    written = call.arguments if arguments is None else arguments
    return {
        "id": "fc_" + call.id.removeprefix("call_"),
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": written,
        "status": status,
    }


def _head(asked: Asked, body: ResponsesRequest) -> dict[str, Any]:
    """A response before anything is said."""
    echoed = body.model_dump(
        mode="json",
        by_alias=True,
        exclude_none=True,
        include={"tools", "tool_choice", "text"},
    )
    request = asked.choices[0].request
    return {
        "id": asked.id,
        "object": "response",
        "created_at": asked.created,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": asked.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort, "summary": None},
        "store": False,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
        **echoed,
    }


def _ended(
    head: Mapping[str, Any], output: list[dict[str, Any]], result: GenerationResult, finish: str
) -> dict[str, Any]:
    """A response with its answer."""
    cut = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    state = cut if finish == "length" else {"status": "completed"}
    return {**head, **state, "output": output, "usage": _usage(result), **stamps(result.weights)}


def _new(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


@dataclass
class _Events:
    """Writes events, with their numbers; holds the items that are complete."""

    number: int = 0
    output: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def write(self, kind: str, **fields: Any) -> bytes:
        """One event."""
        event = {"type": kind, "sequence_number": self.number, **fields}
        self.number += 1
        return f"event: {kind}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode()

    def done(self, item: dict[str, Any]) -> bytes:
        """The end of an item."""
        self.output.append(item)
        index = len(self.output) - 1
        return self.write("response.output_item.done", output_index=index, item=item)

    def call(self, call: Call) -> Iterator[bytes]:
        """A call, whole."""
        begun = _call(call, "in_progress", "")
        index = len(self.output)
        place = {"item_id": begun["id"], "output_index": index}
        kind = "response.function_call_arguments"
        yield self.write("response.output_item.added", output_index=index, item=begun)
        yield self.write(f"{kind}.delta", **place, delta=call.arguments)
        yield self.write(f"{kind}.done", **place, name=call.name, arguments=call.arguments)
        yield self.done(_call(call))


@dataclass
class _Text:
    """An item of text or of thoughts in a stream: begun with the first character of it."""

    to: _Events
    thoughts: bool = False
    id: str = ""
    text: str | None = None
    """None: not begun."""

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": len(self.to.output), "content_index": 0}

    def _item(self, text: str | None, status: str) -> dict[str, Any]:
        return (_reasoning if self.thoughts else _message)(self.id, text, status)

    def _part(self, text: str) -> dict[str, Any]:
        return _thought_part(text) if self.thoughts else _text_part(text)

    def _write(self, what: str, **fields: Any) -> bytes:
        """An event about the text itself."""
        kind = "reasoning_text" if self.thoughts else "output_text"
        more = {} if self.thoughts else {"logprobs": []}
        return self.to.write(f"response.{kind}.{what}", **self._place(), **fields, **more)

    def add(self, text: str) -> Iterator[bytes]:
        """More of it; the first time also where there is nothing to say."""
        if self.text is None:
            self.text, self.id = "", _new("rs_" if self.thoughts else "msg_")
            index = len(self.to.output)
            begun = self._item(None, "in_progress")
            yield self.to.write("response.output_item.added", output_index=index, item=begun)
            yield self.to.write("response.content_part.added", **self._place(), part=self._part(""))
        if text:
            self.text += text
            yield self._write("delta", delta=text)

    def end(self, status: str = "completed") -> Iterator[bytes]:
        """The end of it, if it was begun and has not ended."""
        if self.text is None:
            return
        yield self._write("done", text=self.text)
        part = self._part(self.text)
        yield self.to.write("response.content_part.done", **self._place(), part=part)
        yield self.to.done(self._item(self.text, status))
        self.text = None


@dataclass(frozen=True)
class ResponseForm:
    """How `/v1/responses` writes the one answer to a request down."""

    body: ResponsesRequest

    def whole(self, asked: Asked, results: Sequence[GenerationResult]) -> dict[str, Any]:
        """The response of an answer that comes whole. Raises what ended one that did not come to its end."""
        (result,) = results
        finish = finish_of(result)
        how = asked.choices[0].asking
        read = Read(text=result.text) if how is None else how.read(result.text)
        status = "incomplete" if finish == "length" else "completed"
        items = [_reasoning(_new("rs_"), read.thoughts)] if read.thoughts else []
        items += [_message(_new("msg_"), read.text, status)] if read.text or not read.calls else []
        return _ended(_head(asked, self.body), [*items, *map(_call, read.calls)], result, finish)

    async def events(
        self, asked: Asked, events: AsyncGenerator[tuple[int, Event]], version: str
    ) -> AsyncGenerator[bytes]:
        """The events of a streamed response, in OpenAI's order."""
        head = _head(asked, self.body)
        how = asked.choices[0].asking
        reader = Reader(None, None, single=False) if how is None else how.reader()
        to = _Events()
        thoughts, text = _Text(to, thoughts=True), _Text(to)

        def written(read: Read) -> Iterator[bytes]:
            if read.thoughts:
                yield from thoughts.add(read.thoughts)
            if read.text:
                yield from thoughts.end()
                yield from text.add(read.text)

        yield to.write("response.created", response=head)
        yield to.write("response.in_progress", response=head)
        async for _, event in events:
            if isinstance(event, Delta):
                for piece in written(reader.feed(event.text)):
                    yield piece
            if not isinstance(event, Finished):
                continue
            result = event.result
            try:
                finish = finish_of(result)
            except SecondnatureError as e:
                failed = {"code": "server_error", "message": str(error_body(e)["error"]["message"])}
                yield to.write("response.failed", response={**head, "status": "failed", "error": failed})
                return
            last = reader.end()
            nothing = text.text is None and not last.text and not last.calls
            status = "incomplete" if finish == "length" else "completed"
            pieces = [written(last), thoughts.end(), text.add("") if nothing else (), text.end(status)]
            for piece in chain(*pieces, *map(to.call, last.calls)):
                yield piece
            yield to.write(f"response.{status}", response=_ended(head, to.output, result, finish))
