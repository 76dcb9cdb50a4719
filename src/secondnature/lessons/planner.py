"""From a request to a plan: everything that can be wrong with a training job is found here, before a write.

Pure data in, pure data out (plan, validate, apply): corrections become token ids, defaults are spelled out, and
what cannot be trained on is refused by name. A dry run ends here.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeVar

from secondnature import wire
from secondnature.errors import BadExample, BadInput, ContextOverflow
from secondnature.evidence.gate import ReadAs, read_in_training
from secondnature.lessons.own_answers import Distilled, Own, comment, teacher_messages
from secondnature.lessons.prober import named
from secondnature.lessons.shown import MAX_SHOWN, counted, doubts, shown
from secondnature.model.chat import Taught, encode_chat, teach
from secondnature.model.tools import takes_tools
from secondnature.records import Cause, Correction, KlSet, Message, OptimizerSettings, Probe, Prompt, digest
from secondnature.train.batches import num_replayed

T = TypeVar("T")
_READ_AS = {"example": "taught", "student": "taught", "development probe": "development probes"}
_Tools = list[dict[str, Any]] | None
_TokenIds = tuple[list[int], list[int], list[int] | None]
"""(context, wanted answer, rejected answer); nobody writes into them."""
DEFAULT_LR = 1e-5
DEFAULT_MAX_STEPS = 100
"""Where only a margin says when to stop."""
MAX_KL_PROMPTS = 16
"""Prompts per set on which KL(base || tuned) is measured."""


@dataclass(frozen=True)
class Sample:
    """A prompt that is answered before and after the lesson: for the reader, and for the KL between the two."""

    on: KlSet
    context: list[int]
    prompt: list[Message] | None = None
    """None: a raw example, whose text is not shown."""
    wanted: str | None = None


@dataclass(frozen=True)
class Replay:
    """What is mixed in against forgetting, and what is not."""

    works: list[wire.TokenExample]
    own: list[Own]
    samples: list[Sample]
    left_out: dict[str, int]

    def leave_out(self, why: str) -> None:
        """Count one that is not replayed."""
        self.left_out[why] = self.left_out.get(why, 0) + 1


MAX_NAMED = 100
"""Corrections that are passed over and named, of any number."""
MIN_TOKENS_OF_A_TURN = 16
"""Of what a template writes around a turn; guessed high, for what fits by it is not looked at more closely."""


@dataclass(frozen=True)
class Plan:
    """A training job with every default resolved."""

    objective: str
    steps: int
    batch_size: int
    seed: int
    examples: list[wire.TokenExample]
    replay: list[wire.TokenExample]
    distilled: list[Distilled]
    """With `sdft`, instead of `examples`: the answers are sampled when the lesson begins."""
    sdft: wire.SdftSettings
    own: list[Own]
    """Replay whose answers are sampled when the lesson begins."""
    own_temperature: float
    hold_own: bool
    """The answers to `own` are held by distribution."""
    replay_share: float
    replay_match: wire.ReplayMatch
    replay_weight: float
    learned_loss: float
    optimizer: OptimizerSettings
    development: list[wire.MarginProbe]
    until_margin: float | None
    until_passed: float | None
    look_every: int
    corrections: list[Correction]
    """What the examples were made from; empty for raw token ids."""
    samples: list[Sample]
    """Prompts that are answered before and after the lesson."""
    skipped: int
    """Corrections from which this objective learns nothing, those that are passed over among them."""
    passed_over: list[wire.PassedOver]
    """Corrections of the ledger that cannot be taught to this model, and why."""
    digests: list[str]
    """Of the tokens of every example, or of the comment it is taught by: what counts as the same lesson again."""
    left_out: dict[str, int]
    """What is not replayed, and why: `asked by a probe`, `too long`."""

    @property
    def num_examples(self) -> int:
        """Examples of the lesson, sampled ones included."""
        return len(self.examples) + len(self.distilled) * self.sdft.samples

    def cause(self, num_retries: int) -> Cause:
        """What the lesson's entry says about its origin."""
        return Cause(
            corrections=[c.digest() for c in self.corrections],
            examples=self.digests,
            num_examples=self.num_examples,
            num_replay=len(self.replay) + len(self.own),
            num_replay_left_out=sum(self.left_out.values()),
            num_retries=num_retries,
            num_passed_over=len(self.passed_over),
            passed_over={x.id: x.reason for x in self.passed_over[:MAX_NAMED]},
        )

    def settings(self) -> dict[str, Any]:
        """The resolved settings, as they are written into the lesson."""
        return {
            "objective": self.objective,
            **({"sdft": self.sdft.model_dump(mode="json")} if self.distilled else {}),
            "steps": self.steps,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "replay_share": self.replay_share,
            "replay_match": self.replay_match,
            **(
                {
                    "replay_prompts_match": "distribution" if self.hold_own else "answer",
                    "replay_temperature": self.own_temperature,
                }
                if self.own
                else {}
            ),
            "replay_weight": self.replay_weight,
            "learned_loss": self.learned_loss,
            "until_margin": self.until_margin,
            "until_passed": self.until_passed,
            "look_every": self.look_every,
            "optimizer": self.optimizer.model_dump(mode="json"),
        }

    def summary(self) -> dict[str, Any]:
        """What a dry run answers."""
        return {
            **self.settings(),
            "num_examples": self.num_examples,
            "num_replay": len(self.replay) + len(self.own),
            "replay_left_out": self.left_out,
            "num_development": len(self.development),
            "num_skipped": self.skipped,
            "num_passed_over": len(self.passed_over),
            "passed_over": [x.model_dump() for x in self.passed_over[:MAX_NAMED]],
            "num_continuation_tokens": sum(len(e.continuation) for e in self.examples),
            "longest_example_tokens": max(
                [len(e.context) + len(e.continuation) for e in self.examples]
                + [len(d.context) for d in self.distilled]
            ),
        }


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
        self._vocab_size = vocab_size
        self._limit = context_limit
        self._highest_rank = highest_rank
        self._default_lr = default_lr or DEFAULT_LR
        self._between: set[tuple[int, ...]] = set()
        """What the template was seen to write between its prompt and an answer."""
        self._encoded: dict[str, _TokenIds] = {}
        """Of what the kept lessons taught, by digest: every plan asks for all of it."""
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
            distilled = [self._distilled(c, f"correction {i}") for i, c in enumerate(corrections)]
        else:
            examples = [self._work(c, f"correction {i}") for i, c in enumerate(corrections)]
        development = [self._look(p, i) for i, p in enumerate(request.development)]
        asked = [self._context(p.prompt, f"probe {i}") for i, p in enumerate(request.probes)]
        replay = self._replay(
            request.replay, earlier, {c.digest() for c in corrections}, {tuple(ids) for ids in asked}
        )
        _refuse_read(
            asked,
            {
                "example": [self._prompt_of(x.context) for x in examples],
                "student": [x.context for x in distilled],
                "development probe": [self._prompt_of(x.context) for x in development],
                "replay": [self._prompt_of(x.context) for x in replay.works],
                "own answer": [x.context for x in replay.own],
            },
        )
        for work in examples:
            self._check(work)
            _refuse_equal(work)
        objective = request.objective or ("orpo" if all(e.rejected for e in examples) else "sft")
        num_examples = len(examples) + len(distilled) * request.sdft.samples
        if objective not in ("sft", "sdft"):
            missing = next((e.label for e in examples if e.rejected is None), None)
            if missing is not None:
                raise BadInput(
                    f"{missing} has no rejected answer; `{objective}` needs one", "use `sft`, or add it"
                )
        alone = bool(distilled) or any(e.rejected is None for e in examples)
        if request.until_margin is not None and not development and alone:
            raise BadInput(
                "`until_margin` has nothing to look at: no development probes, and an example lacks `rejected` "
                "(or, with `sdft`, is not written yet)",
                "send `development` probes with `prefers`, or use `max_steps`",
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
            encoded = self._encoded
            self._encoded = {d: encoded[d] for d in digests if d in encoded}
        num_own = len(settings.examples) + len(settings.prompts)
        by_distribution = settings.match == "distribution"
        for i, (item, label) in enumerate(given):
            try:
                written = isinstance(item, Correction) and item.chosen is not None
                if isinstance(item, Correction) and item.chosen is not None:
                    work = self._work(
                        item, label, by_distribution=by_distribution, known_as=known.get(id(item))
                    )
                else:  # with room for an answer of one token
                    work = wire.TokenExample(self._context(item.prompt, label), [0], label=label)
                self._check(work)
            except BadInput as e:
                if i < num_own:
                    raise
                found.leave_out("too long" if isinstance(e, ContextOverflow) else "cannot be taught")
                continue
            prompt = self._prompt_of(work.context)
            if tuple(prompt) in asked:
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
                encode_chat(self._tokenizer, c.prompt, tools=c.tools),
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
                self._distilled(correction, "it")
            else:
                work = self._work(correction, "it")
                self._check(work)
                _refuse_equal(work)
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
        differs = correction.chosen != correction.rejected
        if roles in self._rendered and most < self._limit and differs and (chosen is None or chosen.strip()):
            return None
        reason = self._why_not(correction, distil=chosen is None)
        if reason is None:
            self._rendered.add(roles)
        return reason

    def _distilled(self, correction: Correction, label: str) -> Distilled:
        """Raises ContextOverflow where prompt, wrong answer and comment alone fill the model's context."""
        tools = correction.tools
        found = Distilled(correction, self._context(correction.prompt, label, tools), label)
        teacher = self._context(teacher_messages(correction, ""), label, tools)
        self._check(wire.TokenExample(teacher, [0], label=f"{label}, with the wrong answer and the comment"))
        return found

    def _work(
        self,
        correction: Correction,
        label: str,
        *,
        by_distribution: bool = False,
        known_as: str | None = None,
    ) -> wire.TokenExample:
        """`known_as`: the digest of what will be asked for again."""
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
        if not correction.chosen[0].content.strip():
            raise BadExample(f"{label}: the wanted answer is blank", "write it, or leave the record out")
        wanted = self._answer(correction.prompt, correction.chosen[0], label, correction.tools)
        rejected = None
        if correction.rejected is not None:
            other = self._answer(correction.prompt, correction.rejected[0], label, correction.tools)
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

    def _look(self, probe: Probe, index: int) -> wire.MarginProbe:
        assert probe.check.prefers is not None, "checked by the request"
        label = f"development probe {index}"
        wanted, unwanted = (
            self._answer(probe.prompt, Message(role="assistant", content=text), label)
            for text in probe.check.prefers
        )
        if wanted.context != unwanted.context:
            raise BadInput(
                f"{label}: one of the two answers brings thoughts of its own, the other does not",
                "write both with `<think>`, or neither",
            )
        look = wire.MarginProbe(wanted.context, wanted.continuation, unwanted.continuation, probe.side)
        self._check(wire.TokenExample(look.context, look.wanted, look.unwanted, 1.0, label))
        return look

    def _context(self, prompt: list[Message], label: str, tools: _Tools = None) -> list[int]:
        """Token ids of a prompt; one that cannot fit is not encoded. Raises ContextOverflow, BadInput."""
        with named(label):
            self._check_tools(prompt, tools)
            return encode_chat(self._tokenizer, prompt, limit=self._limit, tools=tools)

    def _answer(self, prompt: list[Message], answer: Message, label: str, tools: _Tools = None) -> Taught:
        """An answer as token ids; what cannot fit is not encoded. Raises ContextOverflow, BadInput."""
        with named(label):
            self._check_tools(prompt, tools)
            found = teach(self._tokenizer, prompt, answer, limit=self._limit, tools=tools)
        if found.between:
            self._between.add(tuple(found.between))
        return found

    def _check_tools(self, prompt: list[Message], tools: _Tools) -> None:
        """Raises BadInput: the template would leave out what the model was shown."""
        if (tools or any(m.has_calls for m in prompt)) and not takes_tools(self._tokenizer):
            raise BadInput(
                "tools were shown to the model or called, and this model's chat template shows none",
                "teach it to a model whose template does, or record it without them",
            )

    def _prompt_of(self, context: list[int]) -> list[int]:
        """What is asked in a context: without what the template writes between its prompt and an answer."""
        for between in self._between:
            if tuple(context[-len(between) :]) == between:
                return context[: -len(between)]
        return context

    def show(self, plan: Plan) -> dict[str, Any]:
        """What a dry run answers: the plan, and what of it would be taught, decoded."""
        taught = [
            self._answer(c.prompt, c.chosen[0], "", c.tools)
            for c in plan.corrections
            if c.chosen and not plan.distilled
        ]
        examples = [
            shown(
                self._tokenizer,
                work,
                [*doubts(self._tokenizer, plan.corrections[i]), *taught[i].notes] if i < len(taught) else (),
            )
            for i, work in enumerate(plan.examples[:MAX_SHOWN])
        ]
        examples += [
            shown(
                self._tokenizer,
                wire.TokenExample(d.context, [], label=d.label),
                [
                    f"taught by what was said about it: {comment(d.correction)}",
                    *doubts(self._tokenizer, d.correction),
                ],
            )
            for d in plan.distilled[:MAX_SHOWN]
        ]
        return {
            **plan.summary(),
            "shown": examples,
            "notes": counted(self._tokenizer, plan.corrections, taught),
        }

    def _check(self, work: wire.TokenExample) -> None:
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


def _refuse_equal(work: wire.TokenExample) -> None:
    """Raises BadExample: nothing can be learned from two answers that are one."""
    if work.rejected == work.continuation:
        raise BadExample(
            f"{work.label}: the rejected answer is the wanted one; expected two different answers",
            "correct one of them, or leave `rejected` out",
        )


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
