"""What is asked of an engine and what it answers: plain values (process A). No torch.

An answer carries the stamps of the weights that gave it; a request is how its tokens are drawn, and the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of an answer are drawn."""

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


@dataclass(frozen=True)
class GenerationRequest(Sampling):
    """One answer to generate, or one text to score (`max_tokens=0` with `score_from`)."""

    prompt_ids: list[int]
    max_tokens: int | None = None
    """None: as many as the context still holds. 0: only score the prompt."""
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
    enough: Callable[[str], bool] | None = None
    """Called with the text so far after each token that adds to it, in the engine's thread: return at once. True
    ends the answer. An engine may leave it out and go on to the end."""

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
