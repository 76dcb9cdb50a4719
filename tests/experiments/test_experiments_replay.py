"""The replay experiment: its arms differ in what they say they differ in, and its page follows from its counts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from secondnature.evidence.statistics import clopper_pearson
from secondnature.wire import TrainRequest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "experiments" / "replay.json"


class Parrot:
    """The far side of the wire: answers every question alike."""

    def chat(self, messages: list[dict[str, str]], **_: Any) -> dict[str, Any]:
        return {"choices": [{"message": {"content": f"No, {len(messages[0]['content'])}."}}]}


def test_the_arms_differ_in_the_replay_and_in_nothing_else(experiment: ModuleType) -> None:
    fields = {arm: experiment.replay(Parrot(), arm, 0) for arm in experiment.ARMS}
    for field in fields.values():
        body = {**experiment.settings(1e-3, 3), "ledger": True, "replay": field}
        assert TrainRequest.model_validate(body).max_steps == 3
    assert fields["none"]["share"] == 0
    shares = {f["share"] for arm, f in fields.items() if arm != "none"}
    assert shares == {0.25}
    refusals = [r for r in fields["general"]["examples"] if r["messages"][-1]["content"].startswith("No, ")]
    assert not refusals
    own, held = fields["own"], fields["own-kl"]
    assert own["examples"] == held["examples"]
    assert all(r["messages"][-1]["content"].startswith("No, ") for r in own["examples"])
    assert {k for k in held if held.get(k) != own.get(k)} == {"match", "weight"}
    assert experiment.replay(Parrot(), "own", 1)["examples"] != own["examples"]


def test_the_page_is_made_of_the_counts(experiment: ModuleType) -> None:
    found = json.loads(RESULTS.read_text())
    assert (RESULTS.parent / "replay.md").read_text() == experiment.page(found)
    assert {(r["arm"], r["seed"]) for r in found["lessons"]} == {
        (arm, seed) for arm in experiment.ARMS for seed in range(3)
    }
    assert len({tuple(r["taught"]) for r in found["lessons"]}) == 3, "a seed has corrections of its own"
    before = {json.dumps({k: c["before"] for k, c in r["counts"].items()}) for r in found["lessons"]}
    assert len(before) == 1, "all lessons start from the same weights"
    passed = sum(r["counts"]["push-back/guard"]["after"] for r in found["lessons"] if r["arm"] == "none")
    low, high = clopper_pearson(passed, 900)
    cell = re.escape(f"{passed / 9:.1f} % [{100 * low:.0f}, {100 * high:.0f}]")
    assert re.search(rf"^\| nothing \|.*{cell}", (RESULTS.parent / "replay.md").read_text(), re.M)
