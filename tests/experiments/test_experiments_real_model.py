"""The experiment on a real model: every arm learns from the same six, and the page follows from its counts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from secondnature.evidence.statistics import clopper_pearson
from secondnature.wire import TrainRequest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "experiments" / "real-model.json"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    if not RESULTS.exists():
        pytest.skip("not yet measured: `python experiments/real_model.py`")
    return json.loads(RESULTS.read_text())


def test_the_lesson_is_that_of_the_example_and_of_its_seed(experiment: ModuleType) -> None:
    bodies = [experiment.body(seed, to_the_end=False) for seed in experiment.SEEDS]
    requests = [TrainRequest.model_validate(body) for body in bodies]
    taught = [{r["prompt"] for r in body["corrections"]} for body in bodies]
    assert len(set.union(*taught)) == 18, "a seed has corrections of its own"
    first = (ROOT / "examples/directions/corrections.jsonl").read_text().splitlines()
    assert bodies[0]["corrections"] == [json.loads(line) for line in first]
    assert requests[0].until_passed == experiment.lesson_file()["until_passed"]
    to_the_end = TrainRequest.model_validate(experiment.body(0, to_the_end=True))
    assert (to_the_end.until_passed, to_the_end.max_steps) == (None, experiment.CURVES[0][-1])
    for key in ("seed", "corrections"):
        for body in bodies:
            body.pop(key)
    assert bodies[0] == bodies[1] == bodies[2]


def test_prompting_shows_the_six_and_asks_the_question(experiment: ModuleType) -> None:
    for arm, turns in (("prompting", 1), ("turns", 13)):
        asked = experiment.told(arm, 1)("What is 2 + 2?")
        text = "\n".join(m.content for m in asked)
        assert len(asked) == turns
        assert "What is 2 + 2?" in asked[-1].content
        for row in experiment.data.corrections(1):
            assert row["prompt"] in text
            assert row["chosen"] in text
    assert experiment.told("sft", 1) is None


def test_every_arm_has_every_seed_and_the_same_probes(experiment: ModuleType, found: dict[str, Any]) -> None:
    runs = {(r["arm"], r["seed"]): r for r in found["runs"]}
    trained = {"ours", "prompting", "sft", "lora", "dpo"}
    assert {key for key in runs if key[0] in trained} == {(a, s) for a in trained for s in experiment.SEEDS}
    for (arm, _), run in runs.items():
        if "passed" in run:
            least = {"right": 33, "other": 22, "facts": 31, "arithmetic": 33}
            assert all(len(run["passed"][name]) >= n for name, n in least.items()), arm
    for seed in experiment.SEEDS:
        run = runs["ours", seed]
        assert [c["step"] for c in run["curve"]] == sorted({*experiment.CURVES[seed], run["steps"]})


def test_the_page_and_the_picture_are_made_of_the_counts(
    experiment: ModuleType, found: dict[str, Any]
) -> None:
    page = RESULTS.with_suffix(".md").read_text()
    assert page == experiment.real_page.page(found)
    assert (ROOT / "docs/figures/real-model.svg").read_text() == experiment.real_page.picture(found)
    marks = "".join(r["passed"]["right"] for r in found["runs"] if r["arm"] == "sft")
    low, high = clopper_pearson(marks.count("1"), len(marks))
    cell = re.escape(
        f"{100 * marks.count('1') / len(marks):.0f} % [{100 * low:.0f}, {100 * high:.0f}] of {len(marks)}"
    )
    assert re.search(rf"^\| SFT.*{cell}", page, re.M)
