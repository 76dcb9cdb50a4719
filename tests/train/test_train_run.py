"""A job from its message to its end: each phase tells how far it is and can be cancelled; why it stops is said."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from tiny_models import VOCAB_SIZE, hybrid_config, in_arena, save_tiny
from torch import nn

from secondnature import wire
from secondnature.errors import Cancelled
from secondnature.records import STOPPED_BY
from secondnature.train import phases
from secondnature.train.looks import look_at
from secondnature.train.phases import Phases
from secondnature.train.run import TrainingRun
from secondnature.weights.arena import Arena
from secondnature.weights.content import content_id

Made = tuple[Arena, nn.Module]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return in_arena(save_tiny(hybrid_config(), tmp_path / "model"))


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every item is told."""
    monkeypatch.setattr(phases, "EVERY_S", 0.0)


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(2, VOCAB_SIZE), k=count)


def work(seed: int, **fields: Any) -> wire.TokenExample:
    return wire.TokenExample(tokens(6 + seed % 3, seed), tokens(3, 50 + seed), **fields)


def job(tmp_path: Path, **fields: Any) -> wire.Train:
    """Three pairs with replay of both kinds, looks and KL: every phase but the teacher."""
    looks = [
        wire.DevelopmentProbe(tokens(5, 20 + i), tokens(2, 30 + i), tokens(2, 40 + i), "right")
        for i in range(4)
    ]
    given: dict[str, Any] = {
        "job": "j1",
        "lesson": "l1",
        "objective": "dpo",
        "steps": 3,
        "batch_size": 2,
        "seed": 5,
        "examples": [work(i, rejected=tokens(2, 90 + i), label=f"example {i}") for i in range(3)],
        "replay": [work(10), work(11, by_distribution=True), work(12, by_distribution=True)],
        "replay_share": 0.5,
        "replay_weight": 1.0,
        "learned_loss": 0.0,
        "optimizer": {"lr": 1e-3, "rank": 4},
        "optimizer_in": None,
        "optimizer_out": str(tmp_path / "optimizer.safetensors"),
        "development": looks,
        "until_margin": None,
        "until_passed": None,
        "look_every": 1,
        "kl": {"new": [work(13), work(14)], "replay": [work(15)]},
    }
    return wire.Train(**{**given, **fields})


def nothing() -> None:
    """Nobody asked for the end."""


def run(
    made: Made, message: wire.Train, check: Callable[[], None] = nothing
) -> tuple[wire.Done, list[dict[str, Any]]]:
    told: list[dict[str, Any]] = []
    done = TrainingRun(made[1], made[0], message).run(told.append, check)
    return done, told


PHASES = [
    "loading the optimizer's state",
    "recording answers for the KL",
    "recording replay",
    "reading references",
    "looking at development probes",
    "training",
    "measuring the KL",
    "saving the optimizer's state",
]


@pytest.mark.usefixtures("often")
def test_every_phase_tells_how_far_it_is(made: Made, tmp_path: Path) -> None:
    before = str(tmp_path / "before.safetensors")
    run(made, job(tmp_path, optimizer_out=before, steps=1))
    done, told = run(made, job(tmp_path, optimizer_in=before))
    phase: dict[str, list[tuple[int, int]]] = {}
    for metric in told:
        if metric["kind"] == "phase":
            assert metric.keys() == {"kind", "phase", "done", "total"}
            assert metric["phase"] in get_args(wire.TrainerPhase)
            phase.setdefault(metric["phase"], []).append((metric["done"], metric["total"]))
    assert list(phase) == PHASES
    assert phase["training"] == [(0, 3), (1, 3), (2, 3)]
    assert phase["recording replay"] == [(0, 2), (0, 2), (1, 2)]
    assert phase["recording answers for the KL"] == [(0, 2), (0, 2), (1, 2), (0, 1), (0, 1)]
    looks = [(n, 4) for n in range(5)]
    assert phase["looking at development probes"] == looks * 4
    assert [n for n, _ in phase["reading references"]] == [0, 1, 2, 3]
    saved = phase["saving the optimizer's state"]
    assert len(saved) == saved[0][1] + 1 > 20
    assert [m["kind"] for m in told if m["kind"] != "phase"] == ["look", *["step", "look"] * 3, "kl", "kl"]
    data = (tmp_path / "optimizer.safetensors").read_bytes()
    assert done.optimizer_sha256 == hashlib.sha256(data).hexdigest()
    assert (done.stopped_by, done.steps) == ("max_steps", 3)


