"""Corrections, prompts and probes as the token ids of one model, or the reason why they cannot be (server).

What is asked, taught, probed and replayed goes through here alike; what is wrong is said by the name that whoever
sent it knows it by (`correction 3`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secondnature import wire
from secondnature.errors import BadExample, BadInput, ContextOverflow
from secondnature.lessons.own_answers import Distilled, teacher_messages
from secondnature.lessons.prober import named
from secondnature.model.chat import Taught, encode_chat, teach
from secondnature.model.tools import takes_tools
from secondnature.records import Correction, Message, Probe, nothing_asked

__all__ = ["Encoder", "Told", "refuse_equal"]

_TokenIds = tuple[list[int], list[int], list[int] | None]
"""(context, wanted answer, rejected answer); nobody writes into them."""


@dataclass(frozen=True)
class Told:
    """What a template is told besides the turns."""

    options: dict[str, Any] | None = None
    """`chat_template_kwargs`."""
    tools: list[dict[str, Any]] | None = None

    @staticmethod
    def of(correction: Correction) -> Told:
        """When the answer was given."""
        return Told(correction.chat_template_kwargs, correction.tools)


NOTHING = Told()


class Encoder:
    """Encodes for one model."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, context_limit: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._limit = context_limit
        self._between: set[tuple[int, ...]] = set()
        """What the template was seen to write between its prompt and an answer."""
        self._encoded: dict[str, _TokenIds] = {}
        """Of what the kept lessons taught, by digest: every plan asks for all of it."""

    def remember_only(self, digests: Sequence[str]) -> None:
        """Forget the token ids of what no kept lesson teaches any more."""
        self._encoded = {d: self._encoded[d] for d in digests if d in self._encoded}

    def distilled(self, correction: Correction, label: str) -> Distilled:
        """Raises ContextOverflow where prompt, wrong answer and comment alone fill the model's context."""
        _refuse_unasked(correction, label)
        told = Told.of(correction)
        found = Distilled(correction, self.context(correction.prompt, label, told), label)
        teacher = self.context(teacher_messages(correction, ""), label, told)
        self.check(wire.TokenExample(teacher, [0], label=f"{label}, with the wrong answer and the comment"))
        return found

    def work(
        self,
        correction: Correction,
        label: str,
        *,
        by_distribution: bool = False,
        known_as: str | None = None,
    ) -> wire.TokenExample:
        """A correction with a wanted answer as an example. Raises BadInput, BadExample, ContextOverflow.

        Args:
            by_distribution: its answer is held by distribution.
            known_as: the digest of what will be asked for again.
        """
        found = None if known_as is None else self._encoded.get(known_as)
        if found is None:
            found = self._ids(correction, label)
            if known_as is not None:
                self._encoded[known_as] = found
        context, continuation, rejected = found
        return wire.TokenExample(
            context, continuation, rejected, label=label, by_distribution=by_distribution
        )

    def _ids(self, correction: Correction, label: str) -> _TokenIds:
        assert correction.chosen is not None, "only corrections with a wanted answer become examples"
        _refuse_unasked(correction, label)
        if not correction.chosen[0].content.strip():
            raise BadExample(f"{label}: the wanted answer is blank", "write it, or leave the record out")
        told = Told.of(correction)
        wanted = self.answer(correction.prompt, correction.chosen[0], label, told)
        rejected = None
        if correction.rejected is not None:
            other = self.answer(correction.prompt, correction.rejected[0], label, told)
            if other.context != wanted.context:
                raise BadInput(
                    f"{label}: one of the two answers brings thoughts of its own, the other does not; they are "
                    "compared after the same text",
                    "write both with `<think>`, or neither",
                )
            rejected = other.continuation
            if correction.is_cut:  # the model did not end it, and is not to be taught that it had
                rejected = rejected[:-1]
        return wanted.context, wanted.continuation, rejected

    def look(self, probe: Probe, index: int) -> wire.DevelopmentProbe:
        """A development probe: two answers to compare, or a prompt to answer. Raises BadInput, ContextOverflow."""
        label, spoken = f"development probe {index}", probe.check.prefers is None
        pair = probe.check.prefers or probe.margin
        if spoken:
            context = self.context(probe.prompt, label)
            self.check(wire.TokenExample(context, [0], label=label))  # with room for an answer of one token
            if pair is None:
                return wire.DevelopmentProbe(context, [], [], probe.side, spoken)
        assert pair is not None, "without `prefers` it is spoken"
        wanted, unwanted = (
            self.answer(probe.prompt, Message(role="assistant", content=text), label) for text in pair
        )
        if wanted.context != unwanted.context:
            raise BadInput(
                f"{label}: one of the two answers brings thoughts of its own, the other does not",
                "write both with `<think>`, or neither",
            )
        look = wire.DevelopmentProbe(
            wanted.context, wanted.continuation, unwanted.continuation, probe.side, spoken
        )
        self.check(wire.TokenExample(look.context, look.wanted, look.unwanted, 1.0, label))
        return look

    def context(self, prompt: list[Message], label: str, told: Told = NOTHING) -> list[int]:
        """Token ids of a prompt; one that cannot fit is not encoded. Raises ContextOverflow, BadInput."""
        with named(label):
            self._check_tools(prompt, told)
            return encode_chat(
                self._tokenizer, prompt, limit=self._limit, tools=told.tools, template_options=told.options
            )

    def answer(self, prompt: list[Message], answer: Message, label: str, told: Told = NOTHING) -> Taught:
        """An answer as token ids; what cannot fit is not encoded. Raises ContextOverflow, BadInput."""
        with named(label):
            self._check_tools(prompt, told)
            found = teach(
                self._tokenizer, prompt, answer, limit=self._limit, tools=told.tools, options=told.options
            )
        if found.between:
            self._between.add(tuple(found.between))
        return found

    def _check_tools(self, prompt: list[Message], told: Told) -> None:
        """Raises BadInput: the template would leave out what the model was shown."""
        if (told.tools or any(m.has_calls for m in prompt)) and not takes_tools(self._tokenizer):
            raise BadInput(
                "tools were shown to the model or called, and this model's chat template shows none",
                "teach it to a model whose template does, or record it without them",
            )

    def asked_otherwise(self, corrections: list[Correction]) -> list[list[int]]:
        """As a probe would ask them, the prompts of those that tell the template something of their own."""
        return [self.context(c.prompt, "") for c in corrections if c.chat_template_kwargs]

    def prompt_of(self, context: list[int]) -> list[int]:
        """What is asked in a context: without what the template writes between its prompt and an answer."""
        for between in self._between:
            if tuple(context[-len(between) :]) == between:
                return context[: -len(between)]
        return context

    def check(self, work: wire.TokenExample) -> None:
        """Raises ContextOverflow, BadExample: longer than the model reads, or tokens that it has not."""
        longest = max(len(work.continuation), len(work.rejected or []))
        if len(work.context) + longest > self._limit:
            raise ContextOverflow(
                f"{work.label}: {len(work.context)} + {longest} tokens; the model reads {self._limit}",
                "shorten the conversation or the answer",
            )
        top = max(*work.context, *work.continuation, *(work.rejected or [0]), 0)
        if top >= self._vocab_size:
            raise BadExample(
                f"{work.label}: token id {top}; the vocabulary ends at {self._vocab_size - 1}",
                "were the ids made with this model's tokenizer?",
            )


def _refuse_unasked(correction: Correction, label: str) -> None:
    """Raises BadExample: nobody can have meant this."""
    reason = nothing_asked(correction)
    if reason is not None:
        raise BadExample(f"{label}: {reason}", "write what was asked, or leave the record out")


def refuse_equal(work: wire.TokenExample) -> None:
    """Raises BadExample: nothing can be learned from two answers that are one."""
    if work.rejected == work.continuation:
        raise BadExample(
            f"{work.label}: the rejected answer is the wanted one; expected two different answers",
            "correct one of them, or leave `rejected` out",
        )
