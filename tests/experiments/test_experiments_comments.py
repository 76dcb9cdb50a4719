"""The experiment on comments: its arms differ in what they learn from, and its page follows from its counts."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

from secondnature.wire import TrainRequest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "experiments" / "comments.json"


def test_the_arms_differ_in_what_they_learn_from_and_in_nothing_else(experiment: ModuleType) -> None:
    bodies = {arm: experiment.body(arm, 1) for arm in experiment.ARMS}
    requests = {arm: TrainRequest.model_validate(body) for arm, body in bodies.items()}
    comments = requests["sdft"].corrections
    assert comments is not None
    assert all(c.chosen is None and c.feedback for c in comments)
    assert bodies["sft"]["corrections"] == bodies["orpo"]["corrections"]
    for body in bodies.values():
        assert body.pop("objective") in experiment.ARMS
        for row in body["corrections"]:
            row.pop("chosen", None)
    assert bodies["sdft"] == bodies["sft"] == bodies["orpo"]
    assert experiment.body("sft", 1)["corrections"] != experiment.body("sft", 2)["corrections"]


def test_the_page_is_made_from_the_counts(experiment: ModuleType) -> None:
    found = json.loads(RESULTS.read_text())
    assert {(r["arm"], r["seed"]) for r in found} == {(a, s) for a in experiment.ARMS for s in range(3)}
    assert (RESULTS.with_suffix(".md")).read_text() == experiment.page(found)
