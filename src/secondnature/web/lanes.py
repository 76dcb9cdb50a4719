"""Work beside the event loop, which never computes: lanes for encoding, and answers that end with their client.

A lane is a thread or two with a queue: a hundred large texts at once wait for each other there, and nobody else
waits for them (server).
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from starlette.requests import Request

from secondnature.errors import Busy

__all__ = ["LARGE_CHARACTERS", "Lane", "Lanes", "while_connected"]

T = TypeVar("T")
LARGE_CHARACTERS = 20_000
"""A text from this length on goes into the lane of the large ones."""
MAX_LARGE_WAITING = 32


class Lane:
    """Runs calls on threads of its own, oldest first; they end with the lane, and no process waits for them."""

    def __init__(self, name: str, *, threads: int, max_waiting: int) -> None:
        self._name = name
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = threads
        self._max_waiting = max_waiting
        self._inside = 0
        self._started = False

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns; a call that is cancelled while it waits is never made.

        Raises:
            Busy: too many calls wait.
        """
        if self._inside >= self._threads + self._max_waiting:
            raise Busy(f"{self._inside} texts wait to be encoded", "try again later")
        self._start()
        future: Future[T] = Future()
        self._inside += 1
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: _told(loop, self._left))
        self._queue.put((future, work))
        return await asyncio.wrap_future(future)

    def _left(self) -> None:
        self._inside -= 1

    def _start(self) -> None:
        if self._started:
            return
        self._started = True
        for _ in range(self._threads):
            threading.Thread(target=_work, args=(self._queue,), name=self._name, daemon=True).start()
            weakref.finalize(self, self._queue.put, None)


def _told(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(what)


def _work(queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
    while (given := queue.get()) is not None:
        _do(*given)
        del given  # a text of megabytes is not kept until the next one comes


def _do(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as e:  # noqa: BLE001  (it belongs to whoever waits for the result)
        future.set_exception(e)


class Lanes:
    """The two lanes of a server: small texts never wait behind large ones."""

    def __init__(self) -> None:
        self._small = Lane("secondnature-encode", threads=2, max_waiting=4096)
        self._large = Lane("secondnature-encode-large", threads=1, max_waiting=MAX_LARGE_WAITING)

    async def run(self, characters: int, work: Callable[[], T]) -> T:
        """What `work` returns, done in the lane for texts of so many characters. Raises Busy."""
        return await (self._small if characters < LARGE_CHARACTERS else self._large).run(work)


async def while_connected(request: Request, answer: Coroutine[Any, Any, T]) -> T | None:
    """What `answer` returns; None where the client left before: then `answer` was cancelled.

    The request's body must have been read.
    """
    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else None
    finally:
        answering.cancel()
        leaving.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
