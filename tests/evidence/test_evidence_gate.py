"""Lessons of known effect through the gate, and certificates that must be refused."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secondnature.errors import BadInput, BadRecord
from secondnature.evidence import (
    aa_floor,
    compare,
    hash_probes,
    held_out,
    judge_lesson,
    read_in_training,
    recompute,
    verify,
)
from secondnature.evidence.gate import ReadAs
from secondnature.records import (
    Check,
    Comparison,
    Correction,
    Evidence,
    GateSettings,
    Message,
    Outcome,
    Probe,
    Side,
)

WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CHECK = Check(matches="yes")


class Lesson:
    """Probe sets with chosen counts: (both pass, losses, gains, both fail)."""

    def __init__(self) -> None:
        self.probes: list[Probe] = []
        self.before: list[Outcome] = []
        self.after: list[Outcome] = []

    def ask(
        self,
        behaviour: str,
        *,
        both: int = 0,
        losses: int = 0,
        gains: int = 0,
        neither: int = 0,
        side: Side = "right",
        per_seed: int = 1,
    ) -> Lesson:
        kinds = (
            [(True, True)] * both
            + [(True, False)] * losses
            + [(False, True)] * gains
            + [(False, False)] * neither
        )
        for i, (before, after) in enumerate(kinds):
            probe = Probe(
                prompt=[Message(role="user", content=f"{behaviour} {side} {i}")],
                behaviour=behaviour,
                check=CHECK,
                side=side,
                seed=f"{behaviour}-{side}-{i // per_seed}",
            )
            self.probes.append(probe)
            for outcomes, passed in ((self.before, before), (self.after, after)):
                answer = "yes" if passed else "no"
                outcomes.append(
                    Outcome(
                        probe=probe.digest(), passed=passed, answer=answer, margin=1.0 if passed else -1.0
                    )
                )
        return self

    def judge(self, gate: GateSettings | None = None, num_retries: int = 0) -> Evidence:
        evidence = judge_lesson(
            self.probes,
            self.before,
            self.after,
            behaviour="listening",
            before_version="a",
            after_version="b",
            gate=gate,
            num_retries=num_retries,
            created_at=WHEN,
        )
        verify(Evidence.model_validate_json(evidence.model_dump_json()))
        return evidence


def learned() -> Lesson:
    """A clear gain that spares the other side."""
    return (
        Lesson()
        .ask("listening", both=3, gains=49, neither=8)
        .ask("listening", both=115, losses=2, gains=1, neither=2, side="other")
    )


def of(evidence: Evidence, name: str, role: str = "guard") -> Comparison:
    return next(c for c in evidence.comparisons if (c.name, c.role) == (name, role))


def test_a_harmless_lesson_is_kept() -> None:
    evidence = learned().ask("code", both=280, losses=4, gains=4, neither=12).judge()
    assert evidence.verdict == "kept"
    assert "listening went from 3 to 52 of 60" in evidence.sentence
    assert "of 5 points in code" in evidence.sentence
    assert [c.role for c in evidence.comparisons] == ["gain", "other", "guard"]
    gain = evidence.comparisons[0]
    assert (gain.n, gain.before, gain.after, gain.gains, gain.losses, gain.num_seeds) == (
        60,
        3,
        52,
        49,
        0,
        60,
    )
    assert gain.mean_margin_before == pytest.approx((3 - 57) / 60)
    assert evidence.d_prime_passed
    assert evidence.alpha == 0.025


def test_harm_to_a_guard_is_undone_and_named_with_its_texts() -> None:
    evidence = learned().ask("code", both=54, losses=246).ask("lookup", both=300).judge()
    assert evidence.verdict == "undone"
    assert "code went from 300 to 54 of 300 probes, a fall of 82 points" in evidence.sentence
    assert "lookup" not in evidence.sentence
    code = of(evidence, "code")
    assert code.harmed
    assert code.passed is False
    assert len(code.flips) == 20
    assert not any(flip.gained for flip in code.flips)
    assert code.flips[0].before == "yes"
    assert code.flips[0].after == "no"


def test_a_yes_sayer_is_undone_with_a_d_prime_of_nought() -> None:
    evidence = (
        Lesson()
        .ask("listening", both=3, gains=57)
        .ask("listening", losses=120, side="other")
        .ask("code", both=300)
        .judge()
    )
    assert evidence.verdict == "undone"
    assert "the other side of listening" in evidence.sentence
    assert evidence.d_prime_after == pytest.approx(0, abs=0.3)
    assert evidence.d_prime_before is not None
    assert evidence.d_prime_before > 0.9
    assert not evidence.d_prime_passed


def test_one_who_said_yes_to_all_before_too_is_not_kept() -> None:
    """The other side is hopeless, so the exact test says nothing: d' alone must stop it."""
    evidence = (
        Lesson()
        .ask("listening", both=20, gains=40)
        .ask("listening", neither=120, side="other")
        .ask("code", both=300)
        .judge()
    )
    assert evidence.verdict == "inconclusive"
    assert "yes-sayer" in evidence.sentence


