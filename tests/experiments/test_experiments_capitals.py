"""The experiment on five capitals: only the form differs, and its page is made of its counts."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

from secondnature.evidence.lint import lint
from secondnature.records import Correction

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "experiments" / "capitals.json"


def test_the_arms_differ_in_form_and_the_held_out_wordings_are_taught_by_none(experiment: ModuleType) -> None:
    bare, sentence = (experiment.corrections(form) for form in ("bare", "sentence"))
    assert [c["prompt"] for c in bare] == [c["prompt"] for c in sentence]
    assert bare[0]["chosen"] == "Ankara."
    assert sentence[0]["chosen"] == "The capital of Turkey is Ankara."
    asked = {p.prompt[-1].content for p in experiment.held_out()}
    assert len(asked) == 20
    assert not asked & {Correction.model_validate(c).prompt[-1].content for c in bare}


def test_the_page_is_made_of_the_counts(experiment: ModuleType) -> None:
    found = json.loads(RESULTS.read_text())
    assert {r["arm"] for r in found} <= set(experiment.FORMS)
    assert RESULTS.with_suffix(".md").read_text() == experiment.page(found)


def test_the_lint_names_the_bare_answers_and_the_losses_have_names(experiment: ModuleType) -> None:
    (row,) = [r for r in json.loads(RESULTS.read_text()) if r["arm"] == "bare"]
    assert "bare answers" in [f["kind"] for f in row["lint"]["file"]]
    harmed = [t["tag"] for t in row["guard"]["lost"]["tags"] if t["harmed"]]
    assert "capitals" in harmed
    sentences = [
        Correction.model_validate(row | {"id": f"c{i}"})
        for i, row in enumerate(experiment.corrections("sentence"))
    ]
    assert "bare answers" not in [f.kind for f in lint(sentences)]
