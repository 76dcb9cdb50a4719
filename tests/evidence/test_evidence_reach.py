"""What probe sets could show: by the gate's own tests, and by simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secondnature.evidence import compare, reach, reaches
from secondnature.evidence.reach import FLIP_RATE
from secondnature.records import GateSettings, Probe, ProbeRole
from secondnature.report.words import reaches as said

GATE = GateSettings(min_guard_probes=1, min_gain_probes=1, min_gain_seeds=1, min_other_probes=1)


def decision(role: ProbeRole, n: int, gains: int, losses: int, margin: float, alpha: float) -> str:
    gate = GATE.model_copy(update={"guard_margin": margin, "alpha": alpha})
    counts: dict[str, Any] = {"n": n, "num_seeds": n, "before": losses if role == "gain" else n - gains}
    return compare(name="x", role=role, gains=gains, losses=losses, clusters=[], gate=gate, **counts).decision


@settings(deadline=None, max_examples=25)
@given(st.integers(5, 300), st.sampled_from([0.025, 0.00625]), st.sampled_from([0.0, 0.04, 0.2]))
def test_the_smallest_fall_is_where_the_gate_turns(n: int, alpha: float, rate: float) -> None:
    gate = GATE.model_copy(update={"alpha": alpha})
    found = reach(name="x", role="guard", n=n, num_seeds=n, gate=gate, flip_rate=rate)
    flips = round(n * rate / 2)
    for fall, k in ((found.at_best, 0), (found.usual, flips)):
        if fall is not None and fall < 0.95:
            assert decision("guard", n, k, k, fall + 1e-9, alpha) == "held"
            assert decision("guard", n, k, k, fall - 2e-3, alpha) != "held"
    assert found.at_best is None or found.usual is None or found.at_best <= found.usual


@settings(deadline=None, max_examples=25)
@given(st.integers(5, 300), st.sampled_from([0.025, 0.00625]), st.sampled_from([0.0, 0.04, 0.2]))
def test_the_smallest_gain_is_where_the_gate_turns(n: int, alpha: float, rate: float) -> None:
    gate = GATE.model_copy(update={"alpha": alpha})
    found = reach(name="x", role="gain", n=n, num_seeds=n, gate=gate, flip_rate=rate)
    for gain, lost in ((found.at_best, 0), (found.usual, round(n * rate / 2))):
        if gain is None:
            assert decision("gain", n, n - lost, lost, 0.05, alpha) != "gained"
        else:
            gained = round(gain * n) + lost
            assert decision("gain", n, gained, lost, 0.05, alpha) == "gained"
            assert decision("gain", n, gained - 1, lost, 0.05, alpha) != "gained"


@pytest.mark.parametrize("n", [100, 300, 900])
def test_the_chance_is_that_of_a_simulation(n: int) -> None:
    found = reach(name="x", role="guard", n=n, num_seeds=n, gate=GATE, flip_rate=0.06)
    rng = np.random.default_rng(n)
    draws = rng.multinomial(n, [0.03, 0.03, 0.94], size=800)
    held = np.mean([decision("guard", n, int(b), int(c), 0.05, 0.025) == "held" for b, c, _ in draws])
    assert found.chance == pytest.approx(held, abs=0.05)


def test_figures_that_are_known() -> None:
    """Enumerated once: 300 probes at 4 % flips pass with 97 %, 100 never say anything under 3.8 points."""
    found = {n: reach(name="x", role="guard", n=n, num_seeds=n, gate=GateSettings()) for n in (40, 100, 300)}
    assert [found[n].too_few for n in (40, 100, 300)] == [True, True, False]
    assert [found[n].chance for n in (40, 100)] == [0.0, 0.0]
    assert found[300].chance == pytest.approx(0.965, abs=0.002)
    assert found[100].at_best == pytest.approx(0.038, abs=0.0005)
    gain = reach(name="x", role="gain", n=60, num_seeds=60, gate=GateSettings())
    assert gain.at_best == pytest.approx(5 / 60)


def probes(name: str, num: int, **fields: Any) -> list[Probe]:
    return [
        Probe.model_validate(
            {"prompt": f"{name} {i} {fields}", "behaviour": name, "check": {"matches": "y"}, **fields}
        )
        for i in range(num)
    ]


def test_a_lesson_of_a_small_user_hears_before_it_runs_what_it_could_show() -> None:
    found = reaches(
        [
            *probes("capitals", 10),
            *probes("facts", 300),
            *probes("trivia", 100),
            *probes("tell", 2, pin=True),
        ],
        "capitals",
        GateSettings(),
    )
    assert found is not None
    lines = said(found)
    assert lines[0] == (
        "capitals, 10 probes: too few for the gate's minimum; shows a gain of 50.0 points at best, 50.0 usually"
    )
    assert lines[1].startswith("facts (guard), 300 probes: rules out a fall of 1.3 points at best, ")
    assert lines[1].endswith("(5 must be ruled out); passes with a chance of 97 %")
    assert lines[2] == "tell (guard), 2 probes: one that is lost undoes the lesson"
    assert lines[3].startswith("trivia (guard), 100 probes: too few for the gate's minimum; rules out a fall")
    assert lines[4].startswith("with too few probes the lesson ends without a verdict")
    judged = reaches([*probes("capitals", 60), *probes("facts", 300)], "capitals", GateSettings())
    assert judged is not None
    assert said(judged)[2].startswith(
        "a lesson that changes nothing else passes all guards with a chance of 97 %, if 4 % of answers flip"
    )


def test_what_is_not_probed_is_said() -> None:
    assert reaches([], "x", GateSettings()) is None
    only_guards = reaches(probes("facts", 300), "x", GateSettings())
    assert only_guards is not None
    assert "no probe asks for what is taught: no gain can be shown" in said(only_guards)
    only_gain = reaches(probes("x", 60), "x", GateSettings())
    assert only_gain is not None
    assert said(only_gain)[-1] == "no guard: nothing is known of what else the lesson changes"


def test_scenarios_with_several_probes_count_once() -> None:
    several = reach(name="x", role="gain", n=60, num_seeds=20, gate=GateSettings())
    assert several.at_best == pytest.approx(6 / 20)  # the exact sign flips need six scenarios
    guard = reach(name="g", role="guard", n=600, num_seeds=200, gate=GateSettings(), flip_rate=0.0)
    alone = reach(name="g", role="guard", n=200, num_seeds=200, gate=GATE, flip_rate=0.0)
    assert guard.at_best == alone.at_best
    assert FLIP_RATE == 0.04
