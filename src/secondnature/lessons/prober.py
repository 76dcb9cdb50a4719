"""The prober asks probes: greedy answers through the engine, in the background, many at once (server).

The answers are those that users get: same engine, same weights, same chat template. An answer is cached by (weights
version, probe), so the "after" of one lesson is the "before" of the next for free. It is generated as far as its
check needs it: a beginning that decides the check is judged as the whole answer would be. A sample of each set is
generated to its end, for whoever looks at style. Whether an answer passes
is decided by `evidence.checks`, code in a subprocess with limits, while whoever waits goes on checking in.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Future
from typing import Any

from secondnature.engines.base import Engine, GenerationHandle
from secondnature.engines.generation import GenerationRequest, GenerationResult, score_request
from secondnature.errors import BadInput, Busy, ContextOverflow, SecondnatureError
from secondnature.evidence.checks import judge_probes
from secondnature.evidence.decided import decider
from secondnature.evidence.style import sampled
from secondnature.model.chat import encode_answer, encode_chat
from secondnature.records import Message, Outcome, Probe

MAX_CACHED = 100_000
MAX_ANSWER_TOKENS = 160
AT_ONCE = 256
"""Requests handed to the engine at a time; it decodes as many as it has rows for."""
PROGRAMS_AT_ONCE = 16
"""Given to the sandbox at a time: so many may still run when nobody wants to know any more."""


CheckIn = Callable[[int, int], None]
"""Called while waiting, with what is done and what there is; may raise to give up."""


@contextlib.contextmanager
def named(label: str) -> Iterator[None]:
    """Texts that are too long, or that the template refuses, are refused by the name that the user knows them by.

    Raises:
        ContextOverflow, BadInput
    """
    try:
        yield
    except (ContextOverflow, BadInput) as e:
        raise type(e)(f"{label}: {e.message}", e.hint) from None


class Prober:
    """Asks probes of the weights that are being served. Used by the runner's thread."""

    def __init__(self, engine: Engine, tokenizer: Any, *, context_limit: int) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._limit = context_limit
        self._cache: OrderedDict[tuple[str, str], Outcome] = OrderedDict()

    def check(self, probes: Sequence[Probe]) -> None:
        """Every probe fits the model, with room for an answer. Raises ContextOverflow."""
        for i, probe in enumerate(probes):
            with named(f"probe {i}"):
                prompt = len(encode_chat(self._tokenizer, probe.prompt, limit=self._limit))
                pairs = [p for p in (probe.check.prefers, probe.margin) if p is not None]
                scored = [self._answer(probe, text) for pair in pairs for text in pair]
            longest = max((len(c) + len(a) - prompt for c, a in scored), default=1)
            if prompt + longest > self._limit:
                raise ContextOverflow(
                    f"probe {i}: {prompt} + {longest} tokens; the model reads {self._limit}", "shorten it"
                )

    def outcomes(self, probes: Sequence[Probe], version: str, check_in: CheckIn) -> list[Outcome]:
        """Ask every probe once (or take what these weights answered before), in order.

        Args:
            probes: asked through the engine, as background requests.
            version: of the weights, which must not change meanwhile: the cache's key.
            check_in: called while waiting.
        """
        sample = sampled(probes)
        missing = [p for p in probes if not self._answered(version, p.digest(), whole=p.digest() in sample)]
        known = len(probes) - len(missing)
        for start in range(0, len(missing), AT_ONCE):
            chosen = missing[start : start + AT_ONCE]

            def count(done: int, total: int, before: int = known + start, among: int = len(chosen)) -> None:
                check_in(before + (done * among // total if total else 0), len(probes))

            for probe, outcome in self._ask(chosen, sample, count):
                self._cache[version, probe.digest()] = outcome
        found = [self._cache[version, p.digest()] for p in probes]
        for _ in range(len(self._cache) - MAX_CACHED):
            self._cache.popitem(last=False)
        return found

    def ask_now(self, probes: Sequence[Probe], check_in: CheckIn) -> list[Outcome]:
        """Ask every probe of the weights as they are this moment, which have no version: nothing is cached.

        Every answer ends where its check is decided.
        """
        found: list[Outcome] = []
        for start in range(0, len(probes), AT_ONCE):
            chosen = probes[start : start + AT_ONCE]

            def count(done: int, total: int, before: int = start, among: int = len(chosen)) -> None:
                check_in(before + (done * among // total if total else 0), len(probes))

            found += [outcome for _, outcome in self._ask(chosen, frozenset(), count)]
        return found

    def answers(
        self,
        contexts: Sequence[list[int]],
        check_in: CheckIn,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: Sequence[int] | None = None,
        enough: Sequence[Callable[[str], bool] | None] | None = None,
    ) -> list[GenerationResult]:
        """One answer to each context (token ids), at most `MAX_ANSWER_TOKENS` long; the first is drawn with `seed`,
        the next with `seed + 1`. `max_tokens`: what else bounds each; `enough`: what ends each early.
        """
        found: list[GenerationResult] = []
        bounds = max_tokens or [self._limit] * len(contexts)
        requests = [
            GenerationRequest(
                ids,
                max_tokens=min(MAX_ANSWER_TOKENS, self._limit - len(ids), bound),
                temperature=temperature,
                seed=seed + i,
                background=True,
                enough=None if enough is None else enough[i],
            )
            for i, (ids, bound) in enumerate(zip(contexts, bounds, strict=True))
        ]
        for start in range(0, len(requests), AT_ONCE):

            def count(done: int, _: int, before: int = start) -> None:
                check_in(before + done, len(requests))

            found += self._wait(requests[start : start + AT_ONCE], count)
        return found

    # ------------------------------------------------------------------------------------------------

    def _answer(self, probe: Probe, text: str) -> tuple[list[int], list[int]]:
        return encode_answer(self._tokenizer, probe.prompt, Message(role="assistant", content=text))

    def _answered(self, version: str, probe: str, *, whole: bool) -> bool:
        known = self._cache.get((version, probe))
        return known is not None and (known.whole or not whole)

    def _ask(
        self, probes: Sequence[Probe], sample: Set[str], check_in: CheckIn
    ) -> list[tuple[Probe, Outcome]]:
        """The probes of `sample` are answered to the end of the answer."""
        prompts = [encode_chat(self._tokenizer, p.prompt) for p in probes]
        pairs = [p.check.prefers or p.margin for p in probes]
        spoken = [i for i, p in enumerate(probes) if p.check.prefers is None]
        asked = len(spoken) + 2 * sum(pair is not None for pair in pairs)
        code = [i for i, p in enumerate(probes) if p.check.python is not None]
        deciders = [None if p.digest() in sample else decider(p.check) for p in probes]
        total = asked + len(code)
        answers = self.answers(
            [prompts[i] for i in spoken],
            lambda done, _: check_in(done, total),
            max_tokens=[probes[i].max_tokens or MAX_ANSWER_TOKENS for i in spoken],
            enough=[deciders[i] for i in spoken],
        )
        results = dict(zip(spoken, answers, strict=True))
        margins = self._margins(probes, pairs, lambda done, _: check_in(len(spoken) + done, total))
        texts = [results[i].text if i in results else "" for i in range(len(probes))]

        def count(judged: int) -> None:
            check_in(asked + sum(i < judged for i in code), total)

        outcomes = _judged(probes, texts, margins, count)
        check_in(total, total)
        told = [o.model_copy(update={"whole": d is None}) for o, d in zip(outcomes, deciders, strict=True)]
        return list(zip(probes, told, strict=True))

    def _margins(
        self,
        probes: Sequence[Probe],
        pairs: list[tuple[str, str] | None],
        check_in: CheckIn,
    ) -> list[float | None]:
        """log p(wanted) - log p(unwanted) of every probe that names a pair, nats over the whole answers."""
        chosen = [i for i, pair in enumerate(pairs) if pair is not None]
        requests = [
            score_request(*self._answer(probes[i], text), background=True)
            for i in chosen
            for text in pairs[i] or ()
        ]
        totals = [sum(t.logprob for t in r.prompt_tokens) for r in self._wait(requests, check_in)]
        found: list[float | None] = [None] * len(probes)
        for k, i in enumerate(chosen):
            found[i] = totals[2 * k] - totals[2 * k + 1]
        return found

    def _submit(self, request: GenerationRequest, waiting: Callable[[], object]) -> GenerationHandle:
        """Probes give way: where users fill the queue, wait."""
        while True:
            try:
                return self._engine.submit(request)
            except Busy:
                waiting()
                time.sleep(0.05)

    def _wait(self, requests: Sequence[GenerationRequest], check_in: CheckIn) -> list[GenerationResult]:
        handles: list[GenerationHandle] = []

        def count() -> bool:
            done = sum(h.done for h in handles)
            check_in(done, len(requests))
            return done < len(requests)

        try:
            for request in requests:
                handles.append(self._submit(request, count))
            while count():
                time.sleep(0.01)
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        results = [h.result() for h in handles]
        failed: SecondnatureError | None = next((r.error for r in results if r.error is not None), None)
        if failed is not None:
            raise failed
        return results


def _judged(
    probes: Sequence[Probe], texts: list[str], margins: list[float | None], check_in: Callable[[int], None]
) -> list[Outcome]:
    """Judge on another thread, for programs may take seconds each; whoever gives up leaves it behind at once.

    `check_in` is told how many are judged.

    Not an executor's thread: the interpreter waits for those at its end.
    """
    future: Future[list[Outcome]] = Future()
    given_up = threading.Event()
    at_once = PROGRAMS_AT_ONCE if any(p.check.python is not None for p in probes) else AT_ONCE

    found: list[Outcome] = []

    def judge() -> None:
        try:
            for start in range(0, len(probes), at_once):
                if given_up.is_set():
                    return
                part = slice(start, start + at_once)
                found.extend(judge_probes(probes[part], texts[part], margins[part]))
            future.set_result(found)
        except BaseException as e:  # noqa: BLE001  (it belongs to the thread that waits)
            future.set_exception(e)

    threading.Thread(target=judge, name="judge", daemon=True).start()
    try:
        while not future.done():
            check_in(len(found))
            time.sleep(0.01)
    except BaseException:
        given_up.set()
        raise
    return future.result()
