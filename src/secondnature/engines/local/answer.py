"""One answer while it is generated: from tokens to text, events and the result (process A, the engine's thread)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from secondnature.engines.base import GenerationHandle
from secondnature.engines.generation import (
    Delta,
    Finished,
    FinishReason,
    GenerationResult,
    PromptScored,
    Span,
    Stamp,
    TokenLogprob,
)
from secondnature.engines.local.grammar import Shape
from secondnature.engines.local.sampling import MAX_TOP, Sampler, Scored
from secondnature.engines.local.text import Decode, Detokenizer, Entry, StopScanner
from secondnature.errors import SecondnatureError, WeightsError

_LOG = logging.getLogger(__name__)
MARGIN_TOKENS = 256
"""A row is taken with so many free tokens behind what it holds: room to go on before others must give way."""


class Answer:
    """One request inside the engine."""

    def __init__(
        self,
        handle: GenerationHandle,
        max_tokens: int,
        decode: Decode,
        entry: Callable[[int], Entry],
        stop_ids: frozenset[int],
    ) -> None:
        request = handle.request
        self.handle = handle
        self.request = request
        self.max_tokens = max_tokens
        self.shape: Shape | None = None if request.shape is None else request.shape.fresh()
        self.token_ids: list[int] = []
        self.sampler = Sampler(request, request.prompt_ids, self.token_ids)
        self.ids: list[int] = request.prompt_ids
        """What has to be read before the next token can be drawn; longer than the prompt after `set_back`."""
        self.score_from = request.score_from
        """As in the request, until the prompt was scored."""
        self.read = 0
        """Of `ids`, how many were read."""
        self.span: Span | None = None
        self.submitted_at = self.last_at = time.perf_counter()
        """When the last token came; before the first: when the request came."""
        self.result: GenerationResult | None = None
        """Set when the job is done."""
        self._entry = entry
        self._stop_ids = (frozenset[int]() if request.ignore_eos else stop_ids) | set(request.stop_token_ids)
        self._detokenizer = Detokenizer(decode, request.prompt_ids)
        self._scanner = StopScanner(request.stop)
        self._text: list[str] = []
        self._tokens: list[TokenLogprob] = []
        self._held: list[tuple[int, TokenLogprob]] = []
        """Tokens whose text is not out yet, each with the number of characters before it."""
        self._settled = self._sent = 0
        """Characters that left the detokenizer; characters that went to the reader."""
        self._prompt_tokens: list[TokenLogprob] = []

    @property
    def done(self) -> bool:
        """Whether the result was sent."""
        return self.result is not None

    @property
    def prompt_read(self) -> bool:
        """Whether every token of `ids` went through the model."""
        return self.read == len(self.ids)

    @property
    def last_unscored(self) -> int:
        """How many of the first tokens of `ids` can be read without a look at the logits behind them."""
        return min(len(self.ids), self.score_from or len(self.ids)) - 1

    @property
    def held(self) -> int:
        """Tokens that this request holds now."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    @property
    def need(self) -> int:
        """Tokens that it has to have room for, to go on for a while."""
        return min(self.held + MARGIN_TOKENS, len(self.request.prompt_ids) + self.max_tokens)

    def set_back(self) -> None:
        """It gave its row back: prompt and answer so far are read again before it goes on."""
        self.ids = [*self.request.prompt_ids, *self.token_ids]
        self.read, self.score_from = 0, None

    def see(self, stamp: Stamp) -> None:
        """Note which weights there are, before and after each forward."""
        self.span = Span.begin(stamp) if self.span is None else self.span.seen(stamp)

    def add_prompt(self, scored: Sequence[Scored]) -> None:
        """Log-probabilities of the next tokens of the prompt."""
        self._prompt_tokens += [self._named(s, MAX_TOP) for s in scored]

    def prompt_scored(self) -> None:
        """The whole prompt was read: tell what it scored, once."""
        if self.score_from is not None:
            self.score_from = None
            self.handle.emit(PromptScored(tuple(self._prompt_tokens)))

    def accept(self, token: int, scored: Scored | None) -> None:
        """Take the next token: send the text that it settles, or end the answer."""
        self.token_ids.append(token)
        if scored is not None:
            self._held.append((self._settled, self._named(scored, self.request.logprobs or 0)))
        if token in self._stop_ids:
            self.finish("stop", reason=token)
            return
        settled = self._detokenizer.feed(token)
        self._settled += len(settled)
        text = self._scanner.feed(settled)
        if text:
            self._send(text)
        if self._scanner.found is not None:
            self.finish("stop", reason=self._scanner.found)
        elif (self.shape is not None and self.shape.whole) or (text and self._enough()):
            self.finish("stop")
        elif len(self.token_ids) >= self.max_tokens:
            self.finish("length")

    def _enough(self) -> bool:
        """Whether whoever asked needs no more; what raises there must not touch the other requests."""
        try:
            return self.request.enough is not None and self.request.enough("".join(self._text))
        except Exception:  # noqa: BLE001
            _LOG.exception("whether an answer is enough could not be asked")
            return False

    def finish(
        self,
        how: FinishReason,
        *,
        reason: str | int | None = None,
        error: SecondnatureError | None = None,
    ) -> None:
        """End the answer: what was held back comes out, unless it is a stop string's or the answer is void."""
        if self.result is not None:
            return
        if error is None and self._scanner.found is None:
            rest = self._scanner.flush()
            if rest or self._held:
                self._send(rest, last=True)
        self.result = GenerationResult(
            text="".join(self._text),
            token_ids=self.token_ids,
            finish_reason=how,
            num_prompt_tokens=len(self.request.prompt_ids),
            tokens=self._tokens,
            prompt_tokens=self._prompt_tokens,
            stop_reason=reason,
            weights=self.span,
            error=error,
        )
        self.handle.emit(Finished(self.result))

    def _send(self, text: str, *, last: bool = False) -> None:
        """Send text with the tokens that begin in it; at the end, with all tokens that are left."""
        self._text.append(text)
        self._sent += len(text)
        tokens = tuple(token for start, token in self._held if last or start < self._sent)
        self._held = self._held[len(tokens) :]
        self._tokens += tokens
        self.handle.emit(Delta(text, tokens))

    def _named(self, scored: Scored, top: int) -> TokenLogprob:
        best = tuple(self._token(t, p) for t, p in scored.top[:top])
        return self._token(scored.token_id, scored.logprob, best)

    def _token(self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        text, raw = self._entry(token)
        return TokenLogprob(token, text, logprob, top, raw)


def not_finite() -> WeightsError:
    """The error of a request whose logits are not numbers."""
    return WeightsError(
        "the model answered with NaN or infinite logits; expected finite numbers",
        "the weights are broken: undo the last lesson, or restart the server",
    )
