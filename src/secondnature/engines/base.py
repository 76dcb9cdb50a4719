"""What is asked of the engine, and what it answers: requests, events, results, stamps (process A). No torch.

A `GenerationHandle` can be read by the thread that asked (`result()`, iteration), by an asyncio task
(`async for event in handle.stream()`) or by a callback in the engine's thread; events that came before a reader
are replayed to it, so none is ever lost. Leaving `stream()` early cancels the request.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from secondnature.errors import BadExample, BadInput, SecondnatureError

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Stamp:
    """Which weights there are at one moment."""

    epoch: int
    """Moves with every write and every undo; never repeats."""
    writing: bool = False
    """A write is going on."""
    version: str = ""
    """Content id of the weights (of the last whole state, while one is written)."""
    trial: bool = False
    """A lesson is running or on trial."""


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

    def shape(self, schema: Mapping[str, Any]) -> Any:
        """The shape of the JSON that fits a schema, for `GenerationRequest.shape`; may take a second.

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


@dataclass(frozen=True)
class Span:
    """Which weights gave an answer (law 5): the stamps around its first and its last forward."""

    first: Stamp
    last: Stamp
    changed: bool = False
    """A write happened or was going on between the two: no single version gave this answer."""
    trial: bool = False
    """A lesson was running or on trial at any of the stamps."""

    def seen(self, stamp: Stamp) -> Span:
        """The span, grown by a later stamp."""
        changed = self.changed or stamp.writing or stamp.epoch != self.last.epoch
        return Span(
            self.first, stamp, changed or stamp.version != self.last.version, self.trial or stamp.trial
        )

    @staticmethod
    def begin(stamp: Stamp) -> Span:
        """The span of a request whose first forward is about to begin."""
        return Span(stamp, stamp, stamp.writing, stamp.trial)


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to generate, or one text to score (`max_tokens=0` with `score_from`)."""

    prompt_ids: list[int]
    max_tokens: int | None = None
    """None: as many as the context still holds. 0: only score the prompt."""
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 and -1: all tokens."""
    min_p: float = 0.0
    """Least probability of a token, as a share of the most probable one's."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that the answer has."""
    frequency_penalty: float = 0.0
    """The same, for each time that it has it."""
    repetition_penalty: float = 1.0
    """Logits of tokens of prompt and answer are divided by it (negative ones multiplied)."""
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    """Added to the logits, by token id."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """They end the answer as the model's end token does, also with `ignore_eos`."""
    logprobs: int | None = None
    """None: no log-probabilities; k: of each token and its k best alternatives (at most 20)."""
    score_from: int | None = None
    """Report the log-probability of every prompt token from this index (>= 1) on."""
    background: bool = False
    """Probes and the like: gets the rows that users leave free."""
    ignore_eos: bool = False
    shape: Any = None
    """What the engine's `shape` made of a schema: the answer fits it, as far as `max_tokens` reaches."""
    marks: tuple[str, ...] = ()
    """Special tokens that stay in the text of the answer; the others are left out."""

    def check(self) -> None:
        """Raises: BadInput: a sampling field is out of its range."""
        problems = (
            (
                not 0 <= self.temperature < float("inf"),
                f"temperature is {self.temperature}; expected 0 or more",
            ),
            (not 0 < self.top_p <= 1, f"top_p is {self.top_p}; expected more than 0 and at most 1"),
            (self.top_k < -1, f"top_k is {self.top_k}; expected -1 or more"),
            (not 0 <= self.min_p <= 1, f"min_p is {self.min_p}; expected 0 to 1"),
            (
                not 0 < self.repetition_penalty < float("inf"),
                f"repetition_penalty is {self.repetition_penalty}; expected more than 0",
            ),
            (self.max_tokens is not None and self.max_tokens < 0, f"max_tokens is {self.max_tokens}"),
            (
                self.logprobs is not None and not 0 <= self.logprobs <= 20,
                f"logprobs is {self.logprobs}; 0 to 20",
            ),
            (
                self.score_from is not None and not 1 <= self.score_from <= len(self.prompt_ids),
                f"score_from is {self.score_from}; expected 1 to {len(self.prompt_ids)} (the prompt's length)",
            ),
        )
        for wrong, message in problems:
            if wrong:
                raise BadInput(message, "mend the request").about(message.split()[0])

    def check_ids(self, vocab_size: int) -> None:
        """Raises: BadInput: an id of `logit_bias` or `stop_token_ids` is none of the vocabulary."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
            if wrong is not None:
                raise BadInput(
                    f"{name}: token id {wrong} is outside the vocabulary; expected 0 to {vocab_size - 1}",
                    "use this model's tokenizer",
                ).about(name)


def score_request(
    context_ids: Sequence[int], continuation_ids: Sequence[int], *, top: int = 0, background: bool = False
) -> GenerationRequest:
    """The request that scores a continuation, teacher-forced: read `result.prompt_tokens`.

    Raises:
        BadExample: no context (the first token of a text has no log-probability) or no continuation.
    """
    if not context_ids or not continuation_ids:
        empty = "continuation" if context_ids else "context"
        raise BadExample(f"the {empty} has no tokens; expected at least one", "give both parts")
    return GenerationRequest(
        [*context_ids, *continuation_ids],
        max_tokens=0,
        logprobs=top,
        score_from=len(context_ids),
        background=background,
    )


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its text (of this token alone), its log-probability and the best alternatives."""

    token_id: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    raw: bytes | None = None
    """What it adds to the text, in UTF-8, perhaps half a character. None: nothing, as special tokens do."""


@dataclass(frozen=True)
class Delta:
    """New text, whole characters only, and the log-probabilities (if asked for) of the tokens that begin in it.

    The last one may have no text, only tokens (of a character that was cut, or special ones)."""

    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class PromptScored:
    """With `score_from`: the prompt's tokens from there on, before the first of the answer."""

    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class GenerationResult:
    """The whole answer."""

    text: str
    """Without the stop string and without special tokens: the deltas' texts, joined."""
    token_ids: list[int]
    """Every token that was generated, the end token and a stop string's tokens included."""
    finish_reason: FinishReason
    num_prompt_tokens: int
    tokens: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    """With `logprobs`: the tokens of `text` and the end token (none of the stop string)."""
    prompt_tokens: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    """With `score_from`: the prompt's tokens from there on."""
    stop_reason: str | int | None = None
    """The stop string or the end token that was met."""
    weights: Span | None = None
    """None where no forward was run."""
    error: SecondnatureError | None = None
    """With finish_reason error or cancelled."""

    @property
    def num_completion_tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.token_ids)


@dataclass(frozen=True)
class Finished:
    """The last event."""

    result: GenerationResult


Event = Delta | PromptScored | Finished
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
