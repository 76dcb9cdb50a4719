"""The OpenAI-compatible routes of the local engine: models, chat completions, completions (server).

What the official client sends works unchanged; what would change an answer and cannot be honoured is refused by
name, never silently ignored. Every answer is stamped with the weights that gave it: `weights_version`,
`weights_span`, `trial` and `system_fingerprint` in the body, `x-weights-version`, `x-weights-span` and
`x-weights-trial` in the headers (a stream says there what it began with, and in its last chunk what it saw).

The event loop computes nothing: texts are rendered, measured and encoded in lanes beside it, and so are answers
with many log-probabilities. A client that leaves takes its request with it, all of its choices.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from secondnature.engines.base import (
    Delta,
    Engine,
    Event,
    Finished,
    GenerationHandle,
    GenerationRequest,
    GenerationResult,
    PromptScored,
    Span,
)
from secondnature.engines.local.text import vocabulary
from secondnature.engines.stamps import Clock
from secondnature.errors import BadInput, SecondnatureError
from secondnature.lessons.memory import Memory, Said, Unread
from secondnature.model.chat import encode_chat, encode_text
from secondnature.model.defaults import SamplingDefaults
from secondnature.web import responses
from secondnature.web.choices import Asked, Choice, finish_of, usage_of
from secondnature.web.lanes import Lanes, while_connected
from secondnature.web.refusals import error_body, unknown_model
from secondnature.web.stamps import headers_of, merged, stamps
from secondnature.web.teaching import ERRORS
from secondnature.web.tools import Asking, asking
from secondnature.wire import ChatCompletionRequest, CompletionRequest
from secondnature.wire.responses import ResponsesRequest

CHARACTERS_PER_SCORED_TOKEN = 60
"""Of an answer with log-probabilities, for each token and each of its alternatives."""
CLIENT_LEFT = 499
"""What the log of a proxy calls a client that did not wait; nobody reads it."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for `/v1/completions`."""

AnyRequest = ChatCompletionRequest | CompletionRequest


