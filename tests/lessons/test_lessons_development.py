"""Development probes whose answers are checked: the serving engine is asked while the trainer stands between steps.

On the tiny talker: "Use x." learns to be answered "Done.", "Say x." is the other side.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_server import Running, correction, running, teach

from secondnature.engines.generation import GenerationResult
from secondnature.errors import ContextOverflow, SandboxFailed
from secondnature.lessons.prober import CheckIn
from secondnature.lessons.trainer import CANCEL_TIMEOUT_S
from secondnature.records import STOPPED_BY, LookMetric, Outcome, Probe

TAUGHT = ["tea", "oak", "red", "kite"]
ASKED = ["mud", "ink", "jam", "hats", "gold", "foam"]


def probe(text: str, check: dict[str, Any], side: str = "right", **fields: Any) -> Probe:
    return Probe.model_validate({"prompt": text, "behaviour": "use", "check": check, "side": side, **fields})


def development() -> list[Probe]:
    """Six of each side, by text checks of every kind that the engine can answer."""
    right = [probe(f"Use {w}.", {"matches": "(?i)^done"}, max_tokens=8) for w in ASKED[:4]]
    right += [probe(f"Use {w}.", {"not_matches": "Why"}) for w in ASKED[4:]]
    return right + [probe(f"Say {w}.", {"matches": f"^{w}!"}, "other") for w in ASKED]


def looks(server: Running, lesson: str) -> list[LookMetric]:
    metrics = server.client.lesson(lesson).metrics
    return [LookMetric.model_validate(m) for m in metrics if m["kind"] == "look"]


def look_with(
    server: Running, monkeypatch: pytest.MonkeyPatch, instead: Callable[..., list[Outcome]]
) -> None:
    """From now on `instead(ask_now, probes, check_in)` is what the server does at a look."""
    prober = server.parts.runner._prober
    ask_now = prober.ask_now
    monkeypatch.setattr(prober, "ask_now", lambda probes, check_in: instead(ask_now, probes, check_in))


class Standing:
    """Looks that do not end by themselves, as where users fill the queue; `begun` says that one is under way."""

    def __init__(self) -> None:
        self.begun = threading.Event()

    def __call__(self, _: object, probes: Sequence[Probe], check_in: CheckIn) -> list[Outcome]:
        self.begun.set()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            check_in(0, len(probes))
            time.sleep(0.01)
        raise AssertionError("nobody ended the look")


def test_it_stops_where_the_answers_pass(server: Running) -> None:
    """At the first look at which they do, though no answer is worded as the correction's."""
    wording = "Done: rope and salt."
    fields: dict[str, Any] = {
        "corrections": [correction(w, wording) for w in TAUGHT],
        "max_steps": 40,
        "until_passed": 0.8,
    }
    spoken = [probe(f"Use {w}.", {"matches": "^Done"}) for w in ASKED]
    lesson = server.lesson(teach(**fields, development=spoken))
    assert (lesson.state, lesson.stopped_by) == ("on_trial", "until_passed"), lesson
    assert lesson.reason == STOPPED_BY["until_passed"]
    seen = looks(server, lesson.id)
    assert [x.step for x in seen] == list(range(lesson.steps + 1))
    shares = [x.passed["right"] or 0.0 for x in seen]
    assert shares[0] == 0.0
    assert all(s < 0.8 for s in shares[:-1])
    assert shares[-1] >= 0.8
    assert seen[-1].asked == {"right": len(ASKED)}
    answers = {a.probe: a for a in seen[-1].answers}
    now = [server.say(f"Use {w}.") for w in ASKED]  # by the weights of the last look
    assert all(now[i].startswith(a.answer) for i, a in answers.items())
    assert [answers[i].passed for i in range(len(ASKED))] == [x.startswith("Done") for x in now]
    assert any(x.startswith("Done") and not x.startswith(wording) for x in now)
    server.client.revert(lesson.id)
    written = [probe(f"Use {w}.", {"prefers": [wording, "Why not ink?"]}) for w in ASKED]
    token_by_token = server.lesson(teach(**fields, development=written))
    assert token_by_token.steps > lesson.steps, "where every token of one wording must be the likeliest"
    server.client.revert(token_by_token.id)


