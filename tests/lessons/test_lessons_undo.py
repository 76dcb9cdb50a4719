"""However a lesson ends that is not kept, weights and optimizer state are the bytes from before it."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from tiny_server import Running, teach

from secondnature.errors import WrongState
from secondnature.records import OptimizerSettings
from secondnature.weights.arena import Arena


@pytest.fixture
def kept(server: Running) -> Iterator[str]:
    """A kept lesson, so that the state before has deltas and an optimizer of its own; taken back afterwards."""
    lesson = server.lesson(teach(["jam"], keep=True, max_steps=2))
    assert lesson.state == "kept"
    yield lesson.id
    server.client.revert(lesson.id)


LONG = {"max_steps": 2000, "lesson": {"behaviour": "use"}}


def start(server: Running, **fields: object) -> str:
    """A long lesson that is writing now."""
    job = server.client.train(teach(**{**LONG, **fields})).job
    server.until(job, lambda s: s.phase == "training" and s.step >= 2)
    return job


def test_a_lesson_in_mid_training_ends_as_if_it_had_never_been(server: Running, kept: str) -> None:
    """Cancel, kill -9 of the trainer, NaN in the arena: one after another, on a state with a kept lesson."""
    before = server.state()
    assert before[2] is not None

    job = start(server)
    assert server.weights != before[1]  # written in place while it runs
    assert server.client.lessons().weights_version.startswith(before[1] + "+")
    status = server.client.cancel(job)
    assert (status.state, server.state()) == ("cancelled", before)

    job = start(server)
    pid = server.parts.runner.trainer.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    status = server.until(job, lambda s: s.state == "failed" and s.phase == "done")
    assert status.error is not None
    assert (status.error.type, server.state()) == ("TrainerDied", before)

    job = start(server)  # the next one works, in a new process
    assert server.parts.runner.trainer.pid not in (None, pid)
    other = Arena.attach(server.parts.arena.manifest())
    for name in (
        "model.norm.weight",
        "model.embed_tokens.weight",
    ):  # a write under way heals one of them at most
        other.tensors[name].fill_(math.nan)
    status = server.until(job, lambda s: s.state == "failed" and s.phase == "done")
    assert status.error is not None
    assert (status.error.type, server.state()) == ("NonFinite", before)
    assert all(bool(torch.isfinite(t).all()) for t in server.parts.arena.tensors.values())
    assert server.say("Say tea.") == "tea!"

    ended = {x.state for x in server.client.lessons().lessons if x.settings.get("steps") == 2000}
    assert ended == {"cancelled", "failed"}


def test_a_wild_learning_rate_is_undone(server: Running) -> None:
    """The norms keep this model's loss finite whatever the weights are, so it gets its trial, and ruins it."""
    before = server.state()
    wild = OptimizerSettings(lr=1.0, scale=1e6, norm_growth_limit=1e6)
    lesson = server.lesson(teach(optimizer=wild, max_steps=3))
    assert lesson.state in ("on_trial", "failed")
    if lesson.state == "on_trial":
        assert server.say("Say tea.") != "tea!"
        server.client.revert(lesson.id)
    assert server.state() == before
    assert server.say("Say tea.") == "tea!"


def test_an_undone_lesson_leaves_no_weights_behind(server: Running) -> None:
    before = server.state()
    lesson = server.lesson(teach())
    assert (lesson.state, lesson.version) == ("on_trial", server.weights)
    assert server.weights != before[1]
    undone = server.client.revert(lesson.id)
    assert (undone.state, server.state()) == ("undone", before)
    names = {p.name for p in server.parts.runner.log.directory(undone).iterdir()}
    assert names >= {"lesson.json", "corrections.jsonl", "metrics.jsonl", "answers.jsonl"}
    assert not names & {"delta.safetensors", "optimizer.safetensors"}


