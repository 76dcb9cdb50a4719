"""What looks count, and what is a reason to stop: the numbers of one job, without a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from test_train_run import job

from secondnature import wire
from secondnature.errors import NonFinite
from secondnature.train.stopping import Stopping


def looking(tmp_path: Path, sides: str, **fields: Any) -> Stopping:
    """Spoken probes; `r`: right, `o`: other; upper case: read by the trainer."""
    names = {"r": "right", "o": "other"}
    probes = [wire.DevelopmentProbe([1], [], [], names[c.lower()], c.islower()) for c in sides]
    return Stopping(job(tmp_path, development=probes, **fields))


def reasons(stopping: Stopping, *looks: str) -> list[str | None]:
    """Of one look after another; `+`: that probe passed."""
    found: list[str | None] = []
    for step, marks in enumerate(looks):
        look = stopping.metric(step, [None] * len(marks), [m == "+" for m in marks])
        found.append(stopping.reason(look))
    return found


def test_it_stops_at_the_share_of_the_right_side(tmp_path: Path) -> None:
    stopping = looking(tmp_path, "rrRRo", until_passed=0.75)
    assert reasons(stopping, "-----", "++--+", "-+--+", "++--+", "+++--") == [
        None,
        None,
        None,
        None,
        "until_passed",
    ]


@pytest.mark.parametrize("lost", range(7))
def test_more_than_half_of_what_passed_must_fail(tmp_path: Path, lost: int) -> None:
    """Six of the other side passed at first; one did not, and does now: that heals nothing."""
    stopping = looking(tmp_path, "rooooooo", until_passed=1.0)
    found = reasons(stopping, "-++++++-", "-" + "-" * lost + "+" * (6 - lost) + "+")
    assert found == [None, "the other side gave way" if lost > 3 else None]


@pytest.mark.parametrize("aim", [{}, {"until_passed": 1.0}, {"until_margin": 1.0}])
def test_without_an_aim_answers_are_only_shown(tmp_path: Path, aim: dict[str, float]) -> None:
    gave = "the other side gave way" if aim else None
    assert reasons(looking(tmp_path, "roo", **aim), "-++", "---") == [None, gave]
    assert reasons(looking(tmp_path, "roo", **aim), "---", "---") == [None, None], "nothing passed at first"
    assert reasons(looking(tmp_path, "rOO", **aim), "-++", "---") == [None, None], (
        "margins have their own rule"
    )


def test_a_look_counts_by_side_and_names_what_was_lost(tmp_path: Path) -> None:
    stopping = looking(tmp_path, "rooR")
    stopping.metric(0, [None] * 4, [True, True, False, False])
    look = stopping.metric(1, [None, None, 0.5, -1.0], [False, False, True, True])
    assert (look.passed, look.asked) == ({"right": 0.5, "other": 0.5}, {"right": 2, "other": 2})
    assert (look.margins, look.lost) == ({"right": [-1.0], "other": [0.5]}, [1])
    with pytest.raises(NonFinite, match="after step 2"):
        stopping.metric(2, [None, math.nan, None, None], [True] * 4)
