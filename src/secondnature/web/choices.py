"""From what the engine says to what OpenAI's clients read: choices, log-probabilities, usage (server).

The same for answers that come whole and for those that come in pieces: a `Choice` is one answer to one prompt, and
knows how far its text has come, so that offsets go on counting from piece to piece. `ChoicesForm` puts them into
one body, or into the pieces of a stream.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secondnature.engines.generation import (
    Delta,
    Event,
    GenerationRequest,
    GenerationResult,
    PromptScored,
    TokenLogprob,
)
from secondnature.engines.local.text import Entry
from secondnature.errors import SecondnatureError, Unreachable
from secondnature.records import Message
from secondnature.web.reading import Read, Reader
from secondnature.web.refusals import error_body
from secondnature.web.stamps import merged, stamps
from secondnature.web.tools import Asking, tool_calls

__all__ = ["Asked", "Choice", "ChoicesForm", "finish_of"]


@dataclass
class _Offsets:
    """Where in a text each token begins, in characters; one whose bytes end a character begins where it began."""

    at: int = 0
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def next(self, token: TokenLogprob, text: str | None = None) -> int:
        """Where this token begins. In a `text` special tokens may be written out."""
        before = self.at
        if token.raw is not None:
            self.at += len(self._decoder.decode(token.raw))
        elif text is not None and text.startswith(token.text, self.at):
            self.at += len(token.text)
        return before


@dataclass
class Choice:
    """One answer to one prompt."""

    index: int
    request: GenerationRequest
    chat: bool
    echoed: str | None = None
    """`echo`: the prompt's text, in front of the answer."""
    first: Entry | None = None
    """`echo`: the prompt's first token, which has no log-probability."""
    asking: Asking | None = None
    """How a chat's answer is read; None: it is text."""
    _offsets: _Offsets = field(default_factory=_Offsets)
    _reader: Reader | None = field(init=False, default=None)
    _called: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._reader = None if self.asking is None else self.asking.reader()

    def _of_text(self, tokens: Sequence[TokenLogprob], text: str | None = None) -> dict[str, Any]:
        """`logprobs` of a completion."""
        top = self.request.logprobs or 0
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{x.text: x.logprob for x in t.top[:top]} for t in tokens] if top else None,
            "text_offset": [self._offsets.next(t, text) for t in tokens],
        }

    def _of_prompt(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """`logprobs` of the echoed prompt; the first token has none, and says so with null."""
        assert self.first is not None
        head = TokenLogprob(self.request.prompt_ids[0], self.first[0], 0.0, (), self.first[1])
        found = self._of_text([head, *tokens], self.echoed)
        found["token_logprobs"][0] = None
        if found["top_logprobs"]:
            found["top_logprobs"][0] = None
        return found

    def _head(self, finish: str | None) -> dict[str, Any]:
        return {"index": self.index, "finish_reason": finish, "logprobs": None}

    def whole(self, result: GenerationResult) -> dict[str, Any]:
        """The choice of an answer that comes whole."""
        choice = self._head(finish_of(result))
        scored = self.request.logprobs is not None
        if self.chat:
            read = Read(text=result.text) if self.asking is None else self.asking.read(result.text)
            choice["message"] = {"role": "assistant", "content": read.text, "refusal": None}
            if read.thoughts:
                choice["message"]["reasoning_content"] = read.thoughts
            if read.calls:
                choice["message"] |= {"content": read.text or None, "tool_calls": tool_calls(read.calls)}
                choice["finish_reason"] = "tool_calls"
            choice["logprobs"] = self._of_chat(result.tokens) if scored else None
            return choice
        choice["text"] = (self.echoed or "") + result.text
        if not scored:
            return choice
        if self.echoed is None:
            choice["logprobs"] = self._of_text(result.tokens)
            return choice
        prompt = self._of_prompt(result.prompt_tokens)
        self._offsets = _Offsets(len(self.echoed))
        answer = self._of_text(result.tokens)
        choice["logprobs"] = {k: None if prompt[k] is None else prompt[k] + answer[k] for k in prompt}
        return choice

    def opening(self, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        """The first piece of a stream: a chat's role, or the echoed prompt with its scores."""
        choice = self._head(None)
        if self.chat:
            return {**choice, "delta": {"role": "assistant", "content": ""}}
        if self.echoed is None:
            return None
        choice["text"] = self.echoed
        if self.request.logprobs is not None:
            choice["logprobs"] = self._of_prompt(tokens or ())
        self._offsets = _Offsets(len(self.echoed))
        return choice

    def held(self) -> dict[str, Any] | None:
        """Before the end of a stream: what was held back because it might have been a call, and the calls."""
        if self._reader is None:
            return None
        read = self._reader.end()
        self._called = bool(read.calls)
        delta = _delta(read)
        return {**self._head(None), "delta": delta} if delta else None

    def piece(self, text: str, tokens: Sequence[TokenLogprob], finish: str | None = None) -> dict[str, Any]:
        """The next piece of a stream, or with `finish` its end."""
        choice = self._head("tool_calls" if finish and self._called else finish)
        scored = self.request.logprobs is not None and len(tokens) > 0
        if self.chat:
            reader = self._reader if finish is None else None
            choice["delta"] = _delta(Read(text=text) if reader is None else reader.feed(text))
            choice["logprobs"] = self._of_chat(tokens) if scored else None
        else:
            choice["text"] = text
            choice["logprobs"] = self._of_text(tokens) if scored else None
        return choice

    def _of_chat(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """`logprobs` of a chat."""
        top = self.request.logprobs or 0
        content = [{**_named(t), "top_logprobs": [_named(x) for x in t.top[:top]]} for t in tokens]
        return {"content": content, "refusal": None}


@dataclass(frozen=True)
class Asked:
    """One request under way: what its answer is called, and its choices."""

    id: str
    model: str
    created: int
    chat: bool
    choices: Sequence[Choice]
    prompt: list[Message] | None = None
    """A chat's, to be remembered."""
    tools: list[dict[str, Any]] | None = None
    """That the model was shown."""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the answer says besides the stamp."""
    template_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What a chat's template was told besides."""

    def head(self, *, stream: bool) -> dict[str, Any]:
        """The fields that every body and every piece begins with."""
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _delta(read: Read) -> dict[str, Any]:
    """A piece of a streamed chat, without what is not in it."""
    fields: dict[str, Any] = {
        "reasoning_content": read.thoughts,
        "content": read.text,
        "tool_calls": tool_calls(read.calls, streamed=True),
    }
    return {k: v for k, v in fields.items() if v}


def _named(token: TokenLogprob) -> dict[str, Any]:
    """A token of a chat's `logprobs`; `bytes` is null for one that adds nothing to the text."""
    raw = None if token.raw is None else list(token.raw)
    return {"token": token.text, "logprob": token.logprob, "bytes": raw}


def finish_of(result: GenerationResult) -> str:
    """Why an answer ended. Raises what ended one that did not come to its end."""
    if result.finish_reason in ("stop", "length"):
        return result.finish_reason
    raise result.error or Unreachable("the answer was broken off", "ask again")


@dataclass(frozen=True)
class ChoicesForm:
    """How `/v1/chat/completions` and `/v1/completions` write an answer down."""

    n: int
    """Choices of each prompt."""
    include_usage: bool = False
    """At the end of a stream."""

    def whole(self, asked: Asked, results: Sequence[GenerationResult]) -> dict[str, Any]:
        """The body of an answer that comes whole. Raises what ended one that did not come to its end."""
        choices = [c.whole(r) for c, r in zip(asked.choices, results, strict=True)]
        span = merged([r.weights for r in results])
        return {
            **asked.head(stream=False),
            "choices": choices,
            "usage": self._usage(results),
            **stamps(span),
        }

    async def events(
        self, asked: Asked, events: AsyncGenerator[tuple[int, Event]], version: str
    ) -> AsyncGenerator[bytes]:
        """The pieces of a stream that began with these weights ("": no weights answer)."""
        head = asked.head(stream=True) | ({"system_fingerprint": version} if version else {})
        results: dict[int, GenerationResult] = {}

        def chunk(choice: dict[str, Any], **more: Any) -> bytes:
            return _event({**head, "choices": [choice], **more})

        for choice in asked.choices:
            if choice.request.score_from is None and (piece := choice.opening(None)) is not None:
                yield chunk(piece)
        async for i, event in events:
            choice = asked.choices[i]
            if isinstance(event, PromptScored):
                if (piece := choice.opening(event.tokens)) is not None:
                    yield chunk(piece)
                continue
            if isinstance(event, Delta):
                yield chunk(choice.piece(event.text, event.tokens))
                continue
            results[i] = event.result
            try:
                finish = finish_of(event.result)
            except SecondnatureError as e:
                yield _event(error_body(e))
                return
            if (piece := choice.held()) is not None:
                yield chunk(piece)
            yield chunk(choice.piece("", (), finish), **stamps(event.result.weights))
        if self.include_usage:
            usage = self._usage([results[i] for i in range(len(asked.choices))])
            yield _event({**head, "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    def _usage(self, results: Sequence[GenerationResult]) -> dict[str, int]:
        """Of all choices, in order: each prompt counts once, however many answers it got."""
        prompt = sum(r.num_prompt_tokens for r in results[:: self.n])
        answer = sum(r.num_completion_tokens for r in results)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n"
