"""What an engine is: what it takes, the handle of a request under way, its numbers (process A). No torch.

A `GenerationHandle` can be read by the thread that asked (`result()`, iteration), by an asyncio task
(`async for event in handle.stream()`) or by a callback in the engine's thread; events that came before a reader
are replayed to it, so none is ever lost. Leaving `stream()` early cancels the request.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from secondnature.engines.generation import Event, Finished, GenerationRequest, GenerationResult, Stamp
from secondnature.model.thoughts import Thoughts

Ability = Literal["score", "logprobs", "shape"]


@dataclass(frozen=True)
class Limits:
    """What an engine can take."""

    vocab_size: int
    """Ids of prompts are below this."""
    context: int
    """Prompt and answer together, in tokens."""
    rows: int
    """Requests that it answers at once."""
    can: frozenset[Ability]
    """`score`: log-probabilities of a given text; `logprobs`: those of an answer, with alternatives; `shape`:
    answers that fit a JSON schema."""


class Engine(Protocol):
    """What answers requests: the local engine, or vLLM's behind an adapter."""

    @property
    def limits(self) -> Limits:
        """What it can take; never changes."""
        ...

    @property
    def trouble(self) -> str:
        """Why it answers no more; empty while it does."""
        ...

    def shape(self, schema: Mapping[str, Any], thoughts: Thoughts | None = None) -> Any:
        """The shape of the JSON that fits a schema, for `GenerationRequest.shape`; may take a second.

        Args:
            thoughts: that the answer may begin with; the JSON follows them.

        Raises:
            BadInput: this engine cannot, or the schema cannot be compiled.
        """
        ...

    def submit(self, request: GenerationRequest) -> GenerationHandle:
        """Queue a request.

        Raises:
            BadExample: no prompt, or ids outside the vocabulary.
            ContextOverflow: prompt and answer do not fit.
            BadInput: another field is out of range, or asks for what the engine cannot.
            Busy: too much waits.
            Unreachable: the engine is closed.
        """
        ...


class WeightsClock(Protocol):
    """Tells which weights there are; read before and after every forward, so it has to be cheap."""

    def read(self) -> Stamp:
        """The stamp of this moment."""
        ...


OnEvent = Callable[[Event], None]


class GenerationHandle:
    """A request under way."""

    def __init__(self, request: GenerationRequest, wake: Callable[[], None]) -> None:
        self.request = request
        self._wake = wake
        self._lock = threading.Condition()
        self._events: list[Event] = []
        self._readers: list[OnEvent] = []
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked for the end."""
        return self._cancelled

    @property
    def done(self) -> bool:
        """Whether the last event was sent."""
        with self._lock:
            return bool(self._events) and isinstance(self._events[-1], Finished)

    def cancel(self) -> None:
        """Give the row back at the engine's next turn; the result is `cancelled`. Harmless when done."""
        self._cancelled = True
        self._wake()

    def subscribe(self, on_event: OnEvent) -> None:
        """Call `on_event` for every event, past ones first; later from the engine's thread: return at once."""
        with self._lock:
            for event in self._events:
                on_event(event)
            self._readers.append(on_event)

    def emit(self, event: Event) -> None:
        """Send an event (the engine). A reader that raises is gone: it is dropped and the request cancelled."""
        with self._lock:
            self._events.append(event)
            for reader in list(self._readers):
                try:
                    reader(event)
                except Exception:  # noqa: BLE001  (whatever a reader does must not touch the other requests)
                    self._readers.remove(reader)
                    self._cancelled = True
            self._lock.notify_all()

    def __iter__(self) -> Iterator[Event]:
        """Every event, blocking; the last one is `Finished`."""
        position = 0
        while True:
            with self._lock:
                while len(self._events) <= position:
                    self._lock.wait()
                event = self._events[position]
            yield event
            if isinstance(event, Finished):
                return
            position += 1

    async def stream(self) -> AsyncGenerator[Event]:
        """Every event, for asyncio; leaving early (the client is gone) cancels the request."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()
        self.subscribe(lambda event: loop.call_soon_threadsafe(queue.put_nowait, event) and None)
        try:
            while True:
                event = await queue.get()
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            if not self.done:
                self.cancel()

    async def answer(self) -> GenerationResult:
        """Wait for the whole answer, for asyncio; being cancelled cancels the request.

        Raises:
            SecondnatureError: the request failed; the error says why.
        """
        async for event in self.stream():
            if isinstance(event, Finished):
                return self.result()
        raise AssertionError("the last event is Finished")

    def result(self, timeout_s: float | None = None) -> GenerationResult:
        """Wait for the whole answer.

        Raises:
            SecondnatureError: the request failed; the error says why.
            TimeoutError: not done in time.
        """
        with self._lock:
            if not self._lock.wait_for(
                lambda: self._events and isinstance(self._events[-1], Finished), timeout_s
            ):
                raise TimeoutError(f"no answer within {timeout_s} s")
            last = self._events[-1]
        assert isinstance(last, Finished)
        if last.result.finish_reason == "error":
            assert last.result.error is not None
            raise last.result.error
        return last.result


@dataclass
class Histogram:
    """Counts per bucket, as Prometheus wants them; seconds."""

    bounds: tuple[float, ...] = (
        *(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075),
        *(0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    )
    counts: list[int] = field(default_factory=lambda: [0] * 17)
    """One more than bounds: the last is everything above."""
    total_s: float = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """Count one observation (or several equal ones)."""
        index = next((i for i, bound in enumerate(self.bounds) if seconds <= bound), len(self.bounds))
        self.counts[index] += times
        self.total_s += seconds * times


@dataclass
class EngineMetrics:
    """Plain numbers; read by the server at any time."""

    requests: dict[str, int] = field(
        default_factory=lambda: {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
    )
    """Ended requests by finish reason."""
    refused: int = 0
    """Requests refused at the door because the queue was full."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    running: int = 0
    """Rows in use, prompts being read included."""
    waiting: int = 0
    set_back: int = 0
    """Answers that gave their row back for a while, because the rows grew beyond the memory for them."""
    steps: int = 0
    """Forwards of the running batch."""
    time_per_token: Histogram = field(default_factory=Histogram)
    """Between two tokens of one stream, as its reader sees it: reading other prompts included."""
    time_to_first_token: Histogram = field(default_factory=Histogram)
    """From submit to the first token."""
