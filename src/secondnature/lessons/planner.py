"""From a request to a plan: everything that can be wrong with a training job is found here, before a write.

Pure data in, pure data out (plan, validate, apply): corrections become token ids, defaults are spelled out, and
what cannot be trained on is refused by name. A dry run ends here.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, TypeVar

from secondnature import wire
from secondnature.errors import BadInput, ContextOverflow
from secondnature.evidence.gate import ReadAs, read_in_training
from secondnature.lessons.encoder import Encoder, Told, refuse_equal
from secondnature.lessons.own_answers import Distilled, Own, comment
from secondnature.lessons.plan import Plan, Replay, Sample
from secondnature.lessons.shown import MAX_SHOWN, counted, doubts, shown
from secondnature.model.chat import encode_chat
from secondnature.records import Correction, Prompt, digest, nothing_asked
from secondnature.train.batches import num_replayed

__all__ = ["Planner"]

T = TypeVar("T")
_READ_AS = {"example": "taught", "student": "taught", "development probe": "development probes"}
DEFAULT_LR = 1e-5
DEFAULT_MAX_STEPS = 100
"""Where only a margin says when to stop."""
MAX_KL_PROMPTS = 16
"""Prompts per set on which KL(base || tuned) is measured."""
MIN_TOKENS_OF_A_TURN = 16
"""Of what a template writes around a turn; guessed high, for what fits by it is not looked at more closely."""


class Planner:
    """Makes plans for one model."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        vocab_size: int,
        context_limit: int,
        highest_rank: int,
        default_lr: float | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._limit = context_limit
        self._encoder = Encoder(tokenizer, vocab_size=vocab_size, context_limit=context_limit)
        self._highest_rank = highest_rank
        self._default_lr = default_lr or DEFAULT_LR
        self._rendered: set[tuple[str, ...]] = set()
        """Orders of turns that the model's template is known to take."""

    def plan(self, request: wire.TrainRequest, ledger: list[Correction], earlier: list[Correction]) -> Plan:
        """The job that a request asks for, as things stand now; made again when the lesson begins.

        Args:
            request: validated body of `POST /v1/train`.
            ledger: all corrections of the home (used with `ledger: true`).
            earlier: corrections of the kept lessons, for replay.

        Raises:
            BadInput: nothing to learn, a probe that is no evidence, or an option that does not go with the
                examples or the model.
            BadExample: token ids outside the vocabulary, or a rejected answer that is the wanted one.
            ContextOverflow: an example longer than the model can read.
        """
        if request.optimizer.rank > self._highest_rank:
            raise BadInput(
                f"rank {request.optimizer.rank} fits no matrix of the model; the highest that does is "
                f"{self._highest_rank}",
                f"set `optimizer.rank` to 1 to {self._highest_rank}",
            )
        given, corrections = self._corrections(request, ledger)
        passed_over: list[wire.PassedOver] = []
        if request.ledger:  # what lies there cannot be mended by the caller: it is passed over, and named
            corrections = self._teachable(corrections, request.objective == "sdft", passed_over)
        skipped = given - len(corrections)
        distilled: list[Distilled] = []
        if request.examples is not None:
            examples = [
                wire.TokenExample(e.context_ids, e.continuation_ids, e.rejected_ids, e.weight, f"example {i}")
                for i, e in enumerate(request.examples)
            ]
        elif request.objective == "sdft":
            examples = []
            distilled = [self._encoder.distilled(c, f"correction {i}") for i, c in enumerate(corrections)]
        else:
            examples = [self._encoder.work(c, f"correction {i}") for i, c in enumerate(corrections)]
        development = [self._encoder.look(p, i) for i, p in enumerate(request.development)]
        asked = [self._encoder.context(p.prompt, f"probe {i}") for i, p in enumerate(request.probes)]
        replay = self._replay(
            request.replay, earlier, {c.digest() for c in corrections}, {tuple(ids) for ids in asked}
        )
        _refuse_read(
            asked,
            {
                "example": [self._encoder.prompt_of(x.context) for x in examples],
                "student": [x.context for x in distilled] + self._encoder.asked_otherwise(corrections),
                "development probe": [self._encoder.prompt_of(x.context) for x in development],
                "replay": [self._encoder.prompt_of(x.context) for x in replay.works],
                "own answer": [x.context for x in replay.own],
            },
        )
        for work in examples:
            self._encoder.check(work)
            refuse_equal(work)
        objective = request.objective or ("orpo" if all(e.rejected for e in examples) else "sft")
        num_examples = len(examples) + len(distilled) * request.sdft.samples
        if objective not in ("sft", "sdft"):
            missing = next((e.label for e in examples if e.rejected is None), None)
            if missing is not None:
                raise BadInput(
                    f"{missing} has no rejected answer; `{objective}` needs one", "use `sft`, or add it"
                )
        alone = bool(distilled) or any(e.rejected is None for e in examples)
        compared = any(x.wanted and x.side == "right" for x in development)
        if request.until_margin is not None and not compared and alone:
            raise BadInput(
                "`until_margin` has nothing to look at: no development probe of the side `right` has two answers "
                "to compare, and an example lacks `rejected` (or, with `sdft`, is not written yet)",
                "send `development` probes with `prefers` or `margin`, or use `until_passed` or `max_steps`",
            )
        batch_size = min(request.batch_size, num_examples)
        steps = _steps(request, math.ceil(num_examples / batch_size))
        share = request.replay.share
        num_old = num_replayed(batch_size, share) if replay.works or replay.own else 0
        own = _spread(replay.own, steps * num_old)  # more would be sampled for nothing
        return Plan(
            objective=objective,
            steps=steps,
            batch_size=batch_size,
            seed=request.seed,
            examples=examples,
            replay=replay.works,
            distilled=distilled,
            sdft=request.sdft,
            own=own,
            own_temperature=request.replay.temperature,
            hold_own=(request.replay.match or "distribution") == "distribution",
            replay_share=share if replay.works or own else 0.0,
            replay_match=request.replay.match or "answer",
            replay_weight=request.replay.weight,
            learned_loss=request.learned_loss,
            optimizer=request.optimizer.model_copy(update={"lr": request.optimizer.lr or self._default_lr}),
            development=development,
            until_margin=request.until_margin,
            until_passed=request.until_passed,
            look_every=request.look_every,
            corrections=corrections,
            samples=self._taught(corrections, examples) + _spread(replay.samples, MAX_KL_PROMPTS),
            skipped=skipped,
            passed_over=passed_over,
            digests=[digest([w.context, w.continuation, w.rejected]) for w in examples]
            + [d.correction.digest() for d in distilled],
            left_out=replay.left_out,
        )

    def _replay(
        self,
        settings: wire.ReplaySettings,
        earlier: list[Correction],
        mine: set[str],
        asked: set[tuple[int, ...]],
    ) -> Replay:
        """What is replayed. What a probe asks is left out: it could be learned by heart. So is what earlier lessons
        taught and does not fit (any more); of what the request itself names that is an error.

        Args:
            mine: digests of the corrections that are taught now: they are no replay.
            asked: the contexts of the probes.
        """
        found = Replay([], [], [], {})
        if settings.share == 0:
            return found
        given: list[tuple[Correction | Prompt, str]] = [
            *((c, f"replay {i}") for i, c in enumerate(settings.examples) if c.chosen is not None),
            *((p, f"replay prompt {i}") for i, p in enumerate(settings.prompts)),
        ]
        known: dict[int, str] = {}
        if settings.lessons:
            digests = [c.digest() for c in earlier]
            others = [(c, d) for c, d in zip(earlier, digests, strict=True) if d not in mine]
            known = {id(c): d for c, d in others}
            given += [(c, f"replay of an earlier lesson {i}") for i, (c, _) in enumerate(others)]
            self._encoder.remember_only(digests)
        num_own = len(settings.examples) + len(settings.prompts)
        by_distribution = settings.match == "distribution"
        for i, (item, label) in enumerate(given):
            try:
                written = isinstance(item, Correction) and item.chosen is not None
                if isinstance(item, Correction) and item.chosen is not None:
                    work = self._encoder.work(
                        item, label, by_distribution=by_distribution, known_as=known.get(id(item))
                    )
                else:  # with room for an answer of one token
                    work = wire.TokenExample(self._encoder.context(item.prompt, label), [0], label=label)
                self._encoder.check(work)
            except BadInput as e:
                if i < num_own:
                    raise
                found.leave_out("too long" if isinstance(e, ContextOverflow) else "cannot be taught")
                continue
            prompt = self._encoder.prompt_of(work.context)
            otherwise = self._encoder.asked_otherwise([item] if isinstance(item, Correction) else [])
            if any(tuple(ids) in asked for ids in (prompt, *otherwise)):
                found.leave_out("asked by a probe")
                continue
            found.samples.append(Sample("replay", prompt, item.prompt))
            if written:
                found.works.append(work)
            else:
                found.own.append(Own(work.context, label))
        return found

    def _taught(self, corrections: list[Correction], examples: list[wire.TokenExample]) -> list[Sample]:
        """Some of the prompts taught, in order."""
        new = [
            Sample(
                "new",
                encode_chat(
                    self._tokenizer, c.prompt, tools=c.tools, template_options=c.chat_template_kwargs
                ),
                c.prompt,
                c.chosen[0].content if c.chosen else None,
            )
            for c in corrections[:MAX_KL_PROMPTS]
        ]
        return new or [Sample("new", e.context) for e in examples[:MAX_KL_PROMPTS]]

    def _corrections(
        self, request: wire.TrainRequest, ledger: list[Correction]
    ) -> tuple[int, list[Correction]]:
        """(how many were given, those of them from which the objective can learn)."""
        if request.examples is not None:
            return 0, []
        given = ledger if request.ledger else list(request.corrections or [])
        given = [c for c in given if c.state is None]
        if not given:
            raise BadInput(
                "the ledger is empty", "record corrections first: POST /v1/feedback, or `/no` in the chat"
            )
        behaviour = request.lesson.behaviour
        if request.ledger and behaviour is not None:
            given = [c for c in given if c.behaviour in (None, behaviour)]
        if request.objective == "sdft":
            teachable = [c for c in given if comment(c) is not None]
            if not teachable:
                raise BadInput(
                    f"none of {len(given)} corrections says what was wrong; `sdft` learns from `feedback`",
                    "say it: `/why` in the chat, `text` in POST /v1/feedback, `feedback` in a file",
                )
            return len(given), teachable
        teachable = [c for c in given if c.chosen is not None]
        if not teachable:
            told = any(comment(c) for c in given)
            raise BadInput(
                f"none of {len(given)} corrections says what was wanted",
                "add the corrected answer: `corrected` in feedback, `chosen` or `completion` in a file"
                + ("; or learn from what was said about it: `objective: sdft`" if told else ""),
            )
        return len(given), teachable

    def _teachable(
        self, corrections: list[Correction], distil: bool, passed_over: list[wire.PassedOver]
    ) -> list[Correction]:
        """Those that can be taught to this model; the others are named. Raises BadInput: there are none."""
        found: list[Correction] = []
        for c in corrections:
            reason = self._why_not(c, distil)
            if reason is None:
                found.append(c)
            else:
                passed_over.append(wire.PassedOver(id=str(c.id), reason=reason))
        if not found:
            first = passed_over[0]
            raise BadInput(
                f"none of {len(corrections)} corrections can be taught; {first.id}: {first.reason}",
                "amend them, or record others; GET /v1/corrections?states=true has the reason of each",
            )
        return found

    def _why_not(self, correction: Correction, distil: bool) -> str | None:
        """Why a correction cannot be taught to this model; None: it can."""
        try:
            if distil:
                self._encoder.distilled(correction, "it")
            else:
                work = self._encoder.work(correction, "it")
                self._encoder.check(work)
                refuse_equal(work)
        except BadInput as e:
            return e.message
        return None

    def obstacle(self, correction: Correction) -> str | None:
        """Why a correction cannot be taught to this model, by whatever objective suits it; None: nothing is known.

        What is short, of a shape that was rendered before, is not encoded: an import may bring thousands.
        """
        if correction.chosen is None and comment(correction) is None:
            return None  # a rating alone: there is nothing that could fail
        chosen = correction.chosen[0].content if correction.chosen else None
        turns = [*correction.prompt, *(correction.chosen or ()), *(correction.answered or ())]
        if correction.tools or any(m.has_calls for m in turns):
            return self._why_not(correction, distil=correction.chosen is None)
        roles = tuple(m.role for m in correction.prompt)
        texts = [m.content for m in correction.prompt]
        texts += [m[0].content for m in (correction.chosen, correction.answered) if m]
        most = sum(len(x.encode()) for x in (*texts, correction.feedback or ""))
        most += MIN_TOKENS_OF_A_TURN * (len(texts) + 1)
        differs = correction.chosen != correction.rejected and nothing_asked(correction) is None
        if roles in self._rendered and most < self._limit and differs and (chosen is None or chosen.strip()):
            return None
        reason = self._why_not(correction, distil=chosen is None)
        if reason is None:
            self._rendered.add(roles)
        return reason

    def show(self, plan: Plan) -> dict[str, Any]:
        """What a dry run answers: the plan, and what of it would be taught, decoded."""
        taught = [
            self._encoder.answer(c.prompt, c.chosen[0], "", Told.of(c))
            for c in plan.corrections
            if c.chosen and not plan.distilled
        ]
        doubted = doubts(self._tokenizer, plan.corrections)
        examples = [
            shown(
                self._tokenizer,
                work,
                [*doubted[i], *taught[i].notes] if i < len(taught) else (),
            )
            for i, work in enumerate(plan.examples[:MAX_SHOWN])
        ]
        examples += [
            shown(
                self._tokenizer,
                wire.TokenExample(d.context, [], label=d.label),
                [f"taught by what was said about it: {comment(d.correction)}", *doubted[i]],
            )
            for i, d in enumerate(plan.distilled[:MAX_SHOWN])
        ]
        return {
            **plan.summary(),
            "shown": examples,
            "notes": counted(doubted, taught),
        }


def _refuse_read(asked: list[list[int]], read: dict[ReadAs, list[list[int]]]) -> None:
    """What is read in training, in any role, is no evidence. Raises BadInput."""
    found = read_in_training(asked, read)
    if found:
        counts = Counter(role for roles in found.values() for role in roles)
        roles = ", ".join(f"{count} as {_READ_AS.get(role, role)}" for role, count in counts.items())
        raise BadInput(
            f"{len(found)} of {len(asked)} probes are not held out: what they ask is read in training, {roles}",
            "probes must ask prompts that the lesson never saw",
        )


def _spread(items: list[T], count: int) -> list[T]:
    """At most `count` of them, in order, from all over the list."""
    count = min(len(items), count)
    return [items[i * len(items) // count] for i in range(count)]


def _steps(request: wire.TrainRequest, per_epoch: int) -> int:
    if request.epochs is None and request.max_steps is None:
        until = request.until_margin is not None or request.until_passed is not None
        return DEFAULT_MAX_STEPS if until else per_epoch
    asked = [s for s in (request.max_steps, request.epochs and request.epochs * per_epoch) if s]
    return min(asked)