def test_no_gain_is_undone() -> None:
    evidence = Lesson().ask("listening", both=10, losses=4, gains=3, neither=43).ask("code", both=300).judge()
    assert evidence.verdict == "undone"
    assert "no gain" in evidence.sentence


def test_a_gain_that_may_be_chance_is_inconclusive_with_the_n_that_would_do() -> None:
    evidence = Lesson().ask("listening", both=10, losses=4, gains=9, neither=37).ask("code", both=300).judge()
    gain = of(evidence, "listening", "gain")
    assert evidence.verdict == "inconclusive"
    assert gain.passed is False
    assert gain.n_needed is not None
    assert 200 < gain.n_needed < 320
    assert f"about {gain.n_needed} probes would do" in evidence.sentence


def test_a_number_of_probes_that_nobody_has_is_not_asked_for() -> None:
    """A fall of 4 points beside a margin of 5: thousands would do; what is said is what these could show."""
    evidence = learned().ask("code", both=240, losses=30, gains=18, neither=12).judge()
    code = of(evidence, "code")
    assert evidence.verdict == "inconclusive"
    assert code.n_needed is not None
    assert code.n_needed > 1000
    assert "would do" not in evidence.sentence
    assert code.reach is not None
    assert "at best they rule out a fall of" in evidence.sentence
    assert "with as many flips one of" in evidence.sentence


def test_too_few_probes_are_inconclusive_with_the_n_that_would_do() -> None:
    evidence = learned().ask("code", both=40).judge()
    code = of(evidence, "code")
    assert evidence.verdict == "inconclusive"
    assert code.passed is None
    assert code.n_needed == 300
    assert "about 300 probes would do" in evidence.sentence

    few = Lesson().ask("listening", gains=30).ask("code", both=300).judge()
    assert few.verdict == "inconclusive"
    assert of(few, "listening", "gain").n_needed == 60


def test_many_probes_of_few_scenarios_are_too_few() -> None:
    evidence = Lesson().ask("listening", gains=60, per_seed=10).judge()
    assert evidence.verdict == "inconclusive"
    assert "60 probes from 6 scenarios" in evidence.sentence
    assert of(evidence, "listening", "gain").n_needed == 200
    guarded = learned().ask("code", both=300, per_seed=5).ask("talk", both=300, per_seed=3).judge()
    assert of(guarded, "code").passed is False  # 60 scenarios cannot rule out 5 points
    assert of(guarded, "code").n_needed == 77 * 5
    assert of(guarded, "talk").passed  # 100 can
    assert "+scenario-means/1" in of(guarded, "talk").method


def test_a_lowered_minimum_is_allowed_and_said() -> None:
    evidence = learned().ask("code", both=150, losses=1).judge(GateSettings(min_guard_probes=100))
    assert evidence.verdict == "kept"
    assert "min_guard_probes 100 instead of 300" in evidence.sentence


def test_a_guard_that_the_model_fails_anyway_is_no_guard() -> None:
    evidence = learned().ask("code", both=300).ask("poetry", both=30, losses=20, neither=250).judge()
    assert evidence.verdict == "kept"
    assert of(evidence, "poetry").passed is None
    assert "poetry passed only 50 of 300 before the lesson" in evidence.sentence


def test_an_unguarded_lesson_says_so() -> None:
    evidence = Lesson().ask("listening", both=3, gains=49, neither=8).judge()
    assert evidence.verdict == "kept"
    assert "nothing guarded the rest" in evidence.sentence
    assert "where the behaviour must not show was not probed" in evidence.sentence


def test_no_probe_of_the_behaviour_is_inconclusive() -> None:
    evidence = Lesson().ask("code", both=300).judge()
    assert evidence.verdict == "inconclusive"
    assert "no probe of listening was asked" in evidence.sentence


def test_a_retry_halves_alpha() -> None:
    def lesson() -> Lesson:
        return Lesson().ask("listening", both=10, losses=4, gains=13, neither=33).ask("code", both=300)

    assert lesson().judge().verdict == "kept"
    again = lesson().judge(num_retries=1)
    assert again.alpha == 0.0125
    assert again.verdict == "inconclusive"


def test_a_small_loss_within_the_margin_is_kept_though_it_is_real() -> None:
    evidence = learned().ask("code", both=2950, losses=50).judge()
    assert evidence.verdict == "kept"
    assert not of(evidence, "code").harmed


def test_five_guards_pass_a_harmless_lesson_about_as_often_as_computed() -> None:
    """4 % flips, both ways alike, 300 probes each: a joint power of .84 was computed elsewhere."""
    rng = np.random.default_rng(7)
    kept = 0
    for _ in range(60):
        guards = [
            compare(
                name="code",
                role="guard",
                n=300,
                num_seeds=300,
                before=150,
                gains=int(gains),
                losses=int(losses),
                clusters=[],
                gate=GateSettings(),
            )
            for losses, gains, _ in rng.multinomial(300, [0.02, 0.02, 0.96], size=5)
        ]
        kept += all(guard.passed for guard in guards)
    assert 0.70 <= kept / 60 <= 0.97


