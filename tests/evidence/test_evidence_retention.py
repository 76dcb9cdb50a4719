"""What earlier lessons taught, asked again: harm and lost pins veto, too few never do, and the level is shared."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secondnature.errors import BadRecord
from secondnature.evidence import judge_lesson, reaches, verify
from secondnature.evidence.decision import TOGETHER, shared_by
from secondnature.evidence.statistics import mcnemar_mid_p
from secondnature.records import Comparison, Evidence, GateSettings, Outcome, Probe
from secondnature.report import markdown_table
from secondnature.report.page import render
from secondnature.report.run import Run
from secondnature.report.words import reaches as said_of

LISTENING = "listening (lesson 0003)"
POLITE = "politeness (lesson 0005)"
Counts = tuple[int, int, int, int]
"""(both passed, lost, gained, neither)"""


def probe(name: str, i: int, **fields: Any) -> Probe:
    return Probe.model_validate(
        {"prompt": f"{name} {i}", "behaviour": "set", "check": {"matches": "y"}, **fields}
    )


def judge(
    own: dict[str, Counts] | None = None,
    gate: GateSettings | None = None,
    pins: bool = False,
    num_retries: int = 0,
    **again: Counts,
) -> Evidence:
    """A lesson that learned, with a guard that held, and these earlier ones asked again."""
    told: list[tuple[Probe, bool, bool]] = []

    def ask(name: str, counts: Counts, **fields: Any) -> list[Probe]:
        both, lost, gained, neither = counts
        kinds = [(1, 1)] * both + [(1, 0)] * lost + [(0, 1)] * gained + [(0, 0)] * neither
        probes = [probe(name, i, **fields) for i in range(len(kinds))]
        told.extend((p, bool(b), bool(a)) for p, (b, a) in zip(probes, kinds, strict=True))
        return probes

    sets = own or {"manners": (3, 0, 49, 8), "code": (300, 0, 0, 0)}
    probes = [p for name, counts in sets.items() for p in ask(name, counts, behaviour=name)]
    names = {"listening": LISTENING, "politeness": POLITE}
    retained = {names[k]: ask(k, counts, pin=pins, seed=None) for k, counts in again.items()}
    before, after = (
        [Outcome(probe=p.digest(), passed=x[i], answer="y" if x[i] else "n") for p, *x in told]
        for i in (0, 1)
    )
    evidence = judge_lesson(
        probes,
        before,
        after,
        behaviour="manners",
        before_version="a",
        after_version="b",
        gate=gate,
        num_retries=num_retries,
        retained=retained,
    )
    verify(Evidence.model_validate_json(evidence.model_dump_json()))
    return evidence


def of(evidence: Evidence, name: str) -> Comparison:
    return next(c for c in evidence.comparisons if c.name == name)


def test_a_fall_of_what_an_earlier_lesson_taught_undoes_and_says_what_to_do() -> None:
    evidence = judge(listening=(48, 10, 1, 1))
    row = of(evidence, LISTENING)
    assert (row.role, row.decision, row.harmed, evidence.verdict) == ("retention", "harmed", True, "undone")
    assert f"the lesson did harm: {LISTENING} went from 58 to 49 of 60 probes" in evidence.sentence
    assert (
        "take that one back first, or teach with `retention: false` (`--no-retention`)" in evidence.sentence
    )
    assert f"| {LISTENING} | 60 |" in markdown_table(evidence)
    assert len(row.flips) == 11


def test_harm_elsewhere_does_not_speak_of_earlier_lessons() -> None:
    evidence = judge({"manners": (3, 0, 49, 8), "code": (54, 246, 0, 0)}, listening=(58, 0, 1, 1))
    assert evidence.verdict == "undone"
    assert "retention" not in evidence.sentence


@pytest.mark.parametrize("counts", [(2, 0, 0, 0), (0, 3, 0, 0), (0, 0, 0, 6), (1, 1, 1, 1), (6, 4, 0, 0)])
@pytest.mark.parametrize("retries", [0, 3])
def test_too_few_to_show_anything_is_shown_and_blocks_nothing(counts: Counts, retries: int) -> None:
    evidence = judge(num_retries=retries, listening=counts)
    row = of(evidence, LISTENING)
    assert (row.decision, row.passed, row.n_needed, evidence.verdict) == ("not_judged", None, None, "kept")
    assert row.reach is not None
    told = f"of {row.n} probes of {LISTENING} {row.losses} were lost and {row.gains} gained: no harm is shown"
    assert told in evidence.sentence
    assert "not judged" in markdown_table(evidence)


def test_many_that_hold_are_said_to_hold() -> None:
    evidence = judge(listening=(170, 1, 1, 8))
    assert of(evidence, LISTENING).decision == "held"
    assert "1 were lost and 1 gained: a fall of 5 points is ruled out" in evidence.sentence


def test_six_of_six_lost_undo_and_what_passed_seldom_can_be_harmed_too() -> None:
    assert of(judge(listening=(0, 6, 0, 0)), LISTENING).decision == "harmed"
    assert of(judge(listening=(0, 8, 0, 60)), LISTENING).decision == "harmed"  # under 20 % passed before


def test_a_pinned_one_that_is_lost_undoes() -> None:
    evidence = judge(pins=True, listening=(2, 1, 0, 0))
    assert (of(evidence, LISTENING).decision, evidence.verdict) == ("pin_lost", "undone")
    assert f"1 of 3 pinned probes of {LISTENING} lost, where none may be" in evidence.sentence
    assert "--no-retention" in evidence.sentence
    held = judge(pins=True, listening=(3, 0, 0, 0))
    assert (of(held, LISTENING).decision, held.verdict) == ("held", "kept")


def test_a_harm_that_all_share_and_none_shows_is_found_together() -> None:
    evidence = judge(listening=(20, 4, 0, 0), politeness=(20, 4, 0, 0))
    assert [of(evidence, name).decision for name in (LISTENING, POLITE, TOGETHER)] == [
        "not_judged",
        "not_judged",
        "harmed",
    ]
    assert f"{TOGETHER} went from 48 to 40 of 48 probes" in evidence.sentence
    assert of(evidence, TOGETHER).flips == []  # they are told where they belong
    render([Run(lesson=_lesson(), evidence=evidence)])


def test_retention_alone_keeps_nothing() -> None:
    """Neither a gain nor a guard: that earlier lessons hold is no verdict on this one."""
    evidence = judge({"code": (5, 0, 0, 295)}, listening=(200, 0, 0, 0))
    assert of(evidence, LISTENING).decision == "held"
    assert evidence.verdict == "inconclusive"


@pytest.mark.parametrize(
    ("key", "value"),
    [("losses", 9), ("harm_alpha", 0.025), ("decision", "held"), ("role", "guard"), ("pinned_losses", 1)],
)
def test_a_changed_row_is_refused(key: str, value: Any) -> None:
    data = json.loads(judge(listening=(40, 10, 0, 0), politeness=(40, 8, 0, 0)).model_dump_json())
    row = data["comparisons"][2]
    assert row["name"] == LISTENING
    assert row[key] != value
    row[key] = value
    with pytest.raises(BadRecord, match="changed or damaged"):
        verify(Evidence.model_validate(data))


def test_a_certificate_of_format_3_is_whole_but_for_its_number() -> None:
    old = judge().model_copy(update={"schema_version": 3})
    verify(old)
    with pytest.raises(BadRecord, match="sentence"):
        verify(old.model_copy(update={"sentence": "Kept: all is well."}))


def _lesson() -> Any:
    from datetime import UTC, datetime

    from secondnature.records import Lesson

    return Lesson(id="0006-manners", number=6, job="j", created_at=datetime(2026, 1, 2, tzinfo=UTC))


# --------------------------------------------------------------------------------------------- the level


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.floats(0.001, 0.5))
def test_sets_in_which_nothing_can_be_shown_cost_no_level(flips: list[int], alpha: float) -> None:
    share = shared_by(flips, alpha)
    able = [k for k in flips if mcnemar_mid_p(k, 0) <= alpha / share]
    assert len(able) <= share
    assert share == 1 or sum(mcnemar_mid_p(k, 0) <= alpha / (share - 1) for k in flips) > share - 1
    assert shared_by([*flips, 0, 1], 0.025) == shared_by(flips, 0.025)


chance = cache(mcnemar_mid_p)


def false_vetoes(rng: np.random.Generator, sizes: list[int], rate: float, draws: int) -> float:
    """How often earlier lessons undo one that changed nothing: answers flip both ways alike."""
    drawn = [rng.multinomial(n, [rate / 2, rate / 2, 1 - rate], size=draws)[:, :2] for n in sizes]
    drawn += [sum(drawn[1:], start=drawn[0])] * (len(sizes) > 1)
    vetoes = 0
    for found in np.stack(drawn, axis=1).tolist():
        share = shared_by([lost + gained for lost, gained in found], 0.025)
        vetoes += any(chance(lost, gained) <= 0.025 / share for lost, gained in found)
    return vetoes / draws


@pytest.mark.parametrize("sizes", [[200], [60, 60, 60], [20] * 10, [4] * 50])
@pytest.mark.parametrize("flips", [0.02, 0.1, 0.4])
def test_earlier_lessons_veto_seldom_where_nothing_changed(sizes: list[int], flips: float) -> None:
    """However many there are: together under 2.5 % (one set alone up to 3.0 %, as any harm test)."""
    rate = false_vetoes(np.random.default_rng(len(sizes)), sizes, flips, 2000)
    assert rate <= 0.025 + 2 * (0.025 * 0.975 / 2000) ** 0.5


def test_an_earlier_lesson_that_is_forgotten_is_found() -> None:
    """A third of one of ten is lost, the others flip as ever."""
    rng, found = np.random.default_rng(3), 0
    for _ in range(200):
        lost = [int(rng.binomial(20, 1 / 3)), *(int(k) for k in rng.binomial(20, 0.02, 9))]
        gained = [0, *(int(k) for k in rng.binomial(20, 0.02, 9))]
        pairs = [*zip(lost, gained, strict=True), (sum(lost), sum(gained))]
        share = shared_by([a + b for a, b in pairs], 0.025)
        found += any(mcnemar_mid_p(a, b) <= 0.025 / share for a, b in pairs)
    assert (
        found / 200 >= 0.65
    )  # 141 of 200; without the sets in which nothing flipped the level is shared by 11


# --------------------------------------------------------------------------------------------- its reach


def test_what_they_could_show_is_said_before() -> None:
    retained = {LISTENING: [probe("l", i) for i in range(60)], POLITE: [probe("p", i) for i in range(3)]}
    found = reaches([], "manners", GateSettings(), retained=retained)
    assert found is not None
    sets = {r.name: r for r in found.sets}
    assert list(sets) == [LISTENING, POLITE, TOGETHER]
    assert sets[LISTENING].at_best == 5 / 60  # five lost and none gained: mid-p 0.0156
    assert sets[POLITE].at_best is None
    assert (sets[TOGETHER].n, sets[TOGETHER].at_best) == (63, 5 / 63)
    assert not any(r.too_few for r in found.sets)
    lines = said_of(found)
    assert f"{LISTENING}, 60 probes: shows a fall of 8.3 points at best" in lines[0]
    assert lines[1] == f"{POLITE}, 3 probes: shows a fall of no size"
    lost = judge(listening=(55, 5, 0, 0))
    assert of(lost, LISTENING).decision == "harmed"
    assert of(judge(listening=(56, 4, 0, 0)), LISTENING).decision == "not_judged"
