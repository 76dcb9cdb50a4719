"""One answer while it is generated: from tokens to text, events and the result (process A, the engine's thread)."""

from __future__ import annotations

import time
from collections.abc import Sequence

from secondnature.engines.base import (
    Delta,
    Finished,
    FinishReason,
    GenerationHandle,
    GenerationResult,
    Span,
    Stamp,
    TokenLogprob,
)
from secondnature.engines.local.sampling import MAX_TOP, Sampler, Scored
from secondnature.engines.local.text import Decode, Detokenizer, StopScanner
from secondnature.errors import SecondnatureError, WeightsError


class Answer:
    """One request inside the engine."""

    def __init__(
        self, handle: GenerationHandle, max_tokens: int, decode: Decode, stop_ids: frozenset[int]
    ) -> None:
        request = handle.request
        self.handle = handle
        self.request = request
        self.max_tokens = max_tokens
        self.sampler = Sampler(request.temperature, request.top_p, request.seed)
        self.read = 0
        """Prompt tokens read so far."""
        self.token_ids: list[int] = []
        self.span: Span | None = None
        self.last_at = time.perf_counter()
        """When the last token came; before the first: when the request came."""
        self.result: GenerationResult | None = None
        """Set when the job is done."""
        self._decode = decode
        self._stop_ids = frozenset[int]() if request.ignore_eos else stop_ids
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
        """Whether every token of the prompt went through the model."""
        return self.read == len(self.request.prompt_ids)

    @property
    def need(self) -> int:
        """Tokens that this request may hold at its end."""
        return len(self.request.prompt_ids) + self.max_tokens

    def see(self, stamp: Stamp) -> None:
        """Note which weights there are, before and after each forward."""
        self.span = Span.begin(stamp) if self.span is None else self.span.seen(stamp)

    def add_prompt(self, scored: Sequence[Scored]) -> None:
        """Log-probabilities of the next tokens of the prompt."""
        self._prompt_tokens += [self._named(s, MAX_TOP) for s in scored]

    def accept(self, token: int, scored: Scored | None) -> None:
        """Take the next token: send the text that it settles, or end the answer."""
        self.token_ids.append(token)
        if token in self._stop_ids:
            self.finish("stop", reason=token)
            return
        if scored is not None:
            self._held.append((self._settled, self._named(scored, self.request.logprobs or 0)))
        settled = self._detokenizer.feed(token)
        self._settled += len(settled)
        text = self._scanner.feed(settled)
        if text:
            self._send(text)
        if self._scanner.found is not None:
            self.finish("stop", reason=self._scanner.found)
        elif len(self.token_ids) >= self.max_tokens:
            self.finish("length")

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
        best = tuple(TokenLogprob(t, self._decode([t]), p) for t, p in scored.top[:top])
        return TokenLogprob(scored.token_id, self._decode([scored.token_id]), scored.logprob, best)


def not_finite() -> WeightsError:
    """The error of a request whose logits are not numbers."""
    return WeightsError(
        "the model answered with NaN or infinite logits; expected finite numbers",
        "the weights are broken: undo the last lesson, or restart the server",
    )