def test_both_kinds_count_and_margins_beside_a_check_are_read(server: Running) -> None:
    """Half of the side is read by the trainer, half is asked; only the first and the last have margins."""
    pair = ["Done.", "Why not ink?"]
    mixed = [
        probe("Use mud.", {"prefers": pair}),
        probe("Use ink.", {"matches": "^Done"}),
        probe("Say jam.", {"matches": "^jam!"}, "other"),
        probe("Use hats.", {"matches": "^Done"}, margin=pair),
    ]
    lesson = server.lesson(teach(development=mixed, until_passed=1.0, until_margin=-1000, max_steps=40))
    last = looks(server, lesson.id)[-1]
    assert lesson.stopped_by == "until_margin and until_passed", lesson
    assert (last.passed, last.asked) == ({"right": 1.0, "other": 1.0}, {"right": 3, "other": 1})
    assert {side: len(found) for side, found in last.margins.items()} == {"right": 2}
    assert [a.probe for a in last.answers] == [1, 2, 3]
    assert {server.say(f"Use {w}.") for w in ("mud", "ink", "hats")} == {"Done."}
    server.client.revert(lesson.id)


def test_without_an_aim_looks_are_only_shown(server: Running) -> None:
    """Drilled until everything is answered "Done.": all steps are made, and what was lost is named, with texts."""
    drill: dict[str, Any] = {
        "development": development(),
        "max_steps": 24,
        "look_every": 6,
        "replay": {"share": 0.0},
        "optimizer": {"lr": 1e-2},
        "learned_loss": 0.0,
    }
    reply = server.client.train(teach(**drill))
    status = server.until(reply.job, lambda s: s.look is not None and s.look.step > 0)
    assert status.look is not None
    assert status.look.asked == {"right": 6, "other": 6}
    server.until(reply.job, lambda s: s.phase == "on trial")
    lesson = server.client.lesson(status.lesson).lesson
    seen = looks(server, lesson.id)
    assert (lesson.steps, lesson.stopped_by) == (24, "max_steps")
    assert [x.step for x in seen] == [0, 6, 12, 18, 24]
    assert (seen[0].passed, seen[0].lost) == ({"right": 0.0, "other": 1.0}, [])
    assert seen[-1].passed["right"] == 1.0
    assert 3 < len(seen[-1].lost) <= 6
    first = seen[-1].answers[0]
    assert (first.probe, first.passed) == (seen[-1].lost[0], False)
    assert server.say(f"Say {ASKED[first.probe - 6]}.").startswith(first.answer)
    told = server.client.status(reply.job).look
    assert told is not None
    assert (told.step, told.passed["right"], told.lost) == (24, 6, len(seen[-1].lost))
    server.client.revert(lesson.id)
    lesson = server.lesson(teach(**{**drill, "until_passed": 1.0, "look_every": 1, "max_steps": 60}))
    seen = looks(server, lesson.id)
    assert lesson.stopped_by in ("the other side gave way", "until_passed")
    assert all(len(x.lost) <= 3 for x in seen[:-1])
    server.client.revert(lesson.id)


