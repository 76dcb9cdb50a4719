"""The experiment on guards: what is asked after the verdict no lesson saw, and the page is made of the counts."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

from secondnature.evidence.packs import pack
from secondnature.records import Correction

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "experiments" / "guards.json"


def test_no_lesson_sees_what_is_asked_after_the_verdict(experiment: ModuleType) -> None:
    facts = {p.prompt[-1].content for p in pack("facts")}
    for behaviour in experiment.BEHAVIOURS:
        prompts = [
            {Correction.model_validate(row).prompt[-1].content for row in behaviour.corrections(seed)}
            for seed in experiment.SEEDS
        ]
        assert [len(x) for x in prompts] == [6, 6]
        assert not prompts[0] & prompts[1]
        found = experiment.truth(behaviour)
        assert (len(found["held_out"]), len(found["other"])) == (30, 20)
        asked = {p.prompt[-1].content for name in ("held_out", "other") for p in found[name]}
        assert len({p.prompt[-1].content for p in found["held_out"]}) == 30
        assert not asked & set.union(*prompts)
        assert not {p.prompt[-1].content for p in found["held_out"]} & facts


def test_every_lesson_is_there_and_the_page_is_made_of_the_counts(experiment: ModuleType) -> None:
    found = json.loads(RESULTS.read_text())
    expected = {(b.name, s) for b in experiment.BEHAVIOURS for s in experiment.SEEDS}
    assert {(r["behaviour"], r["seed"]) for r in found} == expected
    assert RESULTS.with_suffix(".md").read_text() == experiment.page(found)
    verdicts = [r["verdict"] for r in found]
    assert verdicts.count("kept") + verdicts.count("undone") >= 8


def test_learned_and_broken_are_what_a_test_says(experiment: ModuleType) -> None:
    before = {"held_out": "-" * 30, "other": "+" * 20, "instructions": "+-" * 27, "arithmetic": "+" * 54}
    after = before | {"held_out": "+" * 15 + "-" * 15, "other": "-" * 6 + "+" * 14}
    row = {"before": before, "after": after}
    assert experiment.really_learned(row)
    assert experiment.broken(row) == ["the other side"]
    less = {"before": before, "after": after | {"held_out": "+" * 14 + "-" * 16, "other": "--" + "+" * 18}}
    assert not experiment.really_learned(less)
    assert experiment.broken(less) == []
