# pyright: reportMissingImports=false
"""vLLM as what answers probes: through the client that the requests of users take (vLLM's API server).

A request of ours is a coroutine on vLLM's loop, which only waits; nothing here computes there. Probes stay in the
background: while users are being answered, only a few of them are in the engine at a time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from secondnature.engines.base import GenerationHandle, Limits
from secondnature.engines.generation import (
    Finished,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    Span,
    TokenLogprob,
)
from secondnature.engines.stamps import Clock
from secondnature.errors import (
    BadExample,
    BadInput,
    ContextOverflow,
    NonFinite,
    SecondnatureError,
    Unreachable,
)
from secondnature.model.thoughts import Thoughts

__all__ = ["VllmEngine"]

LOG = logging.getLogger("secondnature")
AT_ONCE = 64
"""Background requests in the engine while no user waits; it batches as many as it has been told to."""
AT_ONCE_UNDER_LOAD = 8
LEAST_TEMPERATURE = 0.01
"""vLLM takes what is below, and not 0, for this."""


class VllmEngine:
    """Answers `GenerationRequest`s with a running vLLM. `submit` is safe from any thread but the loop's."""

    def __init__(
        self,
        client: Any,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        *,
        vocab_size: int,
        max_context: int,
        load: Callable[[], int],
        priorities: bool,
    ) -> None:
        """Nothing is started.

        Args:
            client: vLLM's `EngineClient`.
            loop: on which it lives.
            clock: tells which weights there are.
            vocab_size: ids of prompts are below this.
            max_context: prompt and answer together, in tokens.
            load: how many requests of users are being answered now.
            priorities: the scheduler knows them (`--scheduling-policy priority`): ours come last.
        """
        self._client = client
        self._loop = loop
        self._clock = clock
        self._load = load
        self._priority = 1 if priorities else 0
        self._inside = 0
        """Ours in the engine; changed on the loop only."""
        self._turns: deque[asyncio.Future[None]] = deque()
        """Those that wait to be let in, oldest first; changed on the loop only."""
        self.limits = Limits(vocab_size, max_context, AT_ONCE, frozenset({"score"}))
        self.trouble = ""

    def shape(self, schema: Mapping[str, Any], thoughts: Thoughts | None = None) -> Any:
        """None here: vLLM's own routes shape answers. Raises BadInput."""
        raise BadInput("an answer of a given shape was asked for", "ask vLLM's own routes for it")

    def submit(self, request: GenerationRequest) -> GenerationHandle:
        """Queue a request.

        Raises:
            BadExample: no prompt, or ids outside the vocabulary.
            ContextOverflow: prompt and answer do not fit.
            BadInput: another field is out of range.
            Unreachable: the server is shutting down.
        """
        request.check()
        request.check_ids(self.limits.vocab_size)
        ids = request.prompt_ids
        if not ids or min(ids) < 0 or max(ids) >= self.limits.vocab_size:
            raise BadExample(
                f"{len(ids)} token ids; expected at least one, all from 0 to {self.limits.vocab_size - 1}",
                "use this model's tokenizer",
            )
        room = self.limits.context - len(ids)
        answer = max(room, 1) if request.max_tokens is None else request.max_tokens
        if answer > room:
            raise ContextOverflow(
                f"This model's maximum context length is {self.limits.context} tokens; found a prompt of "
                f"{len(ids)} and an answer of {answer}: {len(ids) + answer} tokens",
                "shorten it, or start vLLM with a longer --max-model-len",
            )
        _refuse_what_vllm_cannot(request)
        if self._loop.is_closed():
            raise self._ended()
        running: list[asyncio.Task[None]] = []

        def wake() -> None:  # somebody cancelled it
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in running])

        handle = GenerationHandle(request, wake)
        starting = self._drive(handle, answer, running)
        try:
            driving = asyncio.run_coroutine_threadsafe(starting, self._loop)
        except RuntimeError:
            starting.close()
            raise self._ended() from None

        def see(_: object) -> None:  # a task that is cancelled before its first step never takes it
            if not handle.done:
                handle.emit(Finished(_ended(request, "error", self._ended())))

        driving.add_done_callback(see)
        return handle

    def load_changed(self) -> None:
        """The number of users' requests is another one: who waits may be let in. Called on the loop."""
        if self._turns:
            self._let_in()

    def _let_in(self) -> None:
        while self._turns and self._inside < (AT_ONCE_UNDER_LOAD if self._load() else AT_ONCE):
            turn = self._turns.popleft()
            if not turn.done():  # else it was cancelled
                self._inside += 1
                turn.set_result(None)

    async def _drive(
        self, handle: GenerationHandle, max_tokens: int, running: list[asyncio.Task[None]]
    ) -> None:
        """One request, to its `Finished`, whatever happens. From its first step on `running` cancels it."""
        task = asyncio.current_task()
        assert task is not None, "it is run as a task"
        running.append(task)
        turn: asyncio.Future[None] = self._loop.create_future()
        try:
            if handle.cancelled:
                raise asyncio.CancelledError
            self._turns.append(turn)
            self._let_in()
            await turn
            result = await self._ask(handle.request, max_tokens)
        except asyncio.CancelledError:
            gone = None if handle.cancelled else self._ended()  # the loop ends, and everything on it
            result = _ended(handle.request, "error" if gone else "cancelled", gone)
        except SecondnatureError as e:
            result = _ended(handle.request, "error", e)
        except Exception as e:  # noqa: BLE001  (whatever vLLM raises: without a Finished the prober would wait for ever)
            LOG.warning("a probe failed: %r", e)
            error = SecondnatureError(
                f"vLLM could not answer: {type(e).__name__}: {e}", "see the server's log"
            )
            result = _ended(handle.request, "error", error)
        finally:
            if turn.done() and not turn.cancelled():
                self._inside -= 1
                self._let_in()
            else:
                turn.cancel()
        handle.emit(Finished(result))

    def _ended(self) -> Unreachable:
        return Unreachable("the server is shutting down", "start it again")

    async def _ask(self, request: GenerationRequest, max_tokens: int) -> GenerationResult:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        scoring = request.score_from is not None
        params = SamplingParams(
            max_tokens=max(1, max_tokens),  # vLLM generates at least one; it is dropped below
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed if request.temperature > 0 else None,
            top_k=max(request.top_k, 0),
            min_p=request.min_p,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=request.repetition_penalty,
            logit_bias=dict(request.logit_bias) or None,
            stop=list(request.stop),
            stop_token_ids=list(request.stop_token_ids),
            prompt_logprobs=(request.logprobs or 0) if scoring else None,
            ignore_eos=request.ignore_eos,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        span = Span.begin(self._clock.read())
        last: Any = None
        async for output in self._client.generate(
            {"prompt_token_ids": list(request.prompt_ids)},
            params,
            request_id=f"secondnature-{secrets.token_hex(8)}",
            priority=self._priority,
        ):
            last = output
        span = span.seen(self._clock.read())
        if last is None or not last.outputs:
            raise SecondnatureError("vLLM ended a probe without an answer", "see the server's log")
        answer = last.outputs[0]
        scored: list[TokenLogprob] = []
        if scoring:
            assert request.score_from is not None
            scored = _scores(last.prompt_logprobs, request.prompt_ids, request.score_from)
        return GenerationResult(
            text="" if max_tokens == 0 else str(answer.text),
            token_ids=[] if max_tokens == 0 else list(answer.token_ids),
            finish_reason="stop" if answer.finish_reason == "stop" else "length",
            num_prompt_tokens=len(request.prompt_ids),
            prompt_tokens=scored,
            stop_reason=_met(answer),
            weights=span,
        )


def _refuse_what_vllm_cannot(request: GenerationRequest) -> None:
    """Fields that vLLM has not, or would take for others without a word. Raises BadInput."""
    t, seed = request.temperature, request.seed
    penalties = {name: getattr(request, name) for name in ("presence_penalty", "frequency_penalty")}
    own_routes = "ask vLLM's own routes for it"
    refusals = (
        ("logprobs", bool(request.logprobs), "alternatives", own_routes),
        ("logprobs", request.logprobs is not None and request.score_from is None, "of an answer", own_routes),
        ("shape", request.shape is not None, "of an answer", own_routes),
        ("marks", bool(request.marks), "in the text of an answer", own_routes),
        (
            "temperature",
            0 < t < LEAST_TEMPERATURE or t > 2,
            f"{t:g}",
            f"expected 0, or {LEAST_TEMPERATURE} to 2",
        ),
        *((name, abs(x) > 2, f"{x:g}", "expected -2 to 2") for name, x in penalties.items()),
        ("seed", seed is not None and not 0 <= seed < 2**63, f"{seed}", "expected 0 to 2^63 - 1"),
    )
    for name, wrong, found, hint in refusals:
        if wrong:
            raise BadInput(f"{name}: {found}; vLLM does not do that for us", hint).about(name)


def _scores(found: Any, ids: list[int], start: int) -> list[TokenLogprob]:
    """vLLM's log-probabilities of the prompt's tokens from `start` on. Raises NonFinite."""
    scored: list[TokenLogprob] = []
    for i in range(start, len(ids)):
        entry = found[i][ids[i]]
        if not math.isfinite(entry.logprob):
            raise NonFinite(f"the log-probability of token {i} is {entry.logprob}", "the weights are damaged")
        scored.append(TokenLogprob(ids[i], entry.decoded_token or "", float(entry.logprob)))
    return scored


def _met(answer: Any) -> str | int | None:
    """The stop string or the end token that was met; vLLM does not say which, where it is the tokenizer's own."""
    ends = answer.finish_reason == "stop" and answer.stop_reason is None and len(answer.token_ids) > 0
    return int(answer.token_ids[-1]) if ends else answer.stop_reason


def _ended(
    request: GenerationRequest, how: FinishReason, error: SecondnatureError | None
) -> GenerationResult:
    return GenerationResult(
        text="", token_ids=[], finish_reason=how, num_prompt_tokens=len(request.prompt_ids), error=error
    )
