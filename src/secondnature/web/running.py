"""Requests to the engine that are one request of a client: begun together, read together, ended together (server).

A client that leaves takes all of them with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from secondnature.engines.base import Engine, GenerationHandle
from secondnature.engines.generation import Event, Finished, GenerationRequest, GenerationResult
from secondnature.errors import SecondnatureError

__all__ = ["Running", "Stream"]


class Running:
    """The answers to a client's request, while they come."""

    def __init__(self, engine: Engine, requests: Sequence[GenerationRequest]) -> None:
        """Submit all of them, or none. Raises what `Engine.submit` does."""
        self._handles: list[GenerationHandle] = []
        try:
            for request in requests:
                self._handles.append(engine.submit(request))
        except SecondnatureError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End those that have not ended."""
        for handle in self._handles:
            if not handle.done:
                handle.cancel()

    async def results(self) -> list[GenerationResult]:
        """Every whole answer, in order; when one fails, or nobody waits any more, the others are cancelled.

        Raises:
            SecondnatureError: why the first one failed.
        """
        try:
            return await asyncio.gather(*(handle.answer() for handle in self._handles))
        finally:
            self.cancel()

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """The events of all as they come, each with the number of its request."""
        queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        async def read(index: int, handle: GenerationHandle) -> None:
            async for event in handle.stream():
                queue.put_nowait((index, event))

        reading = [asyncio.create_task(read(i, handle)) for i, handle in enumerate(self._handles)]
        left = len(reading)
        try:
            while left:
                index, event = await queue.get()
                left -= isinstance(event, Finished)
                yield index, event
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)


class Stream(StreamingResponse):
    """Server-sent events whose requests end with them, also where the client left before the first."""

    def __init__(self, running: Running, events: AsyncGenerator[bytes], headers: dict[str, str]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={**headers, "cache-control": "no-cache"}
        )
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()
