"""The requests that wait for a row, users' and background ones apart, and what wakes the engine (process A).

Any thread adds; the engine's thread takes. Bounded by number and by tokens: who would have to wait too long is told
at once. The end is told here too: whoever comes after it is refused, whatever the engine's thread has died of.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from secondnature.engines.local.answer import Answer
from secondnature.errors import Busy, Unreachable

__all__ = ["Waiting"]


class Waiting:
    """Two queues, by `background`."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        """Of each: at most so many requests; none more once their prompts are longer together than `max_tokens`."""
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.closing = False
        self.trouble = ""
        """Why nobody takes any more; empty: somebody does."""
        self._draining = False
        self._queues: dict[bool, deque[Answer]] = {False: deque(), True: deque()}
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, job: Answer) -> None:
        """Let one wait.

        Raises:
            Busy: too many do.
            Unreachable: nobody will take it.
        """
        with self._changed:
            if self.trouble:
                raise Unreachable(self.trouble, "restart the server; its log says more")
            if self.closing:
                raise Unreachable("the engine is shutting down", "try again when the server is back")
            queue = self._queues[job.request.background]
            if len(queue) >= self.max_requests:
                raise Busy(
                    f"{len(queue)} requests are waiting; at most {self.max_requests} may", "try again later"
                )
            if queue and sum(len(j.request.prompt_ids) for j in queue) > self.max_tokens:
                raise Busy(
                    f"the prompts that are waiting have over {self.max_tokens:,} tokens", "try again later"
                )
            queue.append(job)
            self._changed.notify_all()

    def put_back(self, job: Answer) -> None:
        """One that was taken waits again, before all others of its class."""
        with self._changed:
            self._queues[job.request.background].appendleft(job)

    def take(self, background: bool, choose: Callable[[Sequence[Answer]], Sequence[Answer]]) -> None:
        """Take those that `choose` picks of one class, of which it is given all, oldest first."""
        with self._changed:
            queue = self._queues[background]
            for job in choose(queue):
                queue.remove(job)

    def take_cancelled(self) -> list[Answer]:
        """Take those that nobody wants any more."""
        with self._changed:
            gone = [job for queue in self._queues.values() for job in queue if job.handle.cancelled]
            for job in gone:
                self._queues[job.request.background].remove(job)
        return gone

    def take_all(self) -> list[Answer]:
        """Take all."""
        with self._changed:
            found = [job for queue in self._queues.values() for job in queue]
            for queue in self._queues.values():
                queue.clear()
        return found

    def wake(self) -> None:
        """Something else has changed: the engine's thread looks."""
        with self._changed:
            self._changed.notify_all()

    def sleep(self, busy: Callable[[], bool]) -> bool:
        """Sleep until there is work, here or as `busy` says; False when it is time to end."""
        with self._changed:
            while True:
                works = busy() or len(self) > 0
                if self.closing and not (works and self._draining):
                    return False
                if works:
                    return True
                self._changed.wait()

    def close(self, *, drain: bool) -> None:
        """No more are let in; with `drain` those that were are still worked on."""
        with self._changed:
            self.closing, self._draining = True, drain
            self._changed.notify_all()

    def fail(self, trouble: str) -> None:
        """Nobody takes any more, and why."""
        with self._changed:
            self.trouble = trouble
