"""Every option of POST /v1/train acts: one value changed, other weights (or another plan, where it is about that).

The tables must name every field of the settings' models: an option that is added and does nothing turns this red.
"""

from __future__ import annotations

from typing import Any

import pytest
from tiny_server import Running, habits, running, teach

from secondnature.records import Lesson, OptimizerSettings
from secondnature.wire import ReplaySettings, SdftSettings, TrainRequest

SAY = [{"prompt": q, "completion": a} for q, a in habits() if "Say" in q]
PROBE = {"prompt": "Use mud.", "behaviour": "use", "check": {"prefers": ["Done.", "Why not ink?"]}}
ASKED = [{"prompt": entry["prompt"]} for entry in SAY[4:8]]
BASE: dict[str, Any] = {
    "max_steps": 3,
    "batch_size": 3,
    "replay": {"share": 0.5, "examples": SAY[:4]},
    "optimizer": {"lr": 3e-3},
}
"""On the four corrections of `teach`."""

OPTIMIZER: dict[str, Any] = {
    "lr": 2e-3,
    "rank": 8,
    "betas": (0.5, 0.9),
    "eps": 0.1,
    "weight_decay": 0.5,
    "warmup_steps": 5,
    "scale": 0.5,
    "proj_refresh": 1,
    "norm_growth_limit": 1e6,
    "cooldown": 1.0,
}
REPLAY: dict[str, dict[str, Any]] = {
    "share": {"share": 0.2},
    "match": {"match": "distribution"},
    "weight": {"match": "distribution", "weight": 1000},
    "examples": {"examples": SAY[4:8]},
    "prompts": {"prompts": ASKED},
    "temperature": {"prompts": ASKED, "temperature": 5},
}
SDFT: dict[str, Any] = {"samples": 2, "temperature": 0}
REQUEST: dict[str, dict[str, Any]] = {
    "objective": {"objective": "sft"},
    "epochs": {"epochs": 1},
    "batch_size": {"batch_size": 4},
    "max_steps": {"max_steps": 2},
    "until_margin": {"until_margin": -1000},
    "until_passed": {"until_passed": 0.001, "max_steps": 20, "development": [PROBE]},
    "learned_loss": {"learned_loss": 1000},
    "look_every": {"look_every": 2, "until_margin": -1000},
    "development": {"until_margin": 0, "max_steps": 20, "development": [PROBE]},
    "seed": {"seed": 7},
}
AGAINST: dict[str, dict[str, Any]] = {
    "weight": {"replay": {**BASE["replay"], "match": "distribution"}},
    "temperature": {"replay": {**BASE["replay"], "prompts": ASKED}},
    "look_every": {"until_margin": -1000},
    "until_passed": {"max_steps": 20},
    "development": {"until_margin": 0, "max_steps": 20},
}
"""What a change is compared with, where it is not BASE."""
ELSEWHERE = {
    "examples": "test_lessons_judged",
    "corrections": "test_lessons_judged",
    "ledger": "test_lessons_judged",
    "replay": "here, by field",
    "optimizer": "here, by field",
    "sdft": "here, by field",
    "dry_run": "test_lessons_judged",
    "idempotency_key": "test_lessons_runner",
    "keep": "test_lessons_undo",
    "probes": "test_lessons_judged",
    "guards": "test_lessons_guards",
    "prompting": "test_lessons_guards",
    "retention": "test_lessons_retention",
    "gate": "test_lessons_judged",
    "lesson": "test_lessons_judged",
}


def trained(server: Running, **changes: Any) -> Lesson:
    """A lesson on trial, and taken back at once."""
    lesson = server.lesson(teach(**{**BASE, **changes}), "on_trial")
    server.client.revert(lesson.id)
    return lesson


@pytest.fixture(scope="module")
def versions() -> dict[str, str]:
    """The versions that the comparisons ended in, by what was asked."""
    return {}


