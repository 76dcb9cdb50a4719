"""Replay by distribution through the real server: what the steps report, when they end, and the cooldown."""

from __future__ import annotations

from tiny_server import Running, habits, teach

from secondnature.records import OptimizerSettings

SAY = [{"prompt": q, "completion": a} for q, a in habits() if "Say" in q][:8]


def held(**fields: object) -> dict[str, object]:
    return {"share": 0.5, "match": "distribution", "weight": 10, "examples": SAY, "lessons": False, **fields}


def test_every_step_reports_the_drift_that_it_holds_back(server: Running) -> None:
    lesson = server.lesson(teach(replay=held(), max_steps=3), "on_trial")
    steps = [m for m in server.client.lesson(lesson.id).metrics if m["kind"] == "step"]
    assert len(steps) == 3
    assert steps[0]["drift"] < 1e-6 < steps[1]["drift"]
    server.client.revert(lesson.id)


def test_a_learned_lesson_ends_at_once_but_not_before_its_anchors_have_healed(server: Running) -> None:
    plain = server.lesson(teach(learned_loss=1000.0, max_steps=3), "on_trial")
    assert (plain.steps, plain.stopped_by) == (1, "learned")
    server.client.revert(plain.id)
    lesson = server.lesson(teach(learned_loss=1000.0, max_steps=3, replay=held()), "on_trial")
    assert (lesson.steps, lesson.stopped_by) == (3, "nothing moved")
    assert lesson.version == lesson.parent, "nothing drifted, so nothing was written"
    server.client.revert(lesson.id)


def test_a_lesson_that_changed_no_weight_is_not_kept_silently(server: Running) -> None:
    replay = held()
    lesson = server.lesson(teach(learned_loss=1000.0, max_steps=3, replay=replay, keep=True), "kept")
    assert lesson.version == lesson.parent
    assert lesson.reason == "kept unjudged, as asked; no weight changed"
    server.client.revert(lesson.id)


def test_a_cooldown_moves_the_weights_less(server: Running) -> None:
    moved: list[float] = []
    for cooldown in (0.0, 1.0):
        optimizer = OptimizerSettings(lr=3e-3, cooldown=cooldown)
        lesson = server.lesson(teach(replay={"share": 0.0}, max_steps=6, optimizer=optimizer), "on_trial")
        moved.append(sum(m.intended for m in lesson.moved))
        server.client.revert(lesson.id)
    assert moved[1] < 0.9 * moved[0], moved
