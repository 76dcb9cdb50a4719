"""What users think of answers becomes corrections, and what has become of those is told (server; no HTTP).

Whoever gives feedback names the answer by its id, or by the conversation: the server knows what it answered there.
That matters where a client lets people edit answers: what such a client sends back as the model's turn is what was
*wanted*, and only the server still has what was said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from secondnature import wire
from secondnature.errors import BadInput, NotFound
from secondnature.lessons.ledger import Added, Ledger
from secondnature.lessons.log import Log
from secondnature.lessons.memory import Memory, Said
from secondnature.lessons.own_answers import comment
from secondnature.lessons.planner import Planner
from secondnature.records import CUT_SHORT, Correction, Message, Provenance, ToolCall

__all__ = ["Feedback", "Scope"]

Scope = Literal["correct", "teach"]
"""What the key opens with which something was sent."""
MERGED = ("rating", "behaviour", "conversation_id")
"""Fields that feedback and corrections call the same."""


@dataclass(frozen=True)
class _About:
    """The answer that feedback is about."""

    prompt: list[Message]
    said: Said | None
    """None: the server does not know (any more) what it answered."""
    completion_id: str | None
    edited: str | None = None
    """The answer as the user left it, where that is not what was said."""


class Feedback:
    """Takes feedback and corrections in. Safe to use from several threads."""

    def __init__(self, ledger: Ledger, memory: Memory, planner: Planner, log: Log) -> None:
        self.ledger = ledger
        self._memory = memory
        self._planner = planner
        self._log = log

    def give(self, body: wire.FeedbackRequest, scope: Scope = "teach") -> wire.FeedbackReply:
        """Record what the user thinks of an answer; durable when this returns. Again: it amends.

        Raises:
            NotFound: that completion or conversation is not remembered, and no correction of it is there.
            BadInput: it was no chat, or with what was said before nothing is left to say.
            Forbidden, StorageError: see `Ledger.add`.
        """
        before = self.ledger.find(identifier=body.id)
        about = self._about(body, before)
        if before is None and about.completion_id is not None:
            before = self.ledger.find(completion_id=about.completion_id)
        (added,) = self._add([_correction(body, about, before)], scope, "observed")
        correction = added.correction
        return wire.FeedbackReply(
            id=str(correction.id),
            correction=correction,
            outcome=added.outcome,
            state=self.states([correction])[0],
        )

    def take(self, corrections: list[Correction], scope: Scope = "teach") -> wire.CorrectionsReply:
        """Add corrections, all or none; durable when this returns. Raises Forbidden, StorageError."""
        added = self._add(corrections, scope, "written")
        found = [x.correction for x in added]
        return wire.CorrectionsReply(
            corrections=found, outcomes=[x.outcome for x in added], states=self.states(found)
        )

    def delete(self, identifier: str, scope: Scope = "teach") -> wire.DeleteReply:
        """Take a correction back. Raises NotFound, Forbidden, StorageError."""
        gone = self.ledger.delete(identifier, by_key=_by(scope))
        taught = self._taught()
        digests = {c.digest() for c in (*self.ledger.earlier(identifier), gone)}
        return wire.DeleteReply(
            id=identifier, lessons=sorted({x for d in digests for x in taught.get(d, [])})
        )

    def states(self, corrections: Sequence[Correction]) -> list[wire.CorrectionState]:
        """What has become of each."""
        taught = self._taught()
        return [self._state(c, taught) for c in corrections]

    def _add(
        self, corrections: list[Correction], scope: Scope, kind: Literal["observed", "written"]
    ) -> list[Added]:
        by_key = _by(scope)
        marked = [
            c.model_copy(
                update={
                    "provenance": (c.provenance or Provenance(kind=kind)).model_copy(
                        update={"by_key": by_key}
                    )
                }
            )
            for c in corrections
        ]
        return self.ledger.add(marked, by_key=by_key)

    def _taught(self) -> dict[str, list[str]]:
        """Digest of a correction -> the lessons in force that taught it."""
        found: dict[str, list[str]] = {}
        for lesson in self._log.all():
            if lesson.state == "kept" and lesson.kind != "revert" and lesson.reverted_by is None:
                for digest in lesson.cause.corrections:
                    found.setdefault(digest, []).append(lesson.id)
        return found

    def _state(self, c: Correction, taught: dict[str, list[str]]) -> wire.CorrectionState:
        earlier = self.ledger.earlier(str(c.id))
        now = taught.get(c.digest(), [])
        before = {x for old in earlier for x in taught.get(old.digest(), [])} - set(now)
        reason = None
        if c.state == "candidate":
            state: Any = "candidate"
        elif now:
            state = "taught"
        elif c.chosen is None and comment(c) is None:
            state = "nothing_to_teach"
        else:
            reason = self._planner.obstacle(c)
            state = "waiting" if reason is None else "cannot_be_taught"
        return wire.CorrectionState(
            id=str(c.id),
            state=state,
            reason=reason,
            lessons=now,
            lessons_before=sorted(before),
            num_amended=len(earlier),
        )

    def _about(self, body: wire.FeedbackRequest, before: Correction | None) -> _About:
        """The answer that is meant. Raises NotFound, BadInput."""
        if body.completion_id is not None:
            known = self.ledger.find(completion_id=body.completion_id)
            try:
                said = self._memory.recall(body.completion_id)
            except NotFound:
                if known is None:
                    raise
                return _of(known)  # it was corrected before, and is forgotten since
            if said.prompt is None:
                raise BadInput(
                    f"completion {body.completion_id} was no chat", "give feedback on chat completions"
                )
            return _About(said.prompt, said, body.completion_id)
        if body.messages is not None:
            return self._conversation([m.plain() for m in body.messages], body, before)
        if before is None:
            raise NotFound(
                f"no correction {str(body.id)[:200]!r} in the ledger",
                "say what it is about: `completion_id` or `messages`",
            )
        return _of(before)

    def _conversation(
        self, messages: list[Message], body: wire.FeedbackRequest, before: Correction | None
    ) -> _About:
        shown = messages[-1].content.strip() if messages[-1].role == "assistant" else None
        prompt = messages if shown is None else messages[:-1]
        if not prompt or prompt[-1].role == "assistant":
            raise BadInput(
                "`messages` holds no question that was answered", "expected the user's turn, then the answer"
            )
        found = self._memory.answers_to(prompt)
        if not found and before is None and shown:
            found = [x for x in self._memory.answers_around(prompt) if _is(shown, x[1])]
        if found:
            exact = [x for x in found if shown is None or _is(shown, x[1])]
            key, said = (exact or found)[0]
            edited = messages[-1].content if shown and not exact else None
            return _About(said.prompt or prompt, said, key, edited)
        if before is not None:  # it was corrected before, and is forgotten since
            about = _of(before)
            said_before = about.said.answer.strip() if about.said is not None else None
            edited = messages[-1].content if shown and said_before not in (None, shown) else None
            return _About(about.prompt, about.said, about.completion_id, edited)
        if body.corrected is None and body.text is None:
            raise NotFound(
                "no answer to this conversation is remembered, and a rating says nothing without it",
                "POST /v1/corrections takes the conversation with what was `said`",
            )
        return _About(prompt, None, None)


def _by(scope: Scope) -> Literal["correct"] | None:
    return "correct" if scope == "correct" else None


def _is(shown: str, said: Said) -> bool:
    """Whether a client that shows this shows what was said; of an answer that was stopped it may show less."""
    answer = said.answer.strip()
    return shown == answer or (said.finish_reason == "unfinished" and answer.startswith(shown))


def _of(before: Correction) -> _About:
    """What an earlier correction was about."""
    said = None
    if before.answered is not None:
        (answer,) = before.answered
        said = Said(
            before.prompt,
            answer.content,
            before.weights_version or "",
            before.finish_reason,
            before.chat_template_kwargs or {},
            answer.tool_calls or (),
            before.tools,
        )
    return _About(before.prompt, said, before.completion_id)


def _correction(body: wire.FeedbackRequest, about: _About, before: Correction | None) -> Correction:
    """What was said about an answer until now, as a correction. Raises BadInput."""
    sent = body.model_fields_set
    rating = body.rating or 0
    old = before
    if before is not None and rating and (before.rating or 0) * rating < 0:
        old = None  # a changed mind: what was said before no longer counts
    fields: dict[str, Any] = {x: getattr(body if x in sent or old is None else old, x) for x in MERGED}
    wanted = old.chosen[0].content if old is not None and old.chosen else None
    wanted = body.corrected if "corrected" in sent else about.edited or wanted
    feedback = body.text if "text" in sent or old is None else old.feedback
    if feedback is None and wanted is None and fields["rating"] is None:
        raise BadInput("nothing is left of this feedback", "DELETE /v1/corrections/{id} takes it back")
    said = about.said
    finish = said.finish_reason if said is not None else None
    source = body.source or (before.provenance.source if before and before.provenance else None)
    return Correction(
        prompt=about.prompt,
        said=_answer(said.answer, said.calls) if said is not None else None,
        tools=said.tools if said is not None else None,
        finish_reason=finish if finish in CUT_SHORT | {"stop"} else None,
        chosen=_answer(wanted),
        feedback=feedback,
        provenance=Provenance(kind="observed", source=source),
        id=body.id or (before.id if before is not None else None),
        completion_id=about.completion_id,
        weights_version=said.weights_version or None if said is not None else None,
        chat_template_kwargs=(dict(said.options) or None) if said is not None else None,
        **fields,
    )


def _answer(text: str | None, calls: Sequence[ToolCall] = ()) -> list[Message] | None:
    if not text and not calls:
        return None
    return [Message(role="assistant", content=text or "", tool_calls=list(calls) or None)]
