"""The model's own answers, sampled before a lesson's first write (server).

Two kinds of examples need them. Self-distillation: the student's answers to a corrected prompt, along which it is
compared with a teacher, the same weights with the user's comment in their context. Replay of general prompts: what
the model says now is what it is held to. Both are asked through the engine that serves, in the background; the
lesson has not begun to write, so every answer is by the weights before it.

The teacher's context is the conversation as it would have gone on: the prompt, the answer that was wrong, what the
user said about it. Where the user wrote the wanted answer and nothing else, they say that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secondnature import wire
from secondnature.lessons.prober import CheckIn, Prober
from secondnature.model.chat import encode_chat
from secondnature.records import Correction, Message

__all__ = ["Distilled", "Own", "OwnAnswers", "comment", "teacher_messages"]

MIN_ROOM_TOKENS = 16
"""Left for an answer of the student, where the teacher reads one of the model's as well."""


@dataclass(frozen=True)
class Own:
    """A general prompt whose answer, by the model as it is, is replayed."""

    context: list[int]
    label: str
    """How an error names it: `replay prompt 3`."""


@dataclass(frozen=True)
class Distilled:
    """A correction that is taught by its comment."""

    correction: Correction
    context: list[int]
    """The plain prompt: what the student reads."""
    label: str


def comment(correction: Correction) -> str | None:
    """What the teacher is told about the wrong answer; None: nothing is known, or it was praised."""
    if correction.is_praise:
        return None
    if correction.feedback:
        return correction.feedback
    return f"I wanted this answer: {correction.chosen[0].content}" if correction.chosen else None


def teacher_messages(correction: Correction, said: str) -> list[Message]:
    """The conversation that the teacher answers: prompt, wrong answer (`said` if it is not recorded), comment."""
    wrong = correction.answered or [Message(role="assistant", content=said)]
    told = comment(correction)
    assert told is not None, "only corrections that say something are distilled"
    return [*correction.prompt, *wrong, Message(role="user", content=told)]


class OwnAnswers:
    """Asks for the answers that a lesson needs of the model as it is. Used by the runner's thread."""

    def __init__(self, prober: Prober, tokenizer: Any, *, context_limit: int) -> None:
        self._prober = prober
        self._tokenizer = tokenizer
        self._limit = context_limit

    def own(
        self,
        prompts: Sequence[Own],
        check_in: CheckIn,
        *,
        temperature: float,
        seed: int,
        by_distribution: bool,
    ) -> list[wire.TokenExample]:
        """One replay example per prompt: the model's own answer to it."""
        contexts = [p.context for p in prompts]
        answers = self._prober.answers(contexts, check_in, temperature=temperature, seed=seed)
        return [
            wire.TokenExample(p.context, r.token_ids, label=p.label, by_distribution=by_distribution)
            for p, r in zip(prompts, answers, strict=True)
        ]

    def distil(
        self,
        corrections: Sequence[Distilled],
        settings: wire.SdftSettings,
        check_in: CheckIn,
        *,
        seed: int,
    ) -> list[wire.TokenExample]:
        """The examples of self-distillation: one answer to every correction, then the next to every one.

        Each was planned with room for a token. Where an answer of the model, which nobody recorded, would fill what
        the teacher reads, that answer ends before it does.
        """
        num_said = len(corrections)
        total = num_said * (1 + settings.samples)
        told = [self._teacher(c, "") for c in corrections]
        said = self._prober.answers(
            [c.context for c in corrections],
            lambda done, _: check_in(done, total),
            max_tokens=[max(1, self._limit - len(ids) - MIN_ROOM_TOKENS) for ids in told],
        )
        teachers: list[list[int]] = []
        for c, r, without in zip(corrections, said, told, strict=True):
            teacher = self._teacher(c, r.text)
            teachers.append(teacher if len(teacher) < self._limit else without)
        rooms = [
            self._limit - max(len(c.context), len(t)) for c, t in zip(corrections, teachers, strict=True)
        ]
        asked = [(k, i) for k in range(settings.samples) for i in range(len(corrections))]
        answers = self._prober.answers(
            [corrections[i].context for _, i in asked],
            lambda done, _: check_in(num_said + done, total),
            temperature=settings.temperature,
            seed=seed,
            max_tokens=[rooms[i] for _, i in asked],
        )
        return [
            wire.TokenExample(
                corrections[i].context,
                answer.token_ids,
                label=f"{corrections[i].label}, answer {k}",
                teacher=teachers[i],
            )
            for (k, i), answer in zip(asked, answers, strict=True)
        ]

    def _teacher(self, distilled: Distilled, said: str) -> list[int]:
        """What the teacher reads; `said` where it is not recorded."""
        messages = teacher_messages(distilled.correction, said)
        of = distilled.correction
        return encode_chat(
            self._tokenizer, messages, tools=of.tools, template_options=of.chat_template_kwargs
        )
