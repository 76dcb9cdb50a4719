"""TEST FIXTURE: invents the run directories of lessons that never took place; none of its figures was measured."""

from __future__ import annotations

import json
import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from scipy.stats import beta

from secondnature.records import (
    Cause,
    Comparison,
    Correction,
    Decision,
    Evidence,
    Flip,
    Lesson,
    Message,
    Moved,
    SampleAnswer,
    to_jsonl,
)

START = datetime(2031, 1, 2, 9, 30, tzinfo=UTC)
THINGS = ["the pages", "the numbers", "my notes", "the names", "these lines", "the dates"]


def clopper_pearson(k: int, n: int) -> tuple[float, float]:
    low = float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    return low, float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0


def comparison(
    name: str,
    role: Literal["gain", "other", "guard"],
    n: int,
    before: int,
    gains: int,
    losses: int,
    *,
    passed: bool | None,
    flips: int | None = None,
    n_needed: int | None = None,
) -> Comparison:
    difference = (gains - losses) / n
    half = 1.96 * math.sqrt(max(gains + losses, 1)) / n
    decision: Decision = "not_judged"
    if passed is not None:
        shown_as: Decision = "gained" if role == "gain" else "held"
        decision = shown_as if passed else "harmed" if difference + half < 0 else "not_shown"
    shown = [
        Flip(
            prompt=f"fixture {name} probe {i}: sort {THINGS[i % 6]} by length",
            before="I could also list them by date instead. Would you prefer that?"
            if gained
            else "Done: sorted.",
            after="Done: sorted by length." if gained else "Sure! sure sure sure",
            gained=gained,
        )
        for gained, number in ((True, gains), (False, losses))
        for i in range(number if flips is None else flips)
    ]
    return Comparison(
        name=name,
        role=role,
        n=n,
        num_seeds=max(1, n // 3),
        before=before,
        after=before + gains - losses,
        gains=gains,
        losses=losses,
        before_interval=clopper_pearson(before, n),
        after_interval=clopper_pearson(before + gains - losses, n),
        difference_interval=(difference - half, difference + half),
        margin={"gain": None, "other": 0.10, "guard": 0.05}[role],
        alpha=0.025,
        method="mcnemar-midp/1" if role == "gain" else "paired-noninferiority/1",
        p=1e-9 if role == "gain" else 0.0031,
        decision=decision,
        passed=passed,
        harmed=decision == "harmed",
        n_needed=n_needed,
        flips=shown,
    )


def corrections() -> list[Correction]:
    return [
        Correction(
            prompt=[Message(role="user", content=f"Please sort {thing} by length.")],
            rejected=[
                Message(role="assistant", content=f"You could also sort {thing} by date. Shall I do that?")
            ],
            chosen=[Message(role="assistant", content=f"Yes. Sorting {thing} by length.")],
            behaviour="listening",
            feedback="I said what I wanted.",
        )
        for thing in THINGS
    ]


def metric_lines(steps: int, *, drilled: bool = False) -> list[dict[str, Any]]:
    rng = random.Random(7)
    lines: list[dict[str, Any]] = []
    speed = 3.0 if drilled else 1.0
    for step in range(steps + 1):
        if step:
            loss = 2.4 * math.exp(-0.16 * speed * step) + 0.35 + rng.uniform(-0.06, 0.06)
            lines.append(
                {"kind": "step", "step": step, "loss": loss, "tokens_per_s": 240.0, "grad_norm": 2 * loss}
            )
        right = [-6 + 0.75 * speed * step + rng.gauss(0, 2.2) for _ in range(24)]
        other = [7 - 0.22 * speed * step * (3 if drilled else 1) + rng.gauss(0, 2.0) for _ in range(24)]
        shares = {"right": sum(m > 0 for m in right) / 24, "other": sum(m > 0 for m in other) / 24}
        look: dict[str, Any] = {"step": step, "margins": {"right": right, "other": other}, "passed": shares}
        if drilled:  # the other one is of an older version
            lost = [24 + i for i, m in enumerate(other) if step and m <= 0]
            said = [{"probe": i, "passed": False, "answer": "Yes, I will <do> that."} for i in lost[:16]]
            look |= {"asked": {"right": 24, "other": 24}, "lost": lost, "answers": said}
        lines.append({"kind": "look", **look})
    new = [rng.lognormvariate(-0.6 + drilled, 0.7) for _ in range(24)]
    replay = [rng.lognormvariate(-5 + 4 * drilled, 0.9) for _ in range(40)]
    lines.append({"kind": "kl", "on": "new", "mean": sum(new) / 24, "per_prompt": new})
    lines.append({"kind": "kl", "on": "replay", "mean": sum(replay) / 40, "per_prompt": replay})
    lines.append({"kind": "from-the-future", "anything": [1, 2]})
    return lines


def moved(num_layers: int = 8) -> list[Moved]:
    rng = random.Random(3)
    linear = ["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "conv1d", "A_log", "dt_bias"]
    tensors: list[Moved] = []
    for layer in range(num_layers):
        attention = layer % 4 == 3
        kinds = [f"self_attn.{k}" for k in ("q_proj", "k_proj", "v_proj", "o_proj")] if attention else []
        kinds += [] if attention else [f"linear_attn.{k}" for k in linear]
        kinds += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm"]
        for kind in kinds:
            relative = 0.004 * math.exp(rng.gauss(0, 0.5)) * (0.3 + layer / num_layers)
            relative *= 0.02 if kind.endswith(("norm", "A_log", "dt_bias")) else 1
            name = f"model.layers.{layer}.{kind}" + ("" if kind.endswith(("A_log", "dt_bias")) else ".weight")
            tensors.append(
                Moved(name=name, layer=layer, intended=9 * relative, relative=relative, written=11 * relative)
            )
    tensors.append(Moved(name="model.embed_tokens.weight", intended=0.01, relative=0.0009, written=0.013))
    return tensors


def lesson(id_: str, **changes: Any) -> Lesson:
    number, _, behaviour = id_.partition("-")
    fields: dict[str, Any] = {
        "id": id_,
        "number": int(number),
        "job": f"job-{number}-fixture",
        "state": "kept",
        "behaviour": behaviour,
        "note": "TEST FIXTURE: this lesson never took place",
        "parent": "w-3f9a1c0b7d52",
        "version": "w-b81e6640aa19",
        "cause": Cause(corrections=[c.digest() for c in corrections()], num_examples=6, num_replay=24),
        "settings": {
            "objective": "orpo",
            "batch_size": 6,
            "max_steps": 16,
            "until_margin": 4.0,
            "seed": 1,
            "optimizer": {
                "name": "apollo",
                "lr": 2e-4,
                "rank": 8,
                "betas": [0.9, 0.999],
                "norm_growth_limit": 1.01,
            },
            "replay": {"share": 0.5, "source": None},
        },
        "steps": 14,
        "loss": 0.59,
        "kl": {"new": 0.75, "replay": 0.002},
        "moved": moved(),
        "delta_sha256": "5d" * 32,
        "verdict": "kept",
        "created_at": START,
        "started_at": START + timedelta(seconds=1),
        "ended_at": START + timedelta(seconds=49),
    }
    return Lesson(**{**fields, **changes})


def evidence(comparisons: list[Comparison], **changes: Any) -> Evidence:
    fields: dict[str, Any] = {
        "verdict": "kept",
        "sentence": "Kept: listening rose from 5 % to 88 % of 60 held-out directions, and no guard got worse.",
        "before_version": "w-3f9a1c0b7d52",
        "after_version": "w-b81e6640aa19",
        "comparisons": comparisons,
        "d_prime_before": 0.4,
        "d_prime_after": 2.6,
        "alpha": 0.025,
        "probes_sha256": "ab" * 32,
        "created_at": START,
    }
    return Evidence(**{**fields, **changes})


def write_run(home: Path, lesson_: Lesson, evidence_: Evidence | None, *, drilled: bool = False) -> Path:
    """A lesson directory with everything in it, as a home would have it."""
    directory = home / "lessons" / lesson_.id
    directory.mkdir(parents=True)
    (directory / "lesson.json").write_text(lesson_.model_dump_json())
    if evidence_ is not None:
        (directory / "evidence.json").write_text(evidence_.model_dump_json())
    taught = corrections()[: 1 if drilled else None]
    (directory / "corrections.jsonl").write_text(to_jsonl(taught))
    lines = metric_lines(14, drilled=drilled)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = [
        SampleAnswer(
            prompt=[Message(role="user", content="Write a Python function that doubles a number.")],
            before="def double(x):\n    return 2 * x",
            after="Yes. Doubling. Yes." if drilled else "def double(x):\n    return 2 * x",
            behaviour="code",
        )
    ]
    for c in taught:
        assert c.chosen is not None
        assert c.rejected is not None
        said, wanted = c.rejected[0].content, c.chosen[0].content
        answers.append(SampleAnswer(prompt=c.prompt, before=said, after=wanted, wanted=wanted))
    (directory / "answers.jsonl").write_text(to_jsonl(answers))
    return directory


def listening(home: Path) -> Path:
    """The lesson that is kept."""
    sets = [
        comparison("listening", "gain", 60, 3, 51, 1, passed=True),
        comparison("listening", "other", 120, 116, 1, 3, passed=True),
        comparison("code", "guard", 300, 297, 1, 2, passed=True),
        comparison("look-up", "guard", 300, 156, 9, 7, passed=True),
        comparison("arithmetic", "guard", 300, 12, 2, 1, passed=None).model_copy(
            update={"note": "no guard: the model fails it anyway"}
        ),
    ]
    return write_run(home, lesson("0001-listening"), evidence(sets))


def overreach(home: Path) -> Path:
    """The lesson that is undone."""
    sets = [
        comparison("listening", "gain", 60, 3, 55, 0, passed=True),
        comparison("listening", "other", 120, 116, 0, 94, passed=False),
        comparison("code", "guard", 300, 300, 0, 246, passed=False),
        comparison("look-up", "guard", 90, 47, 2, 4, passed=False, n_needed=310),
    ]
    text = "Undone: code fell from 100 % to 18 %, which no gain in listening can pay for."
    record = lesson(
        "0002-overreach", state="undone", verdict="undone", parent="w-b81e6640aa19", version="w-77c0de"
    )
    return write_run(
        home, record, evidence(sets, verdict="undone", sentence=text, d_prime_after=0.1), drilled=True
    )