@pytest.mark.usefixtures("often")
def test_the_teacher_is_read_in_a_phase(made: Made, tmp_path: Path) -> None:
    _, told = run(made, job(tmp_path, objective="sdft", examples=[work(i) for i in range(3)], replay=[]))
    found = [m["done"] for m in told if m.get("phase") == "reading the teacher"]
    assert found == [0, 0, 1, 2]


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("phase", PHASES)
def test_a_cancel_ends_every_phase_before_its_next_item(made: Made, tmp_path: Path, phase: str) -> None:
    """And before the first write nothing is written; the state's file appears only when it is whole."""
    before = str(tmp_path / "before.safetensors")
    run(made, job(tmp_path, optimizer_out=before, steps=1))
    version = content_id(made[0].tensors)
    told: list[dict[str, Any]] = []
    asked = 0

    def check() -> None:
        nonlocal asked
        if told and told[-1].get("phase") == phase:
            asked += 1
            raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        TrainingRun(made[1], made[0], job(tmp_path, optimizer_in=before)).run(told.append, check)
    assert asked == 1
    assert [m["done"] for m in told if m.get("phase") == phase] == [0]
    assert not (tmp_path / "optimizer.safetensors").exists()
    if phase not in PHASES[6:]:
        assert content_id(made[0].tensors) == version
    assert made[0].writes[0] == made[0].writes[1]


def test_a_phase_is_told_a_few_times_a_second_and_asked_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told, asked = 100.0, [], 0

    def check() -> None:
        nonlocal asked
        asked += 1

    monkeypatch.setattr(phases, "time", SimpleNamespace(monotonic=lambda: now))
    watched = Phases(told.append, check)
    each = watched.begin("recording replay", 1000)
    for i in range(1, 1001):
        now += 0.001
        each(i)
    watched.begin("measuring the KL", 3)
    assert asked == 1002
    assert [m["done"] for m in told if m["phase"] == "recording replay"] == pytest.approx(
        [0, 200, 400, 600, 800, 1000], abs=3
    )
    assert told[-1] == {"kind": "phase", "phase": "measuring the KL", "done": 0, "total": 3}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "max_steps"),
        ({"until_margin": -1000.0}, "until_margin"),
        ({"until_passed": 0.5, "objective": "sft"}, "until_passed"),
        ({"until_passed": 0.5, "objective": "sft", "until_margin": -1000.0}, "until_margin and until_passed"),
        ({"learned_loss": 1000.0, "objective": "sft", "replay": [], "batch_size": 3}, "learned"),
    ],
)
def test_why_it_stopped_has_a_sentence(
    made: Made, tmp_path: Path, fields: dict[str, Any], expected: str
) -> None:
    """What is taught is looked at."""
    taught = [
        wire.DevelopmentProbe(w.context, w.continuation, w.rejected or [], "right")
        for w in job(tmp_path).examples
    ]
    strong = {"lr": 3e-3, "rank": 4}
    done, _ = run(made, job(tmp_path, development=taught, steps=60, optimizer=strong, **fields))
    assert done.stopped_by == expected
    assert (done.steps < 60) == (expected != "max_steps")
    assert STOPPED_BY[done.stopped_by]


def test_the_other_side_gives_way(made: Made, tmp_path: Path) -> None:
    """On the other side the model prefers one answer; the lesson teaches the other."""
    looks = []
    for look in job(tmp_path).development:
        ahead = look_at(made[1], [look])[0].margin > 0
        pair = (look.wanted, look.unwanted) if ahead else (look.unwanted, look.wanted)
        looks.append(wire.DevelopmentProbe(look.context, *pair, "other"))
    against = [wire.TokenExample(x.context, x.unwanted) for x in looks]
    strong = {"lr": 3e-3, "rank": 4}
    message = job(
        tmp_path, objective="sft", examples=against, development=looks, steps=60, optimizer=strong, replay=[]
    )
    done, _ = run(made, message)
    assert (done.stopped_by, done.steps < 60) == ("the other side gave way", True)


def test_the_table_of_reasons_is_whole() -> None:
    both = "until_margin and until_passed"
    assert set(STOPPED_BY) == {
        "max_steps",
        "until_margin",
        "until_passed",
        both,
        "the other side gave way",
        "learned",
        "nothing moved",
    }


def test_a_model_in_which_nothing_gets_a_gradient_is_told(made: Made, tmp_path: Path) -> None:
    for tensor in made[0].tensors.values():
        tensor.zero_()
    before = content_id(made[0].tensors)
    done, told = run(made, job(tmp_path, objective="sft", replay=[]))
    assert (done.stopped_by, done.steps) == ("nothing moved", 3)
    assert [m["grad_norm"] for m in told if m["kind"] == "step"] == [0.0] * 3
    assert not any(m["written"] for m in done.moved)
    assert content_id(made[0].tensors) == before