def router(
    engine: Engine,
    tokenizer: Any,
    memory: Memory,
    clock: Clock,
    model_name: str,
    *,
    aliases: Collection[str] = (),
    defaults: SamplingDefaults | None = None,
    ignore_tools: bool = False,
) -> APIRouter:
    """The inference routes of one engine.

    Args:
        aliases: names that a request may call the model by, besides its own.
        defaults: how a request that does not say is sampled.
        ignore_tools: tools that the chat template does not show are accepted, and a header says so.
    """
    routes = APIRouter(responses=ERRORS)
    started = int(time.time())
    lanes = Lanes()
    entry = vocabulary(tokenizer)

    def card() -> dict[str, Any]:
        made = {"id": model_name, "object": "model", "created": started, "owned_by": "secondnature"}
        return {**made, "max_model_len": engine.limits.context, "weights_version": clock.read().version}

    def check_model(name: str | None) -> None:
        if name is not None and name != model_name and name not in aliases:
            raise unknown_model(name, model_name)

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """The one model that is served."""
        return {"object": "list", "data": [card()]}

    @routes.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """The model by its name; another name is 404."""
        check_model(model_id)
        return card()

    @routes.post("/v1/chat/completions")
    async def chat(body: ChatCompletionRequest, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """One answer to a conversation, or `n`; with `stream`, as server-sent events."""

        return await _serve(request, body, body.num_characters(), lambda: chat_asked(body, "chatcmpl-"))

    def chat_asked(body: ChatCompletionRequest, prefix: str) -> Asked:
        """A chat, ready for the engine; the id of its answer begins with `prefix`."""
        how = asking(engine, tokenizer, body, ignore_tools=ignore_tools)
        ids = encode_chat(
            tokenizer,
            how.messages,
            limit=engine.limits.context,
            tools=how.tools,
            template_options=body.template_options(),
        )
        wanted = [_chat_request(body, ids, how, defaults, i) for i in range(body.n)]
        choices = [Choice(i, request, True, asking=how) for i, request in enumerate(wanted)]
        prompt = None if how.has_calls else body.plain()
        identity = prefix + secrets.token_hex(12)
        now = int(time.time())
        return Asked(identity, model_name, now, True, choices, prompt, how.headers, how.has_calls)

    @routes.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Continue texts or token ids: one choice for each prompt and each of `n`."""

        def work() -> Asked:
            choices: list[Choice] = []
            for prompt in body.prompt:
                if isinstance(prompt, str):
                    ids, written = encode_text(tokenizer, prompt, limit=engine.limits.context), prompt
                else:
                    ids, written = prompt, str(tokenizer.decode(prompt)) if body.echo else ""
                echoed = written if body.echo else None
                first = entry(ids[0]) if ids and body.echo else None
                for i in range(body.n):
                    wanted = _text_request(body, ids, defaults, i)
                    choices.append(Choice(len(choices), wanted, False, echoed, first))
            return Asked("cmpl-" + secrets.token_hex(12), model_name, int(time.time()), False, choices)

        return await _serve(request, body, sum(map(len, body.prompt)), work)

    @routes.post("/v1/responses")
    async def respond(body: ResponsesRequest, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """A chat in OpenAI's newer form; with `stream`, as server-sent events."""
        check_model(body.model)

        async def answer() -> Response:
            chat = body.chat()
            asked = await lanes.run(chat.num_characters(), lambda: chat_asked(chat, "resp_"))
            handles = _submit(engine, asked)
            if body.stream:
                headers = headers_of(Span.begin(clock.read())) | {"cache-control": "no-cache"}
                events = responses.events(asked, body, _remembered(asked, _each(handles)))
                return _Stream(handles, events, headers | dict(asked.headers))
            result = (await _all(handles))[0]
            content = _json(responses.whole(asked, body, result))
            _remember(asked, result)
            headers = headers_of(result.weights) | dict(asked.headers)
            return Response(content, media_type="application/json", headers=headers)

        found = await while_connected(request, answer())
        return Response(status_code=CLIENT_LEFT) if found is None else found

    def _remembered(
        asked: Asked, events: AsyncGenerator[tuple[int, Event]]
    ) -> AsyncGenerator[tuple[int, Event]]:
        """A stream's events; from now on its answer is known, with the text that has passed."""
        telling = memory.tell(asked.id, asked.prompt, clock.read().version)
        how = asked.choices[0].asking
        scanner = None if how is None else how.scanner()  # what may be a call is not said yet

        async def passing() -> AsyncGenerator[tuple[int, Event]]:
            async for i, event in events:
                if i == 0 and isinstance(event, Delta):
                    telling.add(event.text if scanner is None else scanner.feed(event.text))
                if i == 0 and isinstance(event, Finished) and event.result.error is None:
                    _remember(asked, event.result)
                yield i, event

        return passing()

    async def _serve(request: Request, body: AnyRequest, size: int, work: Callable[[], Asked]) -> Response:
        check_model(body.model)

        async def answer() -> Response:
            asked = await lanes.run(size, work)
            handles = _submit(engine, asked)
            if body.stream:
                return _streamed(handles, asked, body)
            results = await _all(handles)
            scored = sum(len(r.prompt_tokens) + len(r.tokens) for r in results)
            written = scored * CHARACTERS_PER_SCORED_TOKEN * (1 + (asked.choices[0].request.logprobs or 0))
            content = await lanes.run(written, lambda: _json(_whole(asked, results, body.n)))
            _remember(asked, results[0])
            span = merged([r.weights for r in results])
            headers = headers_of(span) | dict(asked.headers)
            return Response(content, media_type="application/json", headers=headers)

        # a stream looks for its client's leaving by itself
        found = await while_connected(request, answer())
        return Response(status_code=CLIENT_LEFT) if found is None else found

    def _streamed(handles: list[GenerationHandle], asked: Asked, body: AnyRequest) -> Response:
        headers = headers_of(Span.begin(clock.read())) | {"cache-control": "no-cache"} | dict(asked.headers)
        return _Stream(handles, _events(handles, asked, body), headers)

    def _remember(asked: Asked, result: GenerationResult) -> None:
        version = result.weights.last.version if result.weights is not None else ""
        said = Said(asked.prompt, result.text, version, result.finish_reason)
        how = asked.choices[0].asking
        calls = asked.has_calls or (how is not None and bool(how.read(result.text)[1]))
        memory.remember(asked.id, Unread(b"", b"", _more_than_text) if calls else said)

    def _whole(asked: Asked, results: Sequence[GenerationResult], n: int) -> dict[str, Any]:
        choices = [c.whole(r) for c, r in zip(asked.choices, results, strict=True)]
        span = merged([r.weights for r in results])
        body = {**asked.head(stream=False), "choices": choices, "usage": usage_of(results, n)}
        return {**body, **stamps(span)}

    async def _events(
        handles: list[GenerationHandle], asked: Asked, body: AnyRequest
    ) -> AsyncGenerator[bytes]:
        events = _remembered(asked, _each(handles))
        fingerprint = {"system_fingerprint": clock.read().version}
        head = asked.head(stream=True)
        results: dict[int, GenerationResult] = {}

        def chunk(choice: dict[str, Any], **more: Any) -> bytes:
            return _sse({**head, **fingerprint, "choices": [choice], **more})

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
                yield _sse(error_body(e))
                return
            if (piece := choice.calls()) is not None:
                yield chunk(piece)
            yield chunk(choice.piece("", (), finish), **stamps(event.result.weights))
        if body.stream_options is not None and body.stream_options.include_usage:
            usage = usage_of([results[i] for i in range(len(handles))], body.n)
            yield _sse({**head, **fingerprint, "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    return routes


# ------------------------------------------------------------------------------------------------ requests


def _more_than_text(asked: bytes | bytearray, said: bytes | bytearray) -> Said:
    raise BadInput(
        "this completion cannot be corrected: it calls tools, or its conversation does",
        "corrections hold plain turns: POST /v1/corrections takes a conversation of these",
    )


def _sampled(body: AnyRequest, defaults: SamplingDefaults | None, index: int) -> dict[str, Any]:
    """The fields of a request that say how it is sampled; the i-th answer to a prompt has a seed of its own."""
    own = defaults or SamplingDefaults()

    def chosen(name: str) -> Any:
        given = getattr(body, name)
        return getattr(own, name) if given is None else given

    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {
        **{name: chosen(name) for name in names},
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logit_bias": body.logit_bias,
        "seed": None if body.seed is None else body.seed + index,
        "stop": tuple(body.stop),
        "stop_token_ids": tuple(body.stop_token_ids),
        "ignore_eos": body.ignore_eos,
    }


def _chat_request(
    body: ChatCompletionRequest,
    ids: list[int],
    how: Asking,
    defaults: SamplingDefaults | None,
    index: int,
) -> GenerationRequest:
    return GenerationRequest(
        ids,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        shape=how.shape,
        marks=how.marks,
        **_sampled(body, defaults, index),
    )


def _text_request(
    body: CompletionRequest, ids: list[int], defaults: SamplingDefaults | None, index: int
) -> GenerationRequest:
    score = body.echo and body.logprobs is not None and len(ids) > 1
    return GenerationRequest(
        ids,
        max_tokens=DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        score_from=1 if score else None,
        **_sampled(body, defaults, index),
    )


def _submit(engine: Engine, asked: Asked) -> list[GenerationHandle]:
    """All choices' requests, or none."""
    handles: list[GenerationHandle] = []
    try:
        for choice in asked.choices:
            handles.append(engine.submit(choice.request))
    except SecondnatureError:
        _cancel(handles)
        raise
    return handles


# ------------------------------------------------------------------------------------------------ answers


def _cancel(handles: Sequence[GenerationHandle]) -> None:
    for handle in handles:
        if not handle.done:
            handle.cancel()


async def _all(handles: Sequence[GenerationHandle]) -> list[GenerationResult]:
    """Every whole answer, in order; when one fails, or nobody waits any more, the others are cancelled."""
    try:
        return await asyncio.gather(*(handle.answer() for handle in handles))
    finally:
        _cancel(handles)


async def _each(handles: Sequence[GenerationHandle]) -> AsyncGenerator[tuple[int, Event]]:
    """The events of all choices as they come, each with the choice's index."""
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def read(index: int, handle: GenerationHandle) -> None:
        async for event in handle.stream():
            queue.put_nowait((index, event))

    reading = [asyncio.create_task(read(i, handle)) for i, handle in enumerate(handles)]
    left = len(handles)
    try:
        while left:
            index, event = await queue.get()
            left -= isinstance(event, Finished)
            yield index, event
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


class _Stream(StreamingResponse):
    """A stream whose requests end with it, also where its client left before the first piece."""

    def __init__(
        self, handles: Sequence[GenerationHandle], events: AsyncGenerator[bytes], headers: dict[str, str]
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._handles = handles

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel(self._handles)


def _json(payload: dict[str, Any]) -> bytes:
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()


def _sse(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n"
