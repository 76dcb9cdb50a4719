"""A plan: a training job with every default resolved, as pure data (server).

What a dry run answers, what is written into the lesson and what the trainer gets are all read from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from secondnature import wire
from secondnature.lessons.own_answers import Distilled, Own
from secondnature.lessons.retention import Retention
from secondnature.records import Cause, Correction, KlSet, Message, OptimizerSettings

__all__ = ["MAX_NAMED", "Plan", "Replay", "Sample"]

MAX_NAMED = 100
"""Corrections that are passed over and named, of any number."""


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
    development: list[wire.DevelopmentProbe]
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
    retention: Retention
    """What of earlier lessons is asked again."""

    @classmethod
    def without_training(
        cls,
        *,
        corrections: list[Correction],
        samples: list[Sample],
        digests: list[str],
        seed: int,
    ) -> Plan:
        """Of a change that comes from elsewhere than the trainer: only what is asked before and after."""
        return cls(
            objective="",
            steps=0,
            batch_size=0,
            seed=seed,
            examples=[],
            replay=[],
            distilled=[],
            sdft=wire.SdftSettings(),
            own=[],
            own_temperature=0.0,
            hold_own=False,
            replay_share=0.0,
            replay_match="answer",
            replay_weight=0.0,
            learned_loss=0.0,
            optimizer=OptimizerSettings(),
            development=[],
            until_margin=None,
            until_passed=None,
            look_every=1,
            corrections=corrections,
            samples=samples,
            skipped=0,
            passed_over=[],
            digests=digests,
            left_out={},
            retention=Retention(),
        )

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
            num_retained=len(self.retention.probes),
            retention_left_out=self.retention.left_out,
            num_retries=num_retries,
            num_passed_over=len(self.passed_over),
            passed_over={x.id: x.reason for x in self.passed_over[:MAX_NAMED]},
        )

    def settings(self) -> dict[str, Any]:
        """The resolved settings, as they are written into the lesson; empty where nothing is trained."""
        if not self.steps:
            return {}
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
            "retention": self.retention.summary(),
            "num_development": len(self.development),
            "num_generated": sum(x.spoken for x in self.development),
            "num_skipped": self.skipped,
            "num_passed_over": len(self.passed_over),
            "passed_over": [x.model_dump() for x in self.passed_over[:MAX_NAMED]],
            "num_continuation_tokens": sum(len(e.continuation) for e in self.examples),
            "longest_example_tokens": max(
                [len(e.context) + len(e.continuation) for e in self.examples]
                + [len(d.context) for d in self.distilled],
                default=0,
            ),
        }