def changed(server: Running, versions: dict[str, str], name: str, **changes: Any) -> None:
    against = AGAINST.get(name, {})
    key = str(against)
    if key not in versions:
        versions[key] = str(trained(server, **against).version)
    assert trained(server, **changes).version != versions[key], f"`{name}` changes nothing"


def test_the_same_request_gives_the_same_weights(server: Running) -> None:
    """Or the comparisons below would mean nothing."""
    first, again = trained(server), trained(server)
    assert first.version == again.version != first.parent


def test_the_tables_are_whole() -> None:
    assert set(OPTIMIZER) == set(OptimizerSettings.model_fields)
    assert {*REPLAY, "lessons"} == set(ReplaySettings.model_fields)
    assert set(SDFT) == set(SdftSettings.model_fields)
    assert {*REQUEST, *ELSEWHERE} == set(TrainRequest.model_fields)


@pytest.mark.parametrize("name", OPTIMIZER)
def test_every_option_of_the_optimizer_changes_the_weights(
    server: Running, versions: dict[str, str], name: str
) -> None:
    changed(server, versions, name, optimizer={**BASE["optimizer"], name: OPTIMIZER[name]})


@pytest.mark.parametrize("name", REPLAY)
def test_every_option_of_replay_changes_the_weights(
    server: Running, versions: dict[str, str], name: str
) -> None:
    changed(server, versions, name, replay={**BASE["replay"], **REPLAY[name]})


@pytest.mark.parametrize("name", SDFT)
def test_every_option_of_self_distillation_changes_the_weights(server: Running, name: str) -> None:
    told = [{**c, "feedback": "Just do it."} for c in teach().model_dump(mode="json")["corrections"]]
    found = [
        trained(server, corrections=told, objective="sdft", sdft=sdft, replay={"share": 0}).version
        for sdft in ({}, {name: SDFT[name]})
    ]
    assert found[0] != found[1]


@pytest.mark.parametrize("name", REQUEST)
def test_every_option_of_a_request_changes_the_weights(
    server: Running, versions: dict[str, str], name: str
) -> None:
    changed(server, versions, name, **REQUEST[name])


def test_weights_of_examples_change_the_weights(server: Running) -> None:
    one = {"context_ids": [3, 40, 4], "continuation_ids": [50, 1]}
    other = {"context_ids": [3, 60, 4], "continuation_ids": [70, 1]}
    found = [
        trained(server, corrections=None, examples=[{**one, "weight": w}, other]).version for w in (1.0, 50.0)
    ]
    assert found[0] != found[1]


def test_earlier_lessons_are_replayed_and_another_rank_starts_afresh(talker: Any, tmp_path: Any) -> None:
    """`replay.lessons`; a rank other than that of the state; and an undo that gives back the state of before.

    The second lesson waits while the first is on trial: the state that it starts from, and that its undo goes back
    to, is that of its start and not that of its request.
    """
    with running(tmp_path / "home", talker) as server:
        first = server.client.train(teach(["tea", "oak"], **BASE))
        server.until(first.job, lambda s: s.phase == "on trial")
        second = server.client.train(teach(["red"], **{**BASE, "optimizer": {"lr": 3e-3, "rank": 8}}))
        server.client.keep(str(first.lesson))
        before = server.state()
        assert before[2] is not None
        server.until(second.job, lambda s: s.phase == "on trial")
        lesson = server.client.lesson(second.lesson or "").lesson
        assert (lesson.optimizer_before, lesson.version != lesson.parent) == (first.lesson, True)
        server.client.keep(lesson.id)
        assert server.state()[2] != before[2]
        server.client.revert(lesson.id)
        assert server.state() == before
        found = [
            trained(server, corrections=None, **ids(), replay={"share": 0.5, "lessons": on}).version
            for on in (True, False)
        ]
        assert found[0] != found[1]


def ids() -> dict[str, Any]:
    return {"examples": [{"context_ids": [3, 40, 4], "continuation_ids": [50, 1]}], "batch_size": 4}
