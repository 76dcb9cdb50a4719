"""What kept lessons taught is asked again: which probes, of which lessons, and what it does to the verdict."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from tiny_server import LOW_GATE, Running, running, say_probes, teach, use_probes

from secondnature.evidence import verify
from secondnature.lessons.log import PROBES_FILE
from secondnature.lessons.retention import Kept, choose, left_behind
from secondnature.records import Evidence, GateSettings, Lesson, Probe
from secondnature.wire import TrainRequest

TAUGHT = ["tea", "oak", "red", "kite"]
ASKED = ["ink", "mud", "bell", "clay", "drum", "foam", "gold", "hats", "jam", "salt"]
NAME = "use (lesson 0001)"


def probe(text: str, **fields: Any) -> Probe:
    return Probe.model_validate({"prompt": text, "behaviour": "use", "check": {"matches": "y"}, **fields})


def context(of: Probe) -> list[int]:
    return [ord(c) for c in of.prompt[-1].content]


def chosen(kept: list[Kept], **given: Any) -> tuple[dict[str, list[str]], dict[str, int]]:
    found = choose(kept, context, given.pop("asked", set()), given.pop("read", set()), **given)
    return {k: sorted(p.prompt[-1].content for p in of) for k, of in found.sets.items()}, found.left_out


# --------------------------------------------------------------------------------------- which are asked


def test_each_behaviour_and_side_is_a_set_that_names_its_lessons() -> None:
    kept = [
        Kept(3, [probe("a"), probe("b", side="other"), probe("c", behaviour="call", pin=True)]),
        Kept(5, [probe("d")]),
    ]
    sets, left_out = chosen(kept)
    assert sets == {
        "call (lesson 0003)": ["c"],
        "use (lessons 0005, 0003)": ["a", "d"],
        "use, other side (lesson 0003)": ["b"],
    }
    assert left_out == {}


def test_what_is_asked_or_read_anyway_or_does_not_fit_is_left_out_and_counted() -> None:
    kept = [
        Kept(1, [probe("a"), probe("b"), probe("c"), probe("d", check={"matches": "z"})]),
        Kept(2, [probe("d")]),
    ]

    def narrow(of: Probe) -> list[int]:
        if of.prompt[-1].content == "c":
            from secondnature.errors import ContextOverflow

            raise ContextOverflow("too long", "shorten it")
        return context(of)

    found = choose(kept, narrow, {(ord("a"),)}, {(ord("b"),)})
    assert {k: len(v) for k, v in found.sets.items()} == {"use (lesson 0002)": 1}
    assert found.probes[0].check.matches == "y"  # what the newer lesson asks by this prompt
    assert found.left_out == {"asked by the lesson": 2, "read in training": 1, "does not fit the model": 1}


def test_the_bound_takes_the_pinned_first_and_then_of_each_lesson_in_turn() -> None:
    old = [probe(f"old {i}", seed=f"s{i % 5}") for i in range(30)] + [probe("never", pin=True)]
    new = [probe(f"new {i}", behaviour="say") for i in range(4)]
    sets, left_out = chosen([Kept(1, old), Kept(2, new)], most=12)
    assert left_out == {"more than 12": 23}
    assert len(sets["say (lesson 0002)"]) == 4
    assert "never" in sets["use (lesson 0001)"]
    olds = [t for t in sets["use (lesson 0001)"] if t != "never"]
    assert len(olds) == 7
    assert len({int(t.split()[1]) % 5 for t in olds}) == 5  # every scenario before the second of any


def test_a_lesson_leaves_its_own_probes_and_the_pinned_ones() -> None:
    probes = [
        probe("a"),
        probe("b", side="other"),
        probe("c", behaviour="x"),
        probe("d", behaviour="x", pin=True),
    ]
    assert [p.prompt[-1].content for p in left_behind(probes, "use")] == ["a", "b", "d"]
    assert left_behind(probes[2:3], None) == []


# --------------------------------------------------------------------------------------- by a real server


@pytest.fixture(scope="module")
def home(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[Running, Lesson]]:
    """A server that kept a lesson with probes: directions are taken."""
    with running(tmp_path_factory.mktemp("retained"), talker) as server:
        request = teach(TAUGHT, max_steps=12, probes=use_probes(ASKED), gate=LOW_GATE, prompting=False)
        lesson = server.lesson(request, "kept", "undone", "failed")
        assert lesson.state == "kept", lesson.reason
        assert lesson.cause.num_retained == 0
        yield server, lesson


def back(**fields: Any) -> TrainRequest:
    """Teaches the reverse of what was kept, drilled; judged by guards of another habit."""
    words = ["tea", "oak", "red", "kite", "tabs", "dots"]
    corrections = [{"prompt": f"Use {w}.", "chosen": "Why not maps?", "behaviour": "ask"} for w in words]
    pinned = [{**p.model_dump(), "pin": True} for p in say_probes(["rope", "wool"])]
    given: dict[str, Any] = {
        "corrections": corrections,
        "max_steps": 25,
        "probes": pinned,
        "gate": LOW_GATE,
        "lesson": {"behaviour": "ask"},
        "prompting": False,
        "replay": {**teach().replay.model_dump(exclude_none=True), "lessons": False},
    }
    return teach(**{**given, **fields})


def judged(server: Running, request: TrainRequest) -> tuple[Lesson, Evidence]:
    lesson = server.lesson(request, "kept", "undone", "failed")
    evidence = server.client.lesson(lesson.id).evidence
    assert evidence is not None, lesson
    verify(evidence)
    return lesson, evidence


def test_a_lesson_that_takes_back_what_was_kept_is_undone_unless_that_is_meant(
    home: tuple[Running, Lesson],
) -> None:
    server, kept = home
    state = server.state()
    lesson, evidence = judged(server, back())
    row = next(c for c in evidence.comparisons if c.role == "retention")
    assert (row.name, row.n, row.decision) == (NAME, len(ASKED), "harmed")
    was = server.client.lesson(kept.id).evidence
    assert was is not None
    assert row.before == was.comparisons[0].after  # the same weights, the same probes
    assert (lesson.state, evidence.verdict) == ("undone", "undone")
    assert "retention: false" in lesson.reason
    assert lesson.cause.num_retained == len(ASKED)
    assert server.state() == state
    corrections = back().corrections
    assert corrections is not None
    without, told = judged(server, back(retention=False, corrections=corrections[:5]))  # no retry
    assert all(c.role != "retention" for c in told.comparisons)
    assert without.cause.num_retained == 0
    assert without.cause.retention_left_out == {"retention is off": len(ASKED)}
    if without.state == "kept":
        server.client.revert(without.id)
    assert server.state() == state
    assert kept.version == state[1]


def test_a_harmless_lesson_is_not_held_up_and_a_pack_alone_asks_too(home: tuple[Running, Lesson]) -> None:
    server, _ = home
    probes = say_probes(["rope", "wool"])
    request = teach(["tabs"], max_steps=1, probes=probes, gate=GateSettings(), lesson={"behaviour": "use"})
    _, evidence = judged(server, request)
    row = next(c for c in evidence.comparisons if c.role == "retention")
    assert row.decision == "not_judged"
    assert NAME not in evidence.sentence.partition("undone: ")[2]
    plan = server.client.train(teach(["tabs"], guards=["facts"], dry_run=True)).plan
    assert plan is not None
    assert plan["retention"] == {"sets": {NAME: len(ASKED)}, "left_out": {}}
    assert {r["name"]: r["role"] for r in plan["could_show"]["sets"]}[NAME] == "retention"


def test_the_same_behaviour_taught_again_is_measured_by_its_own_probes(home: tuple[Running, Lesson]) -> None:
    """What both ask is asked once, as the new lesson's; what it teaches or replays says nothing of the old one."""
    server, _ = home
    words = [ASKED[0], ASKED[1], "glue", "fern"]
    request = teach(["tabs", ASKED[2]], probes=use_probes(words), gate=LOW_GATE, dry_run=True)
    plan = server.client.train(request).plan
    assert plan is not None
    assert plan["retention"] == {
        "sets": {NAME: len(ASKED) - 3},
        "left_out": {"asked by the lesson": 2, "read in training": 1},
    }


def test_nothing_is_asked_where_nothing_is_judged(home: tuple[Running, Lesson]) -> None:
    server, _ = home
    for fields in ({}, {"keep": True}):
        plan = server.client.train(teach(["tabs"], dry_run=True, **fields)).plan
        assert plan is not None
        assert plan["retention"] == {"sets": {}, "left_out": {}}


def test_a_file_that_cannot_be_read_breaks_nothing_and_a_reverted_lesson_is_not_asked(
    home: tuple[Running, Lesson],
) -> None:
    """Last: it takes the kept lesson back."""
    server, kept = home
    log = server.parts.runner.log
    path = log.directory(kept) / PROBES_FILE
    assert len(path.read_text().splitlines()) == len(ASKED)
    log._probes.clear()
    path.write_text("{")
    lesson, evidence = judged(server, teach(["tabs"], max_steps=1, probes=say_probes(["rope"])))
    assert lesson.cause.retention_left_out == {"unreadable lessons": 1}
    assert all(c.role != "retention" for c in evidence.comparisons)
    server.client.revert(kept.id)
    assert log.retained() == ([], 0)