def test_every_probe_needs_its_outcomes() -> None:
    lesson = learned()
    lesson.after.pop()
    with pytest.raises(BadInput, match="1 of 180 probes have no outcome after"):
        lesson.judge()


def test_the_same_probe_twice_is_one_probe() -> None:
    once = learned().judge()
    lesson = learned()
    lesson.probes += lesson.probes
    assert lesson.judge() == once


def test_the_order_of_the_probes_changes_nothing_but_the_order_of_texts() -> None:
    lesson = learned().ask("code", both=280, losses=3, gains=5, neither=12)
    first = lesson.judge()
    lesson.probes.reverse()
    second = lesson.judge()
    assert second.sentence == first.sentence
    assert second.probes_sha256 == first.probes_sha256 == hash_probes(lesson.probes)


counts = st.fixed_dictionaries({k: st.integers(0, 40) for k in ("both", "losses", "gains", "neither")})


@settings(deadline=None, max_examples=15)
@given(counts, counts, counts, st.integers(1, 4), st.integers(0, 400))
def test_every_certificate_verifies_after_a_round_trip(
    gain: dict[str, Any], other: dict[str, Any], guard: dict[str, Any], per_seed: int, num_retries: int
) -> None:
    gate = GateSettings(min_gain_probes=10, min_gain_seeds=5, min_guard_probes=20, min_other_probes=20)
    lesson = Lesson().ask("listening", **gain, per_seed=per_seed).ask("listening", **other, side="other")
    lesson.ask("code", **guard, per_seed=per_seed)
    evidence = lesson.judge(gate, num_retries)  # verifies
    assert recompute(evidence) == evidence


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("verdict",), "kept"),
        (("sentence",), "Kept: all is well."),
        (("comparisons", 2, "p"), 0.001),
        (("comparisons", 2, "losses"), 10),
        (("comparisons", 2, "harmed"), False),
        (("comparisons", 2, "alpha"), 0.5),
        (("comparisons", 2, "after_interval"), (0.9, 1.0)),
        (("comparisons", 0, "num_seeds"), 7),
        (("d_prime_after",), 9.0),
        (("gate", "guard_margin"), 0.5),
    ],
)
def test_a_changed_certificate_is_refused(path: tuple[str | int, ...], value: Any) -> None:
    evidence = learned().ask("code", both=54, losses=246).judge()
    data = json.loads(evidence.model_dump_json())
    place = data
    for key in path[:-1]:
        place = place[key]
    assert place[path[-1]] != value
    place[path[-1]] = value
    with pytest.raises(BadRecord, match="changed or damaged"):
        verify(Evidence.model_validate(data))


def test_aa_floor_is_the_flip_rate_and_the_n_it_asks_for() -> None:
    lesson = Lesson().ask("code", both=192, losses=3, gains=3, neither=2)
    floor = aa_floor(lesson.before, lesson.after)
    assert (floor.n, floor.flips, floor.rate) == (200, 6, 0.03)
    assert floor.interval[0] < 0.03 < floor.interval[1]
    assert floor.guard_probes is not None
    assert 124 < floor.guard_probes < 190
    with pytest.raises(BadInput, match="share no probe"):
        aa_floor(lesson.before, [])


def test_what_was_taught_is_no_evidence() -> None:
    lesson = Lesson().ask("listening", both=3)
    taught = Correction.model_validate({"prompt": lesson.probes[1].prompt[0].content, "chosen": "ok"})
    assert held_out(lesson.probes, [taught]) == [lesson.probes[0], lesson.probes[2]]


def test_what_is_read_in_training_in_any_role_is_no_evidence() -> None:
    probes = [(1, 2), (3,), (4, 5, 6), (7,), (1, 2)]
    read: dict[ReadAs, list[list[int]]] = {
        "example": [[9], [1, 2]],
        "replay": [[1, 2], [1, 2], [4, 5]],
        "own answer": [],
        "student": [[7]],
    }
    assert read_in_training(probes, read) == {
        0: ["example", "replay"],
        3: ["student"],
        4: ["example", "replay"],
    }


ids = st.lists(st.integers(0, 2), min_size=1, max_size=3)


@given(st.lists(ids), st.lists(ids), st.lists(ids), st.lists(ids))
def test_a_probe_is_held_out_exactly_where_no_context_equals_it(
    probes: list[list[int]], taught: list[list[int]], replayed: list[list[int]], looked_at: list[list[int]]
) -> None:
    read: dict[ReadAs, list[list[int]]] = {
        "example": taught,
        "replay": replayed,
        "development probe": looked_at,
    }
    found = read_in_training(probes, read)
    for i, probe in enumerate(probes):
        assert found.get(i, []) == [role for role, contexts in read.items() if probe in contexts]
