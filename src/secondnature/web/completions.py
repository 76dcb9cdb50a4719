"""The OpenAI-compatible routes of the local engine: models, chat completions, completions (server).

What the official client sends works unchanged; what would change an answer and cannot be honoured is refused by
name, never silently ignored. Every answer is stamped with the weights that gave it: `weights_version`,
`weights_span` and `trial` in the body, `x-weights-version`, `x-weights-span` and `x-weights-trial` in the headers
(a stream says in its headers what it began with, and in its last chunk what it saw).

The event loop computes nothing: texts are rendered, measured and encoded in lanes beside it, and so are answers
with many log-probabilities. A client that leaves takes its request with it.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from secondnature.engines.base import (
    Delta,
    Engine,
    GenerationHandle,
    GenerationRequest,
    GenerationResult,
    Span,
    TokenLogprob,
)
from secondnature.engines.stamps import Clock
from secondnature.errors import SecondnatureError, Unreachable
from secondnature.lessons.memory import Memory, Said
from secondnature.model.chat import encode_chat, encode_text
from secondnature.records import Message
from secondnature.web.guards import error_body
from secondnature.web.lanes import Lanes, while_connected
from secondnature.web.stamps import headers_of, stamps
from secondnature.web.teaching import ERRORS
from secondnature.wire import ChatCompletionRequest, CompletionRequest

CHARACTERS_PER_SCORED_TOKEN = 60
"""Of an answer with log-probabilities, for each token and each of its alternatives."""
CLIENT_LEFT = 499
"""What the log of a proxy calls a client that did not wait; nobody reads it."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for `/v1/completions`."""


@dataclass(frozen=True)
class _Asked:
    """One completion under way, of either kind."""

    id: str
    model: str
    created: int
    chat: bool
    prompt: list[Message] | None
    prefix: str = ""
    """`echo`: the prompt's text, in front of the answer."""


@dataclass(frozen=True)
class _Work:
    """What the lanes made of a body: the request for the engine, and what its answer is called."""

    request: GenerationRequest
    asked: _Asked


def _finish(result: GenerationResult) -> str:
    """Raises what ended an answer that did not come to its end."""
    if result.finish_reason in ("stop", "length"):
        return result.finish_reason
    raise result.error or Unreachable("the answer was broken off", "ask again")


def _usage(result: GenerationResult) -> dict[str, int]:
    answer = result.num_completion_tokens
    return {
        "prompt_tokens": result.num_prompt_tokens,
        "completion_tokens": answer,
        "total_tokens": result.num_prompt_tokens + answer,
    }


def _named(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}


def _chat_logprobs(tokens: list[TokenLogprob] | tuple[TokenLogprob, ...], top: int) -> dict[str, Any]:
    return {"content": [{**_named(t), "top_logprobs": [_named(x) for x in t.top[:top]]} for t in tokens]}


