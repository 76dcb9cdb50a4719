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

Every turn of the loop reads at most `prefill_tokens` of waiting prompts and then makes one step of all running
rows: so a crowd or a long prompt slows the running streams by a bounded piece of work and never stalls them.
Users come first; background requests take the rows that are left, but never the last `reserved_rows`.

No lock is taken on the weights: the trainer may write during a forward (law 1). The weights clock is read before
and after each forward, and the span goes into the result (law 5). Nothing is cached beyond a request's own rows.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Self, cast

import torch
from torch import Tensor

from secondnature.engines.base import EngineMetrics, GenerationHandle, Limits, WeightsClock
from secondnature.engines.generation import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    Stamp,
    score_request,
)
from secondnature.engines.local.answer import Answer, not_finite
from secondnature.engines.local.grammar import Grammars, Shape
from secondnature.engines.local.rows import BatchRows
from secondnature.engines.local.sampling import Scored, finite_rows, sample, score
from secondnature.engines.local.text import decoder, vocabulary
from secondnature.errors import (
    BadExample,
    BadInput,
    Busy,
    Cancelled,
    ContextOverflow,
    SecondnatureError,
    Unreachable,
)
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
        on_step: Sequence[Callable[[Engine], None]] = (),
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
        self._model = model
        self._batch = BatchRows(model)
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
        self._clock: WeightsClock = clock or Unchanging()
        self._reserved = max_rows // 8 if reserved_rows is None else reserved_rows
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self._prefill_tokens = prefill_tokens
        self._max_held = max_held_tokens
        self._threads = threads
        self._on_step = list(on_step)
        self._running: list[Answer] = []
        """Row i of the batch belongs to job i."""
        self._waiting: dict[bool, deque[Answer]] = {False: deque(), True: deque()}
        """By `background`; guarded by `_wake`."""
        self._reading: dict[bool, tuple[Answer, BatchRows] | None] = {False: None, True: None}
        """By `background`: the long prompt that is being read piece by piece."""
        self._piece_next = {False: False, True: False}
        """By `background`: whether the long prompt has the next turn, or the short ones."""
        self._wake = threading.Condition()
        self._closing = self._draining = False
        self._trouble = ""
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
        return self._trouble

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
        handle = GenerationHandle(request, self._notify)
        decode = self._decode_marks(request.marks) if request.marks else self.decode
        job = Answer(handle, max_tokens, decode, self.entry, self.stop_ids)
        with self._wake:
            if self._trouble:
                raise Unreachable(self._trouble, "restart the server; its log says more")
            if self._closing:
                raise Unreachable("the engine is shutting down", "try again when the server is back")
            queue = self._waiting[request.background]
            if len(queue) >= self._max_waiting:
                self.metrics.refused += 1
                raise Busy(
                    f"{len(queue)} requests are waiting; at most {self._max_waiting} may", "try again later"
                )
            if queue and sum(len(j.request.prompt_ids) for j in queue) > self._max_waiting_tokens:
                self.metrics.refused += 1
                raise Busy(
                    f"the prompts that are waiting have over {self._max_waiting_tokens:,} tokens",
                    "try again later",
                )
            queue.append(job)
            self._wake.notify_all()
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
        window = max(1, min(2 * self.max_rows, self._max_waiting))
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
        with self._wake:
            self._closing, self._draining = True, drain
            self._wake.notify_all()
        if drain:
            self._thread.join(timeout_s)
            with self._wake:
                self._draining = False
                self._wake.notify_all()
        self._thread.join()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    # -------------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        error = Unreachable("the engine was shut down", "try again when the server is back")
        try:
            torch.set_num_threads(self._threads)
            with torch.inference_mode():
                while self._wait():
                    self._turn()
        except BaseException as e:  # noqa: BLE001  (nobody above would see it: whoever waits would wait for ever)
            _LOG.critical("the engine's thread ended", exc_info=e)
            error = Unreachable(f"the engine has ended: {type(e).__name__}: {e}", "restart the server")
            with self._wake:
                self._trouble = error.message
        for job in self._all_jobs():
            try:
                if job.handle.cancelled:
                    self._end(job, "cancelled", Cancelled("the request was cancelled"))
                self._end(job, "error", error)
            except Exception:  # noqa: BLE001  (the next one waits, too)
                _LOG.exception("a request could not be ended")
        self._forget()

    def _turn(self) -> None:
        try:
            self._drop_cancelled()
            self._read_prompts()
            self._step()
            self._count()
        except Exception as e:  # noqa: BLE001  (a fault of ours; without this every caller would hang)
            self._fail(self._all_jobs(), e)
            self._forget()
        for hook in self._on_step:
            try:
                hook(self)
            except Exception:  # noqa: BLE001
                _LOG.exception("a hook of the engine failed")

    def _forget(self) -> None:
        """Drop every row, after a failure or at the end."""
        self._running = []
        self._reading = {False: None, True: None}
        self._batch = BatchRows(self._model)
        self._count()

    def _all_jobs(self) -> list[Answer]:
        with self._wake:
            waiting = [job for queue in self._waiting.values() for job in queue]
            for queue in self._waiting.values():
                queue.clear()
        return waiting + [r[0] for r in self._reading.values() if r] + self._running

    def _wait(self) -> bool:
        """Sleep until there is work; False when it is time to end."""
        with self._wake:
            while True:
                busy = bool(self._running or any(self._waiting.values()) or any(self._reading.values()))
                if self._closing and not (busy and self._draining):
                    return False
                if busy:
                    return True
                self._wake.wait()

    def _drop_cancelled(self) -> None:
        error = Cancelled("the request was cancelled")
        with self._wake:
            gone = [job for queue in self._waiting.values() for job in queue if job.handle.cancelled]
            for job in gone:
                self._waiting[job.request.background].remove(job)
        for background, reading in self._reading.items():
            if reading is not None and reading[0].handle.cancelled:
                self._reading[background] = None
                gone.append(reading[0])
        gone += [job for job in self._running if job.handle.cancelled]
        for job in gone:
            self._end(job, "cancelled", error)
        self._let_go()

    def _let_go(self) -> None:
        """Free the rows of jobs that are done."""
        done = [i for i, job in enumerate(self._running) if job.done]
        if done:
            self._running = [self._running[i] for i in self._batch.remove(done)]

    # ---- prompts

    def _read_prompts(self) -> None:
        """One piece of work for the prompts that wait, users first."""
        for background in (False, True):
            if not self._piece_next[background] or self._reading[background] is None:
                group = self._take(background)
                if group:
                    self._piece_next[background] = True
                    self._read(group, BatchRows(self._model))
                    return
            reading = self._reading[background]
            if reading is not None:
                self._piece_next[background] = False
                self._read([reading[0]], reading[1])
                job = reading[0]
                if job.done or job.prompt_read:
                    self._reading[background] = None
                return

    def _held(self) -> Iterator[Answer]:
        yield from self._running
        yield from (r[0] for r in self._reading.values() if r)

    def _take(self, background: bool) -> list[Answer]:
        """Waiting requests whose prompts are read together now; starts a long prompt if none is being read."""
        held = list(self._held())
        rows, longest = len(held), max((job.need for job in held), default=0)
        limit = self.max_rows - (self._reserved if background else 0)
        group: list[Answer] = []
        taken: list[Answer] = []
        width = 0
        with self._wake:
            queue = self._waiting[background]
            for job in islice(queue, 2 * self.max_rows):
                length = len(job.ids)
                long = length > self._prefill_tokens
                if long and self._reading[background] is not None:
                    continue
                after, columns = rows + len(taken) + 1, max(longest, job.need)
                if after > limit or (after > 1 and after * columns > self._max_held):
                    break
                if long:
                    self._reading[background] = (job, BatchRows(self._model))
                else:
                    width = max(width, length)
                    if (len(group) + 1) * width > self._prefill_tokens:
                        break
                    group.append(job)
                taken.append(job)
                longest = columns
            for job in taken:
                queue.remove(job)
        return group

    def _read(self, jobs: list[Answer], rows: BatchRows) -> None:
        """Read the (next piece of the) prompts; jobs whose prompt is complete get their first token and join."""
        try:
            joining = self._read_piece(jobs, rows)
        except Exception as e:  # noqa: BLE001
            self._fail(jobs, e)
            return
        try:
            self._batch.append(rows, joining)
            self._running += [jobs[i] for i in joining]
        except Exception as e:  # noqa: BLE001
            self._fail([*self._running, *jobs], e)
            self._running, self._batch = [], BatchRows(self._model)

    def _read_piece(self, jobs: list[Answer], rows: BatchRows) -> list[int]:
        """One forward over prompts. Returns the indices of the jobs that go on generating."""
        parts = [j.ids[j.read : j.read + self._prefill_tokens] for j in jobs]
        first = [max(j.read, (j.score_from or 0) - 1) for j in jobs]
        keep = 1
        for job, part, begin in zip(jobs, parts, first, strict=True):
            job.read += len(part)
            if job.score_from is not None:
                keep = max(keep, job.read - begin)
        logits = self._stamped(jobs, lambda: rows.prefill(parts, keep))
        self.metrics.prompt_tokens += sum(map(len, parts))
        for i, job in enumerate(jobs):
            if job.score_from is not None:
                # column `keep - (job.read - p)` holds the logits of position p, which predict token p + 1
                end = min(job.read, len(job.request.prompt_ids) - 1)
                columns = logits[i, keep - (job.read - first[i]) : keep - (job.read - end)]
                self._score_prompt(job, columns, job.request.prompt_ids[first[i] + 1 : end + 1])
        ready = [i for i, j in enumerate(jobs) if not j.done and j.prompt_read]
        for i in ready:
            jobs[i].prompt_scored()
            if jobs[i].max_tokens == 0:
                self._end(jobs[i], "length")
        ready = [i for i in ready if not jobs[i].done]
        if ready:
            self._consume([jobs[i] for i in ready], logits[ready, -1])
        return [i for i in ready if not jobs[i].done]

    def _score_prompt(self, job: Answer, logits: Tensor, tokens: Sequence[int]) -> None:
        """logits: [T, V] for T tokens of the prompt."""
        if not tokens:
            return
        if not all(finite_rows(logits)):
            self._end(job, "error", not_finite())
            return
        job.add_prompt(score(logits, tokens, job.request.logprobs or 0))

    # ---- answers

    def _step(self) -> None:
        """One more token for every running row."""
        if not self._running:
            return
        self._set_back()
        jobs = self._running
        try:
            logits = self._stamped(jobs, lambda: self._batch.step([j.token_ids[-1] for j in jobs]))
            self.metrics.steps += 1
            self._consume(jobs, logits)
            self._let_go()
        except Exception as e:  # noqa: BLE001
            self._fail(jobs, e)
            self._running, self._batch = [], BatchRows(self._model)

    def _set_back(self) -> None:
        """Rows hold what they hold, not what they might: where they grow beyond the memory, the newest give way.

        They wait, first in the queue, and go on where they were when there is room.
        """
        while len(self._running) > 1:
            held = list(self._held())
            if len(held) * (max(job.held for job in held) + 1) <= self._max_held:
                return
            newest = max(self._running, key=lambda job: (job.request.background, job.submitted_at))
            order = self._batch.remove([self._running.index(newest)])
            self._running = [self._running[i] for i in order]
            newest.set_back()
            self.metrics.set_back += 1
            with self._wake:
                self._waiting[newest.request.background].appendleft(newest)

    def _stamped(self, jobs: Sequence[Answer], forward: Callable[[], Tensor]) -> Tensor:
        """Run a forward between two looks at the weights clock."""
        stamp = self._clock.read()
        for job in jobs:
            job.see(stamp)
        logits = forward()
        if logits.is_cuda:  # a kernel that is still to run may read what is written after the next look
            torch.cuda.current_stream(logits.device).synchronize()
        stamp = self._clock.read()
        for job in jobs:
            job.see(stamp)
        return logits

    def _consume(self, jobs: Sequence[Answer], logits: Tensor) -> None:
        """Draw the next token of each job from its row of logits [B, V] and send what it settles."""
        finite = finite_rows(logits)
        for job, good in zip(jobs, finite, strict=True):
            if not good:
                self._end(job, "error", not_finite())
        if not all(finite):
            logits = logits[[i for i, good in enumerate(finite) if good]]
            jobs = [job for job, good in zip(jobs, finite, strict=True) if good]
        if not jobs:
            return
        tokens = sample(self._shaped(jobs, logits), [job.sampler for job in jobs])
        scored: dict[int, Scored] = {}
        asked = [i for i, job in enumerate(jobs) if job.request.logprobs is not None]
        if asked:
            top = max(jobs[i].request.logprobs or 0 for i in asked)
            scored = dict(zip(asked, score(logits[asked], [tokens[i] for i in asked], top), strict=True))
        now = time.perf_counter()
        for i, job in enumerate(jobs):
            if job.done or not self._follows(job, tokens[i]):
                continue
            histogram = self.metrics.time_per_token if job.token_ids else self.metrics.time_to_first_token
            histogram.add(now - job.last_at)
            job.last_at = now
            job.accept(tokens[i], scored.get(i))
            if job.result is not None:
                self.metrics.requests[job.result.finish_reason] += 1
        self.metrics.completion_tokens += len(jobs)

    def _shaped(self, jobs: Sequence[Answer], logits: Tensor) -> Tensor:
        """Logits [B, V] without the tokens that an answer's shape forbids; a job whose shape fails is ended."""
        shaped = [i for i, job in enumerate(jobs) if job.shape is not None]
        if not shaped:
            return logits
        logits = logits.clone()  # the model's own are still to be reported
        for i in shaped:
            try:
                cast(Shape, jobs[i].shape).mask(logits[i])
            except BadInput as e:
                self._end(jobs[i], "error", e)
        return logits

    def _follows(self, job: Answer, token: int) -> bool:
        """Tell the job's shape, if it has one, which token came; False: the job has ended over it."""
        try:
            if job.shape is not None:
                job.shape.take(token)
        except BadInput as e:
            self._end(job, "error", e)
        return not job.done

    def _fail(self, jobs: Sequence[Answer], cause: Exception) -> None:
        """End the jobs that an exception hit; the others and the engine go on."""
        _LOG.error("a forward of %d requests failed", len(jobs), exc_info=cause)
        error = (
            cause
            if isinstance(cause, SecondnatureError)
            else SecondnatureError(
                f"generation failed: {type(cause).__name__}: {cause}", "the server goes on; try again"
            )
        )
        for job in jobs:
            self._end(job, "error", error)

    def _end(self, job: Answer, how: FinishReason, error: SecondnatureError | None = None) -> None:
        """End a job if it has not ended, and count it."""
        if not job.done:
            self.metrics.requests[how] += 1
            job.finish(how, error=error)

    def _count(self) -> None:
        self.metrics.running = sum(1 for _ in self._held())
        self.metrics.waiting = sum(map(len, self._waiting.values()))
