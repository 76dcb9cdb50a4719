"""The generation engine of the local server: continuous batching in one thread (process A, no HTTP).

    engine = Engine(model, tokenizer, clock=clock)          # starts its thread; a context manager
    handle = engine.submit(GenerationRequest(prompt_ids, max_tokens=64, temperature=0.0, stop=("\\n",)))
    handle.result()                                         # or: for event in handle
    async for event in handle.stream(): ...                 # Delta(text, tokens)..., Finished(result)
    handle.cancel()                                         # the row is free at the next turn
    engine.generate([request, ...])                         # many, in order, blocking
    engine.score([(context_ids, continuation_ids), ...])    # teacher-forced log-probabilities, blocking
    engine.metrics                                          # plain numbers
    engine.close(drain=True)

`submit` raises ContextOverflow, BadExample, BadInput, Busy or Unreachable at once; later failures are in
the result.

Here is the side of those who ask, and the thread's life; what waits is in `waiting`, what the thread does in
`turns`. Users come first; background requests take the rows that are left, but never the last `reserved_rows`.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch

from secondnature.engines.base import EngineMetrics, GenerationHandle, Limits, WeightsClock
from secondnature.engines.generation import (
    GenerationRequest,
    GenerationResult,
    Stamp,
    score_request,
)
from secondnature.engines.local.answer import Answer
from secondnature.engines.local.grammar import Grammars, Shape
from secondnature.engines.local.text import decoder, vocabulary
from secondnature.engines.local.turns import Turns
from secondnature.engines.local.waiting import Waiting
from secondnature.errors import BadExample, Busy, Cancelled, ContextOverflow, Unreachable
from secondnature.model.load import context_limit
from secondnature.model.thoughts import Thoughts
from secondnature.model.turns import end_ids

__all__ = ["MAX_HELD_TOKENS", "Engine", "Unchanging"]

MAX_HELD_TOKENS = 262_144
"""Of all rows together, as long as the longest of them."""
_LOG = logging.getLogger(__name__)


class Unchanging:
    """The clock of weights that nobody writes."""

    def __init__(self, version: str = "") -> None:
        self._stamp = Stamp(0, version=version)

    def read(self) -> Stamp:
        """Always the same stamp."""
        return self._stamp


class Engine:
    """Continuous batching over one model; see the head of this file."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        clock: WeightsClock | None = None,
        max_rows: int = 64,
        reserved_rows: int | None = None,
        max_waiting: int = 1024,
        max_waiting_tokens: int = 2_000_000,
        prefill_tokens: int = 256,
        max_context: int | None = None,
        max_held_tokens: int = MAX_HELD_TOKENS,
        stop_ids: Iterable[int] | None = None,
        threads: int = 1,
        on_step: Sequence[Callable[[Engine], object]] = (),
    ) -> None:
        """Start the engine.

        Args:
            model: a transformers causal language model in eval mode; may be written meanwhile.
            tokenizer: its tokenizer.
            clock: tells which weights there are. None: they never change.
            max_rows: at most so many requests are generated at once.
            reserved_rows: rows that background requests never take (default: an eighth).
            max_waiting: at most so many wait, of each class; more are refused (Busy).
            max_waiting_tokens: once the waiting prompts of a class are longer together, more are refused (Busy).
            prefill_tokens: prompt tokens that are read between two steps of the running rows.
            max_context: lowers the model's context limit.
            max_held_tokens: bound of the K/V memory, rows times the longest row, as long as they are now.
            stop_ids: tokens that end an answer (default: `model.turns.end_ids`).
            threads: of torch, for this thread only. torch.set_num_threads sets the OpenMP team of the calling
                thread (and the default of threads that have not used torch yet), so it is called in ours.
            on_step: called in the engine's thread after every turn.

        Raises:
            UnsupportedModel: a layer's state cannot be batched here.
        """
        self.decode = decoder(tokenizer)
        self.entry = vocabulary(tokenizer)
        self.stop_ids = (
            end_ids(tokenizer, getattr(model, "generation_config", None))
            if stop_ids is None
            else frozenset(stop_ids)
        )
        limit = context_limit(model.config)
        self.max_context = min(limit, max_context or limit, max_held_tokens)
        self.vocab_size: int = model.config.get_text_config(decoder=True).vocab_size
        self.max_rows = max_rows
        self._decode_marks = functools.lru_cache(maxsize=8)(functools.partial(decoder, tokenizer))
        self._grammars = Grammars(tokenizer, self.vocab_size, self.stop_ids)
        self.metrics = EngineMetrics()
        self._waiting = Waiting(max_waiting, max_waiting_tokens)
        self._turns = Turns(
            model,
            self._waiting,
            clock or Unchanging(),
            self.metrics,
            max_rows=max_rows,
            reserved_rows=max_rows // 8 if reserved_rows is None else reserved_rows,
            prefill_tokens=prefill_tokens,
            max_held_tokens=max_held_tokens,
        )
        self._threads = threads
        self._on_step = list(on_step)
        self._thread = threading.Thread(target=self._run, name="secondnature-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------ the caller's threads

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def limits(self) -> Limits:
        """What it can take."""
        return Limits(
            self.vocab_size, self.max_context, self.max_rows, frozenset({"score", "logprobs", "shape"})
        )

    @property
    def trouble(self) -> str:
        """Why its thread ended before it was told to; empty while it works."""
        return self._waiting.trouble

    def shape(self, schema: Mapping[str, Any], thoughts: Thoughts | None = None) -> Shape:
        """The shape of the JSON that fits a schema, after the thoughts that may come first. Raises BadInput."""
        return self._grammars.compile(schema, thoughts)

    def submit(self, request: GenerationRequest) -> GenerationHandle:
        """Queue a request.

        Raises:
            BadExample: no prompt, or ids outside the vocabulary.
            ContextOverflow: prompt and answer do not fit.
            BadInput: another field is out of range.
            Busy: too many requests wait.
            Unreachable: the engine is closed.
        """
        request.check()
        request.check_ids(self.vocab_size)
        max_tokens = self._plan(request)
        handle = GenerationHandle(request, self._waiting.wake)
        decode = self._decode_marks(request.marks) if request.marks else self.decode
        job = Answer(handle, max_tokens, decode, self.entry, self.stop_ids)
        try:
            self._waiting.add(job)
        except Busy:
            self.metrics.refused += 1
            raise
        return handle

    def _plan(self, request: GenerationRequest) -> int:
        """The resolved `max_tokens` of a request that can be served."""
        ids = request.prompt_ids
        if not ids:
            raise BadExample("the prompt has no tokens; expected at least one", "send a text or token ids")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise BadExample(
                f"token id {bad} is outside the vocabulary; expected 0 to {self.vocab_size - 1}",
                "use this model's tokenizer",
            )
        room = self.max_context - len(ids)
        answer = request.max_tokens if request.max_tokens is not None else max(room, 1)
        if answer > room:
            raise ContextOverflow(
                f"This model's maximum context length is {self.max_context} tokens; found a prompt of {len(ids)} "
                f"and an answer of {answer}: {len(ids) + answer} tokens",
                "shorten the prompt or lower max_tokens",
            )
        return answer

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """All answers, in order; at most two batches' worth of them is in the queue at a time.

        Raises:
            SecondnatureError: the first failure; the other requests are cancelled.
        """
        handles: list[GenerationHandle] = []
        results: list[GenerationResult] = []
        window = max(1, min(2 * self.max_rows, self._waiting.max_requests))
        try:
            for request in requests:
                if len(handles) - len(results) >= window:
                    results.append(handles[len(results)].result())
                handles.append(self.submit(request))
            results += [handle.result() for handle in handles[len(results) :]]
        finally:
            for handle in handles[len(results) :]:
                handle.cancel()
        return results

    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, background: bool = True
    ) -> list[list[float]]:
        """Log-probability in nats of every continuation token, for each (context_ids, continuation_ids)."""
        requests = [score_request(c, t, background=background) for c, t in pairs]
        return [[token.logprob for token in result.prompt_tokens] for result in self.generate(requests)]

    def close(self, *, drain: bool = False, timeout_s: float | None = 30.0) -> None:
        """Stop: refuse new requests; cancel the rest, with `drain` only after they had `timeout_s` to end."""
        self._waiting.close(drain=drain)
        if drain:
            self._thread.join(timeout_s)
            self._waiting.close(drain=False)
        self._thread.join()

    # -------------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        error = Unreachable("the engine was shut down", "try again when the server is back")
        try:
            torch.set_num_threads(self._threads)
            with torch.inference_mode():
                while self._waiting.sleep(lambda: self._turns.busy):
                    self._turn()
        except BaseException as e:  # noqa: BLE001  (nobody above would see it: whoever waits would wait for ever)
            _LOG.critical("the engine's thread ended", exc_info=e)
            error = Unreachable(f"the engine has ended: {type(e).__name__}: {e}", "restart the server")
            self._waiting.fail(error.message)
        for job in self._all_jobs():
            try:
                if job.handle.cancelled:
                    self._turns.end(job, "cancelled", Cancelled("the request was cancelled"))
                self._turns.end(job, "error", error)
            except Exception:  # noqa: BLE001  (the next one waits, too)
                _LOG.exception("a request could not be ended")
        self._turns.forget()

    def _turn(self) -> None:
        try:
            self._turns.take()
        except Exception as e:  # noqa: BLE001  (a fault of ours; without this every caller would hang)
            self._turns.fail(self._all_jobs(), e)
            self._turns.forget()
        for hook in self._on_step:
            try:
                hook(self)
            except Exception:  # noqa: BLE001
                _LOG.exception("a hook of the engine failed")

    def _all_jobs(self) -> list[Answer]:
        return self._waiting.take_all() + self._turns.jobs()
