"""What the engine's thread does in one turn: a piece of the waiting prompts, and a step of all rows (process A).

Every turn reads at most `prefill_tokens` of prompts, users' first, and then makes one step of all running rows: so
a crowd or a long prompt slows the running streams by a bounded piece of work and never stalls them. Used by one
thread.

No lock is taken on the weights: the trainer may write during a forward (law 1). The weights clock is read before
and after each forward, and the span goes into the result (law 5). Nothing is cached beyond a request's own rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from secondnature.engines.base import EngineMetrics, WeightsClock
from secondnature.engines.generation import FinishReason
from secondnature.engines.local.answer import Answer, not_finite
from secondnature.engines.local.grammar import Shape
from secondnature.engines.local.rows import BatchRows
from secondnature.engines.local.sampling import Scored, finite_rows, sample, score
from secondnature.engines.local.waiting import Waiting
from secondnature.errors import BadInput, Cancelled, SecondnatureError

__all__ = ["Turns"]

_LOG = logging.getLogger(__name__)
MIN_SAVED_TOKENS = 64
"""A forward of its own reads all weights once more: what that takes, in tokens of a longer one."""


class Turns:
    """The rows of one model, and what is done with them, turn by turn."""

    def __init__(
        self,
        model: Any,
        waiting: Waiting,
        clock: WeightsClock,
        metrics: EngineMetrics,
        *,
        max_rows: int,
        reserved_rows: int,
        prefill_tokens: int,
        max_held_tokens: int,
    ) -> None:
        """No row yet; the numbers are `Engine`'s.

        Raises:
            UnsupportedModel: a layer's state cannot be batched here.
        """
        self.metrics = metrics
        self.max_rows = max_rows
        self.max_held = max_held_tokens
        self._model = model
        self._waiting = waiting
        self._clock = clock
        self._reserved = reserved_rows
        self._prefill_tokens = prefill_tokens
        self._batch = BatchRows(model)
        self._running: list[Answer] = []
        """Row i of the batch belongs to job i."""
        self._reading: dict[bool, tuple[Answer, BatchRows] | None] = {False: None, True: None}
        """By `background`: the long prompt that is being read piece by piece."""
        self._piece_next = {False: False, True: False}
        """By `background`: whether the long prompt has the next turn, or the short ones."""

    @property
    def busy(self) -> bool:
        """Is there a row to go on with?"""
        return bool(self._running or any(self._reading.values()))

    def jobs(self) -> list[Answer]:
        """All that have a row, or will."""
        return [r[0] for r in self._reading.values() if r] + self._running

    def take(self) -> None:
        """One turn. What fails in a forward ends its requests; what is raised here is a fault of ours."""
        self._drop_cancelled()
        self._read_prompts()
        self._step()
        self._count()

    def forget(self) -> None:
        """Drop every row, after a failure or at the end."""
        self._running = []
        self._reading = {False: None, True: None}
        self._batch = BatchRows(self._model)
        self._count()

    def _drop_cancelled(self) -> None:
        error = Cancelled("the request was cancelled")
        gone = self._waiting.take_cancelled()
        for background, reading in self._reading.items():
            if reading is not None and reading[0].handle.cancelled:
                self._reading[background] = None
                gone.append(reading[0])
        gone += [job for job in self._running if job.handle.cancelled]
        for job in gone:
            self.end(job, "cancelled", error)
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

    def held(self) -> Iterator[Answer]:
        """Those that have rows, or get one piece by piece."""
        yield from self._running
        yield from (r[0] for r in self._reading.values() if r)

    def _take(self, background: bool) -> list[Answer]:
        """Waiting requests whose prompts are read together now; starts a long prompt if none is being read."""
        held = list(self.held())
        rows, longest = len(held), max((job.need for job in held), default=0)
        limit = self.max_rows - (self._reserved if background else 0)
        group: list[Answer] = []

        def choose(queue: Sequence[Answer]) -> list[Answer]:
            taken: list[Answer] = []
            columns = longest
            for job in islice(queue, 2 * self.max_rows):
                length = len(job.ids)
                long = length > self._prefill_tokens
                if long and self._reading[background] is not None:
                    continue
                after, wider = rows + len(taken) + 1, max(columns, job.need)
                if after > limit or (after > 1 and after * wider > self.max_held):
                    break
                if long:
                    self._reading[background] = (job, BatchRows(self._model))
                else:
                    if self._to_read([*group, job]) > self._prefill_tokens:
                        break
                    group.append(job)
                taken.append(job)
                columns = wider
            return taken

        self._waiting.take(background, choose)
        return group

    def _to_read(self, jobs: Sequence[Answer]) -> int:
        """Tokens that a forward over these whole prompts computes, padding included."""
        common = self._shared(jobs)
        return common + len(jobs) * (max(len(job.ids) for job in jobs) - common)

    def _shared(self, jobs: Sequence[Answer]) -> int:
        """How many tokens that all these prompts begin with are read once; 0 where it would not pay.

        Most chats begin with the same system prompt. It is read in this turn, with the weights that the rest is
        read with; nothing is kept for the next.
        """
        if len(jobs) < 2 or not self._batch.can_share or any(job.read for job in jobs):
            return 0
        first, last = min(job.ids for job in jobs), max(job.ids for job in jobs)
        most = min(job.last_unscored for job in jobs)
        same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        common = min(same, most)
        return common if (len(jobs) - 1) * common >= MIN_SAVED_TOKENS else 0

    def _read(self, jobs: list[Answer], rows: BatchRows) -> None:
        """Read the (next piece of the) prompts; jobs whose prompt is complete get their first token and join."""
        try:
            joining = self._read_piece(jobs, rows)
        except Exception as e:  # noqa: BLE001
            self.fail(jobs, e)
            return
        try:
            self._batch.append(rows, joining)
            self._running += [jobs[i] for i in joining]
        except Exception as e:  # noqa: BLE001
            self.fail([*self._running, *jobs], e)
            self._running, self._batch = [], BatchRows(self._model)

    def _read_piece(self, jobs: list[Answer], rows: BatchRows) -> list[int]:
        """One forward over prompts. Returns the indices of the jobs that go on generating."""
        parts = [j.ids[j.read : j.read + self._prefill_tokens] for j in jobs]
        common = self._shared(jobs)
        first = [max(j.read, (j.score_from or 0) - 1) for j in jobs]
        keep = 1
        for job, part, begin in zip(jobs, parts, first, strict=True):
            job.read += len(part)
            if job.score_from is not None:
                keep = max(keep, job.read - begin)
        logits = self._stamped(
            jobs, lambda: rows.prefill_sharing(parts, common, keep) if common else rows.prefill(parts, keep)
        )
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
                self.end(jobs[i], "length")
        ready = [i for i in ready if not jobs[i].done]
        if ready:
            self._consume([jobs[i] for i in ready], logits[ready, -1])
        return [i for i in ready if not jobs[i].done]

    def _score_prompt(self, job: Answer, logits: Tensor, tokens: Sequence[int]) -> None:
        """logits: [T, V] for T tokens of the prompt."""
        if not tokens:
            return
        if not all(finite_rows(logits)):
            self.end(job, "error", not_finite())
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
            self.fail(jobs, e)
            self._running, self._batch = [], BatchRows(self._model)

    def _set_back(self) -> None:
        """Rows hold what they hold, not what they might: where they grow beyond the memory, the newest give way.

        They wait, first in the queue, and go on where they were when there is room.
        """
        while len(self._running) > 1:
            held = list(self.held())
            if len(held) * (max(job.held for job in held) + 1) <= self.max_held:
                return
            newest = max(self._running, key=lambda job: (job.request.background, job.submitted_at))
            order = self._batch.remove([self._running.index(newest)])
            self._running = [self._running[i] for i in order]
            newest.set_back()
            self.metrics.set_back += 1
            self._waiting.put_back(newest)

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
                self.end(job, "error", not_finite())
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
                self.end(jobs[i], "error", e)
        return logits

    def _follows(self, job: Answer, token: int) -> bool:
        """Tell the job's shape, if it has one, which token came; False: the job has ended over it."""
        try:
            if job.shape is not None:
                job.shape.take(token)
        except BadInput as e:
            self.end(job, "error", e)
        return not job.done

    def fail(self, jobs: Sequence[Answer], cause: Exception) -> None:
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
            self.end(job, "error", error)

    def end(self, job: Answer, how: FinishReason, error: SecondnatureError | None = None) -> None:
        """End a job if it has not ended, and count it."""
        if not job.done:
            self.metrics.requests[how] += 1
            job.finish(how, error=error)

    def _count(self) -> None:
        self.metrics.running = sum(1 for _ in self.held())
        self.metrics.waiting = len(self._waiting)
