"""The OpenAI-compatible routes of the local engine: models, chat completions, completions, responses (server).

What the official client sends works unchanged; what would change an answer and cannot be honoured is refused by
name, never silently ignored. Every answer is stamped with the weights that gave it: `weights_version`,
`weights_span`, `trial` and `system_fingerprint` in the body, `x-weights-version`, `x-weights-span` and
`x-weights-trial` in the headers (a stream says there what it began with, and in its last chunk what it saw).

The event loop computes nothing: large bodies are read, texts rendered, measured and encoded in lanes beside it, and
so are answers with many log-probabilities. A client that leaves takes its request with it, all of its choices.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Collection
from typing import Any, Protocol

from fastapi import APIRouter, Request, Response

from secondnature.engines.base import Engine
from secondnature.engines.generation import (
    Delta,
    Event,
    Finished,
    GenerationRequest,
    GenerationResult,
    Span,
)
from secondnature.engines.local.text import vocabulary
from secondnature.engines.stamps import Clock
from secondnature.lessons.memory import Memory, Said, Telling
from secondnature.model.chat import encode_chat, encode_text
from secondnature.model.defaults import SamplingDefaults
from secondnature.records import CalledFunction, ToolCall
from secondnature.web.bodies import reading
from secondnature.web.choices import Asked, Choice, ChoicesForm
from secondnature.web.lanes import Lanes, while_connected
from secondnature.web.reading import Read
from secondnature.web.refusals import unknown_model
from secondnature.web.responses import ResponseForm
from secondnature.web.running import Running, Stream
from secondnature.web.stamps import headers_of, merged
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


class Form(Protocol):
    """How an answer is written down for the client that asked."""

    def whole(self, asked: Asked, results: list[GenerationResult]) -> dict[str, Any]:
        """The body of an answer that comes whole. Raises what ended one that did not come to its end."""
        ...

    def events(
        self, asked: Asked, events: AsyncGenerator[tuple[int, Event]], version: str
    ) -> AsyncGenerator[bytes]:
        """The pieces of a stream that began with these weights."""
        ...


class Completions:
    """Inference by one engine, as OpenAI's clients ask for it.

    Args:
        aliases: names that a request may call the model by, besides its own.
        defaults: how a request that does not say is sampled.
        ignore_tools: tools that the chat template does not show are accepted, and a header says so.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        memory: Memory,
        clock: Clock,
        model_name: str,
        *,
        aliases: Collection[str] = (),
        defaults: SamplingDefaults | None = None,
        ignore_tools: bool = False,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._memory = memory
        self._clock = clock
        self._model_name = model_name
        self._aliases = aliases
        self._defaults = defaults or SamplingDefaults()
        self._ignore_tools = ignore_tools
        self._started = int(time.time())
        self._lanes = Lanes()
        self._entry = vocabulary(tokenizer)

    def router(self) -> APIRouter:
        """The routes, for any FastAPI application."""
        routes = APIRouter(responses=ERRORS, route_class=reading())
        routes.add_api_route("/v1/models", self.models)
        routes.add_api_route("/v1/models/{model_id:path}", self.model)
        routes.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        routes.add_api_route("/v1/completions", self.completions, methods=["POST"])
        routes.add_api_route("/v1/responses", self.respond, methods=["POST"])
        return routes

    async def models(self) -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, model_id: str) -> dict[str, Any]:
        """The model by its name; another name is 404."""
        self._check_model(model_id)
        return self._card()

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """One answer to a conversation, or `n`; with `stream`, as server-sent events."""
        size = body.num_characters()
        return await self._answer(request, body, size, _choices(body), lambda: self._chat(body, "chatcmpl-"))

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue texts or token ids: one choice for each prompt and each of `n`."""
        size = sum(map(len, body.prompt))
        return await self._answer(request, body, size, _choices(body), lambda: self._texts(body))

    async def respond(self, body: ResponsesRequest, request: Request) -> Response:
        """A chat in OpenAI's newer form; with `stream`, as server-sent events."""
        chat = body.chat()
        size = chat.num_characters()
        return await self._answer(request, body, size, ResponseForm(body), lambda: self._chat(chat, "resp_"))

    # ---------------------------------------------------------------------------------------- what is asked

    def _card(self) -> dict[str, Any]:
        made = {"id": self._model_name, "object": "model", "created": self._started}
        of_ours = {
            "max_model_len": self._engine.limits.context,
            "weights_version": self._clock.read().version,
        }
        return {**made, "owned_by": "secondnature", **of_ours}

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model_name and name not in self._aliases:
            raise unknown_model(name, self._model_name)

    def _chat(self, body: ChatCompletionRequest, prefix: str) -> Asked:
        """A chat, ready for the engine; the id of its answer begins with `prefix`."""
        how = asking(self._engine, self._tokenizer, body, ignore_tools=self._ignore_tools)
        ids = encode_chat(
            self._tokenizer,
            how.messages,
            limit=self._engine.limits.context,
            tools=how.tools,
            template_options=body.template_options(),
        )
        choices = [
            Choice(i, _chat_request(body, ids, how, self._defaults, i), True, asking=how)
            for i in range(body.n)
        ]
        return Asked(
            prefix + secrets.token_hex(12),
            self._model_name,
            int(time.time()),
            True,
            choices,
            prompt=body.plain(),
            tools=how.tools,
            headers=how.headers,
            template_options=body.template_options(),
        )

    def _texts(self, body: CompletionRequest) -> Asked:
        """Texts and token ids, ready for the engine."""
        choices: list[Choice] = []
        wanted = body.response_format.wanted()
        shape = None if wanted is None else self._engine.shape(wanted)
        for prompt in body.prompt:
            if isinstance(prompt, str):
                ids = encode_text(self._tokenizer, prompt, limit=self._engine.limits.context)
                written = prompt
            else:
                ids, written = prompt, str(self._tokenizer.decode(prompt)) if body.echo else ""
            echoed = written if body.echo else None
            first = self._entry(ids[0]) if ids and body.echo else None
            for i in range(body.n):
                request = _text_request(body, ids, shape, self._defaults, i)
                choices.append(Choice(len(choices), request, False, echoed, first))
        return Asked("cmpl-" + secrets.token_hex(12), self._model_name, int(time.time()), False, choices)

    # --------------------------------------------------------------------------------------- what is answered

    async def _answer(
        self,
        request: Request,
        body: ChatCompletionRequest | CompletionRequest | ResponsesRequest,
        size: int,
        form: Form,
        ask: Callable[[], Asked],
    ) -> Response:
        """The answer to a request of so many characters, which `ask` makes ready, in its form."""
        self._check_model(body.model)

        async def answer() -> Response:
            asked = await self._lanes.run(size, ask)
            running = Running(self._engine, [choice.request for choice in asked.choices])
            return (
                self._stream(asked, running, form) if body.stream else await self._whole(asked, running, form)
            )

        # a stream looks for its client's leaving by itself
        found = await while_connected(request, answer())
        return Response(status_code=CLIENT_LEFT) if found is None else found

    async def _whole(self, asked: Asked, running: Running, form: Form) -> Response:
        results = await running.results()
        scored = sum(len(r.prompt_tokens) + len(r.tokens) for r in results)
        written = scored * CHARACTERS_PER_SCORED_TOKEN * (1 + (asked.choices[0].request.logprobs or 0))
        content = await self._lanes.run(written, lambda: _json(form.whole(asked, results)))
        self._remember(asked, results[0])
        headers = headers_of(merged([r.weights for r in results])) | dict(asked.headers)
        return Response(content, media_type="application/json", headers=headers)

    def _stream(self, asked: Asked, running: Running, form: Form) -> Response:
        stamp = self._clock.read()
        options, tools = asked.template_options, asked.tools
        telling = self._memory.tell(asked.id, asked.prompt, stamp.version, options, tools)
        events = form.events(asked, self._told(asked, telling, running.events()), stamp.version)
        return Stream(running, events, headers_of(Span.begin(stamp)) | dict(asked.headers))

    def _remember(self, asked: Asked, result: GenerationResult) -> None:
        version = result.weights.last.version if result.weights is not None else ""
        how = asked.choices[0].asking
        read = how.read(result.text) if how is not None else Read()
        said = Said(
            asked.prompt,
            read.text if read.calls else result.text,
            version,
            result.finish_reason,
            asked.template_options,
            [
                ToolCall(function=CalledFunction(name=call.name, arguments=call.arguments))
                for call in read.calls
            ],
            asked.tools,
        )
        self._memory.remember(asked.id, said)

    async def _told(
        self, asked: Asked, telling: Telling, events: AsyncGenerator[tuple[int, Event]]
    ) -> AsyncGenerator[tuple[int, Event]]:
        """A stream's events; the text that has passed is known, as its client has it."""
        how = asked.choices[0].asking
        reader = how.reader() if how is not None else None
        async for i, event in events:
            if i == 0 and isinstance(event, Delta):
                telling.add(event.text if reader is None else reader.feed(event.text).text)
            if i == 0 and isinstance(event, Finished) and event.result.error is None:
                self._remember(asked, event.result)
            yield i, event


def _choices(body: ChatCompletionRequest | CompletionRequest) -> ChoicesForm:
    usage = body.stream_options is not None and body.stream_options.include_usage
    return ChoicesForm(body.n, include_usage=usage)


def _sampled(
    body: ChatCompletionRequest | CompletionRequest, defaults: SamplingDefaults, index: int
) -> dict[str, Any]:
    """The fields of a request that say how it is sampled; the i-th answer to a prompt has a seed of its own."""

    def chosen(name: str) -> Any:
        given = getattr(body, name)
        return getattr(defaults, name) if given is None else given

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
    defaults: SamplingDefaults,
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
    body: CompletionRequest, ids: list[int], shape: Any, defaults: SamplingDefaults, index: int
) -> GenerationRequest:
    score = body.echo and body.logprobs is not None and len(ids) > 1
    return GenerationRequest(
        ids,
        max_tokens=DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        score_from=1 if score else None,
        shape=shape,
        **_sampled(body, defaults, index),
    )


def _json(payload: dict[str, Any]) -> bytes:
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()
