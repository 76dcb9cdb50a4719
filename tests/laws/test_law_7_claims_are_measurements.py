"""Law 7: a claim is a measurement: a certificate's figures follow from its counts, and a changed one is refused."""

from __future__ import annotations

from typing import Any

import pytest
from scipy import stats

from secondnature.errors import BadRecord
from secondnature.evidence.certificate import verify
from secondnature.evidence.gate import judge_lesson
from secondnature.records import Evidence, Outcome, Probe, utc_now


def probes(name: str, count: int) -> list[Probe]:
    check = {"matches": "yes"}
    return [
        Probe.model_validate({"prompt": f"{name} {i}", "behaviour": name, "check": check})
        for i in range(count)
    ]


def evidence(gains: int = 30, losses: int = 4, retries: int = 0) -> Evidence:
    """60 probes of the behaviour, 10 passed before; 300 guards, two lost."""
    use, guard = probes("use", 60), probes("code", 300)
    asked = [*use, *guard]
    was = {p.digest(): i < 10 for i, p in enumerate(use)} | {p.digest(): True for p in guard}
    now = {p.digest(): losses <= i < 10 + gains for i, p in enumerate(use)}
    now |= {p.digest(): i >= 2 for i, p in enumerate(guard)}
    return judge_lesson(
        asked,
        [Outcome(probe=d, passed=x) for d, x in was.items()],
        [Outcome(probe=d, passed=x) for d, x in now.items()],
        behaviour="use",
        before_version="wone",
        after_version="wtwo",
        num_retries=retries,
        created_at=utc_now(),
    )


def test_the_figures_are_those_of_the_counts() -> None:
    found = evidence()
    verify(found)
    gain, guard = found.comparisons
    assert (gain.n, gain.before, gain.after, gain.gains, gain.losses) == (60, 10, 36, 30, 4)
    mid_p = stats.binom.sf(30, 34, 0.5) + 0.5 * stats.binom.pmf(30, 34, 0.5)
    assert gain.p == pytest.approx(mid_p, rel=1e-9)
    exact = stats.binomtest(36, 60).proportion_ci(0.95, method="exact")
    assert gain.after_interval == pytest.approx((exact.low, exact.high), rel=1e-9)
    assert (found.alpha, gain.alpha, guard.alpha, guard.margin) == (0.025, 0.025, 0.025, 0.05)
    assert found.verdict == "kept"
    assert "10 to 36 of 60" in found.sentence


def test_each_earlier_try_halves_the_level() -> None:
    assert [evidence(retries=n).alpha for n in range(3)] == [0.025, 0.0125, 0.00625]


def test_no_gain_and_too_little_evidence_are_results() -> None:
    assert evidence(gains=3, losses=3).verdict == "undone"
    unclear = evidence(gains=8, losses=4)
    assert unclear.verdict == "inconclusive"
    assert "Not enough evidence" in unclear.sentence


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("p", 1e-9),
        ("alpha", 0.05),
        ("after", 37),
        ("gains", 31),
        ("passed", False),
        ("after_interval", (0.5, 0.9)),
        ("n", 61),
    ],
)
def test_a_changed_figure_is_refused(where: str, value: Any) -> None:
    found = evidence()
    forged = found.comparisons[0].model_copy(update={where: value})
    with pytest.raises(BadRecord):
        verify(found.model_copy(update={"comparisons": [forged, *found.comparisons[1:]]}))


@pytest.mark.parametrize(
    ("where", "value"), [("verdict", "undone"), ("sentence", "All is well."), ("alpha", 0.1)]
)
def test_a_changed_verdict_is_refused(where: str, value: Any) -> None:
    with pytest.raises(BadRecord, match=where):
        verify(evidence().model_copy(update={where: value}))