def _text_logprobs(
    tokens: list[TokenLogprob] | tuple[TokenLogprob, ...], start: int, top: int
) -> dict[str, Any]:
    offsets: list[int] = []
    for token in tokens:
        offsets.append(start)
        start += len(token.text)
    return {
        "tokens": [t.text for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [{x.text: x.logprob for x in t.top[:top]} for t in tokens] if top else None,
        "text_offset": offsets,
    }


def router(engine: Engine, tokenizer: Any, memory: Memory, clock: Clock, model_name: str) -> APIRouter:
    """The inference routes of one engine."""
    routes = APIRouter(responses=ERRORS)
    started = int(time.time())
    lanes = Lanes()

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """The one model that is served."""
        card = {"id": model_name, "object": "model", "created": started, "owned_by": "secondnature"}
        return {"object": "list", "data": [{**card, "weights_version": clock.read().version}]}

    @routes.post("/v1/chat/completions")
    async def chat(body: ChatCompletionRequest, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """One answer to a conversation; with `stream`, as server-sent events."""

        def work() -> _Work:
            messages = body.plain()
            wanted = GenerationRequest(
                encode_chat(tokenizer, messages, limit=engine.limits.context),
                max_tokens=body.max_completion_tokens or body.max_tokens,
                temperature=body.temperature,
                top_p=body.top_p,
                seed=body.seed,
                stop=tuple(body.stops()),
                logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            )
            identity = "chatcmpl-" + secrets.token_hex(12)
            return _Work(wanted, _Asked(identity, model_name, int(time.time()), True, messages))

        size = sum(len(m.content) for m in body.messages)
        return await _serve(request, body, size, work)

    @routes.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Continue a text or token ids."""

        def work() -> _Work:
            text, ids = (body.prompt, None) if isinstance(body.prompt, str) else (None, body.prompt)
            if ids is None:
                ids = encode_text(tokenizer, str(text), limit=engine.limits.context)
            score = body.echo and body.logprobs is not None and len(ids) > 1
            wanted = GenerationRequest(
                ids,
                max_tokens=DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
                temperature=body.temperature,
                top_p=body.top_p,
                seed=body.seed,
                stop=tuple(body.stops()),
                logprobs=body.logprobs,
                score_from=1 if score else None,
            )
            prefix = (str(tokenizer.decode(ids)) if text is None else text) if body.echo else ""
            identity = "cmpl-" + secrets.token_hex(12)
            return _Work(wanted, _Asked(identity, model_name, int(time.time()), False, None, prefix))

        return await _serve(request, body, len(body.prompt), work)

    async def _serve(
        request: Request,
        body: ChatCompletionRequest | CompletionRequest,
        size: int,
        work: Callable[[], _Work],
    ) -> Response:
        async def answer() -> Response:
            made = await lanes.run(size, work)
            handle = engine.submit(made.request)
            if body.stream:
                return _streamed(handle, made.asked, body)
            result = await handle.answer()
            scored = len(result.prompt_tokens) + len(result.tokens)
            written = scored * CHARACTERS_PER_SCORED_TOKEN * (1 + (made.request.logprobs or 0))
            content = await lanes.run(written, lambda: _json(_whole(made.asked, made.request, result)))
            _remember(made.asked, result)
            return Response(content, media_type="application/json", headers=headers_of(result.weights))

        # a stream looks for its client's leaving by itself
        found = await while_connected(request, answer())
        return Response(status_code=CLIENT_LEFT) if found is None else found

    def _streamed(
        handle: GenerationHandle, asked: _Asked, body: ChatCompletionRequest | CompletionRequest
    ) -> Response:
        usage = body.stream_options is not None and body.stream_options.include_usage
        begun = clock.read()
        return StreamingResponse(
            _events(handle.stream(), asked, handle.request, usage=usage),
            media_type="text/event-stream",
            headers=headers_of(Span.begin(begun)) | {"cache-control": "no-cache"},
        )

    def _remember(asked: _Asked, result: GenerationResult) -> None:
        version = result.weights.last.version if result.weights is not None else ""
        memory.remember(asked.id, Said(asked.prompt, result.text, version, result.finish_reason))

    def _whole(asked: _Asked, request: GenerationRequest, result: GenerationResult) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": _finish(result), "logprobs": None}
        if asked.chat:
            choice["message"] = {"role": "assistant", "content": result.text, "refusal": None}
            if request.logprobs is not None:
                choice["logprobs"] = _chat_logprobs(result.tokens, request.logprobs)
        else:
            choice["text"] = asked.prefix + result.text
            if request.logprobs is not None:
                tokens = result.prompt_tokens + result.tokens if asked.prefix else result.tokens
                choice["logprobs"] = _text_logprobs(tokens, 0, request.logprobs)
                if asked.prefix:  # the first token of a text has no log-probability
                    first = tokenizer.decode([request.prompt_ids[0]])
                    logprobs = choice["logprobs"]
                    logprobs["tokens"].insert(0, first)
                    logprobs["token_logprobs"].insert(0, None)
                    if logprobs["top_logprobs"] is not None:
                        logprobs["top_logprobs"].insert(0, None)
                    logprobs["text_offset"] = [0, *(x + len(first) for x in logprobs["text_offset"])]
        kind = "chat.completion" if asked.chat else "text_completion"
        head = {"id": asked.id, "object": kind, "created": asked.created, "model": asked.model}
        return {**head, "choices": [choice], "usage": _usage(result), **stamps(result.weights)}

    async def _events(
        stream: AsyncIterator[Any], asked: _Asked, request: GenerationRequest, *, usage: bool
    ) -> AsyncIterator[bytes]:
        telling = memory.tell(asked.id, asked.prompt, clock.read().version)
        kind = "chat.completion.chunk" if asked.chat else "text_completion"
        head = {"id": asked.id, "object": kind, "created": asked.created, "model": asked.model}

        def chunk(text: str, finish: str | None, tokens: tuple[TokenLogprob, ...] = (), **more: Any) -> bytes:
            choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
            if asked.chat:
                choice["delta"] = {"content": text} if text else {}
                if request.logprobs is not None and tokens:
                    choice["logprobs"] = _chat_logprobs(tokens, request.logprobs)
            else:
                choice["text"] = text
                if request.logprobs is not None and tokens:
                    choice["logprobs"] = _text_logprobs(tokens, 0, request.logprobs)
            return _sse({**head, "choices": [choice], **more})

        if asked.chat:
            role = {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "finish_reason": None,
                "logprobs": None,
            }
            yield _sse({**head, "choices": [role]})
        elif asked.prefix:
            yield chunk(asked.prefix, None)
        async for event in stream:
            if isinstance(event, Delta):
                telling.add(event.text)
                yield chunk(event.text, None, event.tokens)
                continue
            result: GenerationResult = event.result
            try:
                finish = _finish(result)
            except SecondnatureError as e:
                yield _sse(error_body(e))
                return
            _remember(asked, result)
            yield chunk("", finish, **stamps(result.weights))
            if usage:
                yield _sse({**head, "choices": [], "usage": _usage(result)})
        yield b"data: [DONE]\n\n"

    return routes


def _json(payload: dict[str, Any]) -> bytes:
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()


def _sse(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n"