def test_a_revert_and_its_revert_restore_weights_and_moments(server: Running) -> None:
    """Two lessons form a stack: only the newest can be taken back; taking back a revert gives it back."""
    start = server.state()
    first = server.lesson(teach(["jam"], keep=True, max_steps=1))
    one = server.state()
    second = server.lesson(teach(["hats"], keep=True, max_steps=1))
    two = server.state()
    assert len({start, one, two}) == 3

    with pytest.raises(WrongState, match=rf"later lessons stand on {first.id}: {second.id}"):
        server.client.revert(first.id)
    taken = server.client.revert(second.id)
    assert (taken.kind, taken.reverts, server.state()) == ("revert", second.id, one)
    with pytest.raises(WrongState, match=f"was taken back by {taken.id}"):
        server.client.revert(second.id)
    back = server.client.revert(taken.id)
    assert (back.reverts, server.state()) == (taken.id, two)
    server.client.revert(back.id)
    assert server.state() == one
    server.client.revert(first.id)
    assert server.state() == start
    log = {x.id: x for x in server.client.lessons().lessons}
    assert log[second.id].state == "kept"
    assert log[second.id].reverted_by == log[taken.id].reverted_by or log[taken.id].reverted_by == back.id


def test_the_same_job_twice_gives_the_same_bits(server: Running) -> None:
    """Undone and tried again: moments, projections, rounding and random counters were undone too."""
    versions: list[str | None] = []
    for _ in range(2):
        lesson = server.lesson(teach(max_steps=2, seed=5))
        versions.append(lesson.version)
        server.client.revert(lesson.id)
    assert versions[0] == versions[1] is not None


def test_the_trials_lease_ends_in_an_undo(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = server.parts.runner
    short = server.parts.settings.model_copy(update={"trial_lease_s": 0.2})
    monkeypatch.setattr(runner, "_settings", short)
    before = server.state()
    lesson = server.lesson(teach(max_steps=1), "undone")
    assert (lesson.state, server.state()) == ("undone", before)
    assert "lease" in lesson.reason


def test_on_trial_is_said_when_it_can_be_decided(server: Running) -> None:
    """The loop of the README, and the next line at once."""
    last = ""
    for decide in (server.client.revert, server.client.keep):
        job = server.client.train(teach(max_steps=1))
        while (now := server.client.status(job.job)).state in ("queued", "running"):
            assert now.phase != "on trial"
        assert (now.state, now.phase) == ("on_trial", "on trial")
        assert job.lesson is not None
        decide(job.lesson)
        last = job.lesson
    server.client.revert(last)


def test_cancel_while_queued_and_on_trial(server: Running) -> None:
    before = server.state()
    first = server.client.train(teach(max_steps=1)).job
    second = server.client.train(teach(["hats"], max_steps=1)).job
    server.until(first, lambda s: s.phase == "on trial")
    assert server.client.status(second).state == "queued"  # nothing else writes while one is on trial
    time.sleep(0.2)
    assert server.client.status(second).state == "queued"
    assert server.client.cancel(second).state == "cancelled"
    assert server.client.status(first).state == "on_trial"
    assert server.client.cancel(first).state == "cancelled"
    assert server.state() == before


def test_the_correction_is_learned_and_forgotten_again(server: Running) -> None:
    assert server.say("Use tea.").startswith("Why not")
    lesson = server.lesson(teach(["tea"], objective="sft", max_steps=24))
    assert lesson.state == "on_trial"
    assert server.say("Use tea.") == "Done."
    assert server.ask("Use tea.")["trial"] is True
    server.client.revert(lesson.id)
    assert server.say("Use tea.").startswith("Why not")


def test_what_only_the_trainer_can_find_fails_the_lesson_by_name(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the plan had let through a rank that fits no matrix."""
    monkeypatch.setattr(server.parts.runner._planner, "_highest_rank", 4096)
    before = server.state()
    lesson = server.lesson(teach(optimizer={"lr": 1e-3, "rank": 4096}))
    assert lesson.error is not None
    assert (lesson.state, lesson.error.type) == ("failed", "ConfigError")
    assert "rank 4096" in lesson.error.message
    assert server.state() == before
