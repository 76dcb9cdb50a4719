"""Table, page, sentence, limits and tests of a certificate say the same, whatever the counts; old ones are read."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secondnature.errors import BadRecord
from secondnature.evidence import certify, compare, recompute, verify
from secondnature.evidence.decision import RESOLUTION
from secondnature.evidence.statistics import (
    Cluster,
    cluster_sign_flip,
    difference_p,
    mcnemar_mid_p,
    noninferiority_p,
    scenario_counts,
    shifted_sign_flip,
)
from secondnature.records import Comparison, Decision, Evidence, GateSettings, Lesson, ProbeRole
from secondnature.report import markdown_table
from secondnature.report.page import render
from secondnature.report.run import Run
from secondnature.report.view import view

WHEN = datetime(2026, 1, 2, tzinfo=UTC)
FORMAT_1 = (Path(__file__).parent / "certificates_of_format_1.jsonl").read_text("utf-8").splitlines()
FORMAT_2 = (Path(__file__).parent / "certificates_of_format_2.jsonl").read_text("utf-8").splitlines()
WORDS: dict[str, set[Decision]] = {
    "improved": {"gained"},
    "held": {"held"},
    "harmed": {"harmed"},
    "got worse": {"harmed"},
    "no gain": {"no_gain"},
    "gain not shown": {"not_shown"},
    "not shown to hold": {"not_shown"},
    "not judged": {"not_judged"},
}
MINIMA = {"min_gain_probes": 20, "min_gain_seeds": 10, "min_guard_probes": 20, "min_other_probes": 20}

singles = st.tuples(*[st.integers(0, 40)] * 4).map(lambda k: (k, [])).filter(lambda k: sum(k[0]) > 0)


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[tuple[int, int, int, int], list[Cluster]]:
    """Scenarios of one to four probes: ((both, losses, gains, neither), clusters)."""
    kinds = draw(
        st.lists(st.lists(st.sampled_from("bblgn"), min_size=1, max_size=4), min_size=2, max_size=40)
    )
    told = "".join("".join(k) for k in kinds)
    clusters = [(len(k), k.count("g"), k.count("l")) for k in kinds]
    if len(clusters) == len(told):
        clusters = []
    return (told.count("b"), told.count("l"), told.count("g"), told.count("n")), clusters


sets = st.one_of(singles, scenarios())
gates = st.sampled_from([GateSettings(), GateSettings(**MINIMA), GateSettings(alpha=0.2, **MINIMA)])


def compared(name: str, role: ProbeRole, found: Any, gate: GateSettings, retries: int) -> Comparison:
    (both, losses, gains, neither), clusters = found
    n = both + losses + gains + neither
    return compare(
        name=name,
        role=role,
        n=n,
        num_seeds=len(clusters) or n,
        before=both + losses,
        gains=gains,
        losses=losses,
        clusters=clusters,
        gate=gate,
        num_retries=retries,
    )


def certificate(comparisons: list[Comparison], gate: GateSettings, retries: int = 0) -> Evidence:
    return certify(
        comparisons,
        behaviour="listening",
        gate=gate,
        num_retries=retries,
        before_version="wa",
        after_version="wb",
        probes_sha256="ab" * 32,
        seed=0,
        created_at=WHEN,
    )


def shown_and_harm(c: Comparison, gate: GateSettings, retries: int) -> tuple[bool, bool]:
    """What the two tests say, from the counts and the tests alone."""
    alpha = gate.alpha / 2**retries
    mirrored = [(n, lost, gained) for n, gained, lost in c.clusters]
    harm = cluster_sign_flip(mirrored) if c.clusters else mcnemar_mid_p(c.losses, c.gains)
    if c.margin is None:
        p = cluster_sign_flip(c.clusters) if c.clusters else mcnemar_mid_p(c.gains, c.losses)
    elif c.clusters:
        size, up, down = scenario_counts(c.clusters)
        p = max(noninferiority_p(size, down, up, c.margin), shifted_sign_flip(c.clusters, -c.margin))
    else:
        p = noninferiority_p(c.n, c.losses, c.gains, c.margin)
    return p <= alpha, harm <= gate.alpha


def expected_decisions(c: Comparison, shown: bool, harm: bool) -> set[Decision]:
    """What may be decided where the tests say so; how many probes there are decides between the two."""
    if shown:
        return {"gained", "not_judged"} if c.role == "gain" else {"held", "not_judged"}
    if harm:
        return {"harmed"} if c.role == "gain" or c.before >= 0.2 * c.n else {"not_judged"}
    if c.role == "gain":
        return {"no_gain" if c.gains <= c.losses else "not_shown", "not_judged"}
    return {"not_shown", "not_judged"}


def in_points(text: str) -> tuple[float, float]:
    """The limits as the table prints them."""
    found = re.search(r"pts \[([^,]+), ([^\]]+)\]", text)
    assert found, text
    low, high = (float(end.replace("−", "-")) for end in found.groups())
    return low, high


def decision_in(cell: str) -> set[Decision]:
    word = cell.strip().split(" ", 1)[1].split(":")[0]
    return WORDS[word]


def test_harm_is_claimed_only_where_it_is_shown() -> None:
    """Twenty losses and fourteen gains: a fall, but no harm is shown; twenty and none: it is."""
    gate = GateSettings()
    gain = compared("listening", "gain", ((3, 0, 49, 8), []), gate, 0)
    for gains, decision, verdict in ((14, "not_shown", "inconclusive"), (0, "harmed", "undone")):
        code = compared("code", "guard", ((266, 20, gains, 14 - gains), []), gate, 0)
        evidence = certificate([gain, code], gate)
        assert (code.decision, evidence.verdict) == (decision, verdict)
        assert ("did harm" in evidence.sentence) == (decision == "harmed")


@settings(deadline=None, max_examples=40)
@given(sets, sets, sets, gates, st.integers(0, 3))
def test_nothing_in_a_certificate_contradicts_anything_else(
    gain: Any, other: Any, guard: Any, gate: GateSettings, retries: int
) -> None:
    comparisons = [
        compared("listening", "gain", gain, gate, retries),
        compared("listening", "other", other, gate, retries),
        compared("code", "guard", guard, gate, retries),
    ]
    evidence = certificate(comparisons, gate, retries)
    rows = markdown_table(evidence).splitlines()[2:5]
    lesson = Lesson(id="0001-listening", number=1, job="j", created_at=WHEN)
    seen = view(Run(lesson=lesson, evidence=evidence))
    for c, row, on_page in zip(comparisons, rows, seen.rows, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert decision_in(cells[6]) == {c.decision} == WORDS[on_page.said.word]
        assert c.harmed == (c.decision == "harmed")
        shown, harm = shown_and_harm(c, gate, retries)
        assert c.decision in expected_decisions(c, shown, harm)
        border = 0.0 if c.margin is None else -c.margin
        assert c.difference_interval is not None
        low, high = c.difference_interval
        assert low <= (c.after - c.before) / c.n <= high
        assert ((low > border), (high < 0)) == (shown, harm)
        printed = in_points(cells[4])
        assert ((printed[0] > 100 * border), (printed[1] < 0)) == (shown, harm)
        assert on_page.change_interval in cells[4]
    _check_sentence(evidence)


def _check_sentence(evidence: Evidence) -> None:
    """The sentence claims of each set what was decided of it, and harm of no other."""
    said = evidence.sentence
    harmed = [c for c in evidence.comparisons if c.decision == "harmed"]
    assert ("did harm" in said) == bool(harmed)
    claims = said.partition("did harm: ")[2].split("; ") if harmed else []
    for c in evidence.comparisons:
        label = f"the other side of {c.name}" if c.role == "other" else c.name
        claimed = any(part.startswith(f"{label} went from") for part in claims)
        assert claimed == (c.decision == "harmed")
        open_end = f"{label} went from {c.before} to {c.after} of {c.n} probes"
        if evidence.verdict == "inconclusive" and c.role != "gain":
            doubted = re.search(re.escape(open_end) + r"[^;]*?, which does not rule out", said) is not None
            assert doubted == (c.decision == "not_shown")
        if evidence.verdict == "kept" and c.role != "gain":
            ruled_out = re.search(rf"falls [^;]*points in {re.escape(label)}\b", said) is not None
            assert ruled_out == (c.decision == "held")
    if evidence.verdict == "kept":
        assert all(c.decision in ("gained", "held", "not_judged") for c in evidence.comparisons)
    if "no gain" in said:
        assert any(c.decision == "no_gain" for c in evidence.comparisons)


def test_the_certificate_that_contradicted_itself_has_one_voice() -> None:
    """One of format 1: "not shown to hold" in the table, "did harm" in the sentence, an interval around 0."""
    data = json.loads(FORMAT_1[-1])
    assert data["comparisons"][2]["difference_interval"][1] > 0
    assert "did harm" in data["sentence"]
    old = Evidence.model_validate(data)
    assert (
        "✕ harmed" in markdown_table(old).splitlines()[4]
    )  # shown by what was decided, without that interval
    assert "−8.3 pts |" in markdown_table(old).splitlines()[4]
    new = recompute(old)
    assert "−8.3 pts [−22, −3]" in markdown_table(new).splitlines()[4]
    assert "✕ harmed" in markdown_table(new).splitlines()[4]
    assert (
        "code went from 118 to 108 of 120 probes, a fall of 8.3 points (limits of the tests: 3.2 to"
        in new.sentence
    )
    lesson = Lesson(id="0001-listening", number=1, job="j", created_at=WHEN)
    assert "harmed" in render([Run(lesson=lesson, evidence=new)])


@settings(deadline=None, max_examples=40)
@given(st.integers(5, 200), st.data())
def test_the_limits_are_where_the_exact_test_changes_its_mind(n: int, data: st.DataObject) -> None:
    losses = data.draw(st.integers(0, n // 2))
    gains = data.draw(st.integers(0, n - losses))
    gate = GateSettings(**MINIMA)
    found = ((n - losses - gains, losses, gains, 0), [])
    for role in ("gain", "guard"):
        c = compared("x", role, found, gate, 0)
        assert c.difference_interval is not None
        low, high = c.difference_interval
        border = 0.0 if c.margin is None else -c.margin
        for limit, p, tested in (
            (low, lambda d: difference_p(n, losses, gains, d), border),
            (-high, lambda d: difference_p(n, gains, losses, d), 0.0),
        ):
            if abs(limit - tested) < 3 * RESOLUTION:
                continue  # held there by the test itself, which is another one at 0
            below = limit - 2 * RESOLUTION
            if below > -1 and (below - tested) * (limit - tested) > 0:
                assert p(below) <= gate.alpha
            assert p(limit) > gate.alpha * (1 - 1e-3)


@settings(deadline=None, max_examples=30)
@given(scenarios())
def test_the_limits_of_scenarios_are_where_their_test_changes_its_mind(found: Any) -> None:
    (_, losses, gains, _), clusters = found
    if not clusters:
        return
    c = compared("x", "gain", found, GateSettings(**MINIMA), 0)
    assert c.difference_interval is not None
    low, high = c.difference_interval
    mirrored = [(n, lost, gained) for n, gained, lost in clusters]
    for limit, one in ((low, clusters), (-high, mirrored)):
        assert shifted_sign_flip(one, limit) > 0.025 or limit == 0 or (losses, gains) == (0, 0)
        if limit - 2 * RESOLUTION > -1:
            assert (
                shifted_sign_flip(one, limit - 2 * RESOLUTION) <= 0.025 * 1.02 or abs(limit) < 3 * RESOLUTION
            )


def test_a_limit_falls_with_losses_and_rises_with_gains() -> None:
    gate = GateSettings()
    for role in ("gain", "guard"):
        lows = [
            compared("x", role, ((300 - k, k, 0, 0), []), gate, 0).difference_interval or (0.0, 0.0)
            for k in range(9)
        ]
        assert all(a[0] > b[0] and a[1] > b[1] for a, b in pairwise(lows))


VERDICTS = {
    "kept": [((3, 0, 49, 8), []), ((115, 2, 1, 2), []), ((290, 4, 4, 2), [])],
    "undone": [((3, 0, 49, 8), []), ((115, 2, 1, 2), []), ((54, 246, 0, 0), [])],
    "no gain": [((10, 9, 3, 38), []), ((115, 2, 1, 2), []), ((290, 4, 4, 2), [])],
    "got worse": [((10, 30, 3, 17), []), ((115, 2, 1, 2), []), ((290, 4, 4, 2), [])],
    "inconclusive": [((10, 4, 9, 37), []), ((20, 0, 0, 0), []), ((5, 0, 0, 295), [])],
    "scenarios": [
        ((0, 0, 60, 0), [(3, 3, 0)] * 20),
        ((120, 0, 0, 0), [(3, 0, 0)] * 40),
        ((300, 0, 0, 0), []),
    ],
    "yes-sayer": [((3, 0, 57, 0), []), ((0, 120, 0, 0), []), ((300, 0, 0, 0), [])],
}


@pytest.mark.parametrize("kind", VERDICTS)
@pytest.mark.parametrize("retries", [0, 1, 7, 40, 52, 60, 150, 400, 1100, 5000])
def test_a_certificate_verifies_after_any_number_of_retries(kind: str, retries: int) -> None:
    gate = GateSettings()
    roles: tuple[ProbeRole, ...] = ("gain", "other", "guard")
    names = ("listening", "listening", "code")
    found = [compared(n, r, k, gate, retries) for n, r, k in zip(names, roles, VERDICTS[kind], strict=True)]
    evidence = certificate(found, gate, retries)
    written = Evidence.model_validate_json(evidence.model_dump_json())
    assert written == evidence  # nothing that JSON cannot hold
    verify(written)
    if retries == 0:
        verdicts = {"no gain": "undone", "got worse": "undone", "scenarios": "kept", "yes-sayer": "undone"}
        assert evidence.verdict == verdicts.get(kind, kind)


def test_a_changed_level_is_refused_however_small_it_is() -> None:
    gate = GateSettings()
    found = [compared("listening", "gain", ((3, 0, 49, 8), []), gate, 60)]
    evidence = certificate(found, gate, 60)
    with pytest.raises(BadRecord, match="alpha"):
        verify(evidence.model_copy(update={"alpha": 1e-13}))


@pytest.mark.parametrize("line", FORMAT_1)
def test_a_certificate_of_format_1_can_be_read_shown_and_verified(line: str) -> None:
    old = Evidence.model_validate_json(line)
    assert old.schema_version == 1
    verify(old)
    for c, row in zip(old.comparisons, markdown_table(old).splitlines()[2:], strict=False):
        assert decision_in(row.strip("| ").split(" | ")[6]) == {c.decision}
        assert c.passed == (None if c.decision == "not_judged" else c.decision in ("gained", "held"))
    again = Evidence.model_validate_json(old.model_dump_json())
    assert again == old
    verify(again)


@pytest.mark.parametrize("key", ["p", "harm_p", "alpha", "n", "gains", "before_interval"])
def test_a_changed_certificate_of_format_1_is_refused(key: str) -> None:
    data = json.loads(FORMAT_1[0])
    changed = {"n": 61, "gains": 48, "before_interval": [0.0, 0.5]}.get(key, 0.3)
    data["comparisons"][0][key] = changed
    with pytest.raises(BadRecord, match="changed or damaged"):
        verify(Evidence.model_validate(data))
    data = json.loads(FORMAT_1[0]) | {"verdict": "undone"}
    with pytest.raises(BadRecord, match="verdict"):
        verify(Evidence.model_validate(data))


@pytest.mark.parametrize("line", FORMAT_2)
def test_a_certificate_of_format_2_can_be_read_and_verified_but_not_changed(line: str) -> None:
    old = Evidence.model_validate_json(line)
    assert old.schema_version == 2
    verify(old)
    raw = json.loads(line)
    raw["comparisons"][1]["p"] = 0.3
    with pytest.raises(BadRecord, match="changed or damaged"):
        verify(Evidence.model_validate(raw))


def test_a_limit_is_not_minus_nothing() -> None:
    clusters = [(2, 0, 0)] * 44 + [(1, 0, 0)] * 212
    found = compare(
        name="code",
        role="guard",
        n=300,
        num_seeds=256,
        before=300,
        gains=0,
        losses=0,
        clusters=clusters,
        gate=GateSettings(),
    )
    assert found.difference_interval is not None
    assert math.copysign(1.0, found.difference_interval[1]) == 1.0
