"""Shipped packs beside a lesson's probes: put in once, told by a dry run, left out where they do not suit."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from tiny_server import LOW_GATE, Running, teach, use_probes

from secondnature.evidence.packs import pack
from secondnature.records import GateSettings
from secondnature.wire import TrainRequest


def test_a_dry_run_says_what_guards_it_and_what_that_could_show(server: Running) -> None:
    request = teach(["tea"], guards=["pack:facts"], probes=use_probes(["oak", "red"]), dry_run=True)
    plan = server.client.train(request).plan
    assert plan is not None
    (told,) = plan["guards"]
    assert (told["pack"], told["guard"], told["num"] + told["left_out"]) == (
        "facts",
        "pack-facts",
        len(pack("facts")),
    )
    sets = {r["name"]: r for r in plan["could_show"]["sets"]}
    assert sets["pack-facts"]["n"] == told["num"] >= 300
    assert not sets["pack-facts"]["too_few"]
    assert sets["use"]["too_few"]
    assert plan["could_show"]["alpha"] == 0.025


def test_what_is_taught_is_left_out_of_a_pack(server: Running) -> None:
    corrections = [{"prompt": "What is the capital of Turkey?", "chosen": "Done.", "behaviour": "use"}]
    request = teach(corrections=corrections, guards=["facts"], dry_run=True)
    without = teach(["tea"], guards=["facts"], dry_run=True)
    plans = [server.client.train(r).plan for r in (request, without)]
    left_out = [plan["guards"][0]["left_out"] for plan in plans if plan is not None]
    assert left_out[0] == left_out[1] + 1


def test_a_pack_that_the_model_fails_anyway_guards_nothing(server: Running) -> None:
    """The talker knows no facts: the lesson is judged by its other guards, here by none."""
    lesson = server.lesson(teach(["tea"], max_steps=1, guards=["facts"]), "undone", "kept", "failed")
    evidence = server.client.lesson(lesson.id).evidence
    assert evidence is not None, lesson
    (facts,) = evidence.comparisons
    assert (facts.name, facts.decision) == ("pack-facts", "not_judged")
    assert facts.n >= 300
    assert evidence.taught is not None
    assert evidence.taught.n == 1
    assert (lesson.state, evidence.verdict) == ("undone", "inconclusive")


def test_a_lesson_is_kept_by_guards_alone_where_it_was_learned(server: Running) -> None:
    """Guards of the user's own, no probe of what is taught: the corrections say whether it was learned."""
    pinned = [{**p.model_dump(), "pin": True} for p in _say(["ink", "mud"])]
    request = teach(["tea", "oak"], max_steps=12, probes=pinned, gate=LOW_GATE)
    lesson = server.lesson(request, "kept", "undone", "failed")
    evidence = server.client.lesson(lesson.id).evidence
    assert evidence is not None, lesson
    assert evidence.taught is not None
    assert evidence.taught.before == 0
    assert evidence.comparisons[0].method == "pins/1"
    if evidence.comparisons[0].pinned_losses:
        assert lesson.state == "undone"
    else:
        assert (lesson.state == "kept") == (2 * evidence.taught.after >= evidence.taught.n)
    if lesson.state == "kept":
        server.client.revert(lesson.id)


def _say(words: list[str]) -> Any:
    from tiny_server import say_probes

    return say_probes(words)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"guards": ["pack:poems"]}, "guards.0"),
        ({"guards": ["facts"], "keep": True}, "found both `keep` and `guards`"),
        (
            {"gate": GateSettings(guard_margin={"pack-fact": 0.1}), "guards": ["facts"]},
            "guards are: pack-facts",
        ),
    ],
)
def test_guards_that_cannot_be_are_refused(fields: dict[str, Any], found: str) -> None:
    with pytest.raises(ValidationError, match=found):
        teach(["tea"], **fields)
    assert TrainRequest.model_fields["guards"].default == []