def test_weights_stand_still_while_answers_are_generated(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No byte changes from the question to the last answer, each of which has one version; people are served."""
    found: list[tuple[bool, int, int]] = []
    spans: list[bool] = []
    answers = server.parts.runner._prober.answers

    def heard(*args: Any, **options: Any) -> list[GenerationResult]:
        results = answers(*args, **options)
        spans.extend(r.weights is not None and not r.weights.changed for r in results)
        return results

    def watched(ask_now: Any, probes: Sequence[Probe], check_in: CheckIn) -> list[Outcome]:
        before, writes = server.weights, server.parts.arena.writes[0]
        outcomes = ask_now(probes, check_in)
        assert server.say("Say mud.")
        time.sleep(0.3)  # some steps would fit in
        found.append((server.weights == before, writes, server.parts.arena.writes[0]))
        return outcomes

    monkeypatch.setattr(server.parts.runner._prober, "answers", heard)
    look_with(server, monkeypatch, watched)
    lesson = server.lesson(teach(development=development(), max_steps=3))
    assert lesson.stopped_by == "max_steps"
    start = found[0][1]
    assert found == [(True, start + i, start + i) for i in range(4)]
    assert len(spans) > 4 * len(development())
    assert all(spans)
    server.client.revert(lesson.id)


def test_a_cancel_ends_a_look(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within moments, and the trainer lives on."""
    standing = Standing()
    look_with(server, monkeypatch, standing)
    job = server.client.train(teach(development=development())).job
    assert standing.begun.wait(120)
    status, pid = server.client.status(job), server.parts.runner.trainer.pid
    assert (status.phase, status.progress and status.progress.total) == ("looking at development probes", 12)
    begun = time.monotonic()
    assert server.client.cancel(job).state == "cancelled"
    assert time.monotonic() - begun < CANCEL_TIMEOUT_S, "it was not waited for until it had to be killed"
    assert (server.parts.runner.trainer.pid, server.parts.runner.trainer.state) == (pid, "ready")


def test_a_trainer_that_is_killed_at_a_look_ends_the_lesson(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing = Standing()
    look_with(server, monkeypatch, standing)
    job = server.client.train(teach(development=development())).job
    assert standing.begun.wait(120)
    pid = server.parts.runner.trainer.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    status = server.until(job, lambda s: s.state == "failed" and s.phase == "done")
    assert status.error is not None
    assert (status.error.type, "SIGKILL" in status.error.message) == ("TrainerDied", True)
    until_ready(server)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(SandboxFailed("no sandbox"), "SandboxFailed"), (MemoryError(), "TrainingError")],
)
def test_what_fails_at_a_look_fails_the_lesson(
    server: Running, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str
) -> None:
    """After two steps were written: the fixture sees that the weights are whole."""
    asked = 0

    def fails(ask_now: Any, probes: Sequence[Probe], check_in: CheckIn) -> list[Outcome]:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise error
        return ask_now(probes, check_in)

    look_with(server, monkeypatch, fails)
    job = server.client.train(teach(development=development())).job
    status = server.until(job, lambda s: s.state == "failed" and s.phase == "done")
    assert status.error is not None
    assert (status.error.type, asked) == (kind, 3)
    until_ready(server)


def until_ready(server: Running) -> None:
    """A new trainer has come up, and teaches."""
    deadline = time.monotonic() + 120
    while server.parts.runner.trainer.state != "ready":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lesson = server.lesson(teach(max_steps=1))
    assert lesson.state == "on_trial"
    server.client.revert(lesson.id)


def test_a_stop_ends_a_look(talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standing = Standing()
    with running(tmp_path / "home", talker) as server:
        before = server.weights
        look_with(server, monkeypatch, standing)
        server.client.train(teach(development=development()))
        assert standing.begun.wait(120)
        log, begun = server.parts.runner.log, time.monotonic()
    assert time.monotonic() - begun < CANCEL_TIMEOUT_S
    assert [x.state for x in log.all()] == ["undone"]
    with running(tmp_path / "home", talker) as server:
        assert server.weights == before


@pytest.mark.parametrize("check", [{"matches": "x"}, {"prefers": ["a", "b"]}])
def test_a_development_probe_that_does_not_fit_is_refused_by_name(
    server: Running, check: dict[str, Any]
) -> None:
    long = probe("Use " + "tea and " * 300 + "oak.", check)
    with pytest.raises(ContextOverflow, match=r"^development probe 1: "):
        server.client.train(teach(development=[development()[0], long]))
