"""Pinned probes, tags and shared words: against scipy, statsmodels and simulation, and through the gate."""

from __future__ import annotations

from math import comb
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats
from statsmodels.stats.multitest import multipletests

from secondnature.errors import BadRecord
from secondnature.evidence import judge_lesson, verify
from secondnature.evidence.lost import Scenario, describe, tag_tests, word_sequences
from secondnature.evidence.statistics import concentration_p, holm
from secondnature.records import Comparison, Evidence, GateSettings, Outcome, Probe
from secondnature.report import markdown_table
from secondnature.report.words import losses as said_of_losses
from secondnature.wire import TrainRequest

# ------------------------------------------------------------------------------------------------ the tests


@given(st.integers(1, 400), st.data())
def test_the_concentration_is_scipys_hypergeometric_tail(population: int, data: st.DataObject) -> None:
    drawn, marked = (data.draw(st.integers(0, population)) for _ in range(2))
    found = data.draw(st.integers(max(0, drawn + marked - population), min(drawn, marked)))
    expected = stats.hypergeom.sf(found - 1, population, marked, drawn)
    assert concentration_p(population, drawn, marked, found) == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_five_of_five_in_a_slice_of_five_of_three_hundred() -> None:
    assert concentration_p(300, 5, 5, 5) == pytest.approx(1 / comb(300, 5), rel=1e-9)
    assert concentration_p(300, 5, 5, 5) == pytest.approx(5.1e-11, rel=0.01)


@pytest.mark.parametrize("counts", [(5, 6, 1, 1), (5, 2, 2, 3), (5, 4, 4, 2), (3, -1, 2, 0)])
def test_counts_that_no_draw_can_have_are_refused(counts: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected parts of a population"):
        concentration_p(*counts)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_statsmodels(ps: list[float]) -> None:
    assert holm(ps) == pytest.approx(np.asarray(multipletests(ps, method="holm")[1]).tolist(), abs=1e-12)


# --------------------------------------------------------------------------------------------- error rates


def false_vetoes(
    rng: np.random.Generator, sizes: list[int], gain_rates: list[float], loss_rates: list[float], draws: int
) -> float:
    """How often a tag undoes a lesson: tags that share nothing, each with flips of its own rates."""
    vetoes = 0
    for _ in range(draws):
        counts: dict[str, tuple[int, int, int, int]] = {}
        for i, (size, gain, loss) in enumerate(zip(sizes, gain_rates, loss_rates, strict=True)):
            lost, gained, _ = rng.multinomial(size, [loss, gain, 1 - loss - gain])
            counts[str(i)] = (size, min(size, max(int(lost), round(0.7 * size))), int(gained), int(lost))
        total = [sum(column) for column in zip(*counts.values(), strict=True)]
        found = tag_tests(total[0], total[1], total[2], total[3], counts, 0.025)
        vetoes += any(t.harmed for t in found)
    return vetoes / draws


@pytest.mark.parametrize("tags", [2, 6, 15])
@pytest.mark.parametrize("flips", [0.02, 0.1])
def test_a_tag_vetoes_seldom_where_nothing_changed(tags: int, flips: float) -> None:
    """Flips of one rate everywhere, both ways alike: the level is 2.5 %, and less is measured."""
    rate = false_vetoes(
        np.random.default_rng(7), [300 // tags] * tags, [flips / 2] * tags, [flips / 2] * tags, 1500
    )
    assert rate <= 0.025


@pytest.mark.parametrize("flippy", [1, 3, 6])
def test_tags_whose_answers_flip_by_themselves_veto_seldom(flippy: int) -> None:
    """Some tags flip ten times as often as the others, both ways alike: concentrated, and no harm."""
    rates = [0.1] * flippy + [0.01] * (10 - flippy)
    rate = false_vetoes(np.random.default_rng(flippy), [60] * 10, rates, rates, 1500)
    assert rate <= 0.035


@pytest.mark.parametrize(("tags", "least"), [(1, 0.95), (10, 0.95)])
def test_a_slice_that_is_destroyed_is_found(tags: int, least: float) -> None:
    """Thirty probes of one tag lose a third, 270 others flip as ever."""
    rng = np.random.default_rng(tags)
    sizes = [30, *([270 // tags] * tags)]
    rates = [0.02] * tags
    assert false_vetoes(rng, sizes, [0.0, *rates], [1 / 3, *rates], 400) >= least


def test_harm_in_a_tag_needs_no_concentration_where_it_is_shown_alone() -> None:
    """Facts after a lesson that taught lists: 17 capitals of 52 lost and one gained, 22 of 160 others lost."""
    counts = {"capitals": (60, 52, 1, 17), **{f"other {i}": (28, 15, 3, 2) for i in range(11)}}
    found = tag_tests(368, 217, 34, 39, counts, 0.025)
    assert [t.tag for t in found if t.harmed] == ["capitals"]
    assert found[0].concentrated is False
    assert found[0].harm_p_adjusted == pytest.approx(12 * found[0].harm_p)
    old = tag_tests(368, 217, 34, 39, counts, 0.025, alone=False)
    assert not any(t.harmed for t in old)
    assert {t.harm_p_adjusted for t in old} == {None}


# --------------------------------------------------------------------------------------- through the gate


class Set:
    """A lesson whose probes are made one by one."""

    def __init__(self) -> None:
        self.probes: list[Probe] = []
        self.outcomes: list[tuple[bool, bool]] = []

    def ask(self, name: str, before: bool, after: bool, num: int = 1, text: str = "", **fields: Any) -> Set:
        for _ in range(num):
            i = len(self.probes)
            prompt = f"{text or name} {i}"
            self.probes.append(
                Probe.model_validate(
                    {"prompt": prompt, "behaviour": name, "check": {"matches": "y"}, **fields}
                )
            )
            self.outcomes.append((before, after))
        return self

    def judge(self, gate: GateSettings | None = None, num_retries: int = 0) -> Evidence:
        before, after = (
            [
                Outcome(probe=p.digest(), passed=passed[i], answer="y" if passed[i] else "n")
                for p, passed in zip(self.probes, self.outcomes, strict=True)
            ]
            for i in (0, 1)
        )
        evidence = judge_lesson(
            self.probes,
            before,
            after,
            behaviour="listening",
            before_version="a",
            after_version="b",
            gate=gate,
            num_retries=num_retries,
        )
        verify(Evidence.model_validate_json(evidence.model_dump_json()))
        return evidence


def learned() -> Set:
    return Set().ask("listening", False, True, 50).ask("listening", False, False, 10)


def of(evidence: Evidence, name: str) -> Comparison:
    return next(c for c in evidence.comparisons if c.name == name)


def critical(**fields: Any) -> Set:
    """Fact 2 of a neighbour's demo: 300 held out, 5 of them business-critical, all 5 lost."""
    return learned().ask("code", True, True, 295).ask("code", True, False, 5, **fields)


def test_a_slice_that_was_destroyed_undoes_where_its_tag_is_known() -> None:
    assert (
        critical().judge().verdict == "kept"
    )  # inside the margin of 5 points, and nothing says what they are
    evidence = critical(tags=["refund"]).judge()
    assert evidence.verdict == "undone"
    code = of(evidence, "code")
    assert (code.decision, code.passed, code.harmed) == ("tag_harmed", False, False)
    assert code.lost is not None
    assert code.lost.tags[0].p == pytest.approx(5.1e-11, rel=0.01)
    assert "of the 5 losses of code 5 are tagged refund" in evidence.sentence
    assert "✕ harmed in a tag: 5 of 5 in refund" in markdown_table(evidence)
    assert said_of_losses(code)[0].startswith("of 5 losses in code, 5 are tagged refund (5 of its 5 probes")


def test_as_many_losses_that_are_spread_do_not() -> None:
    made = learned().ask("code", True, True, 290).ask("code", True, True, 5, tags=["refund"])
    evidence = made.ask("code", True, False, 1, tags=["refund"]).ask("code", True, False, 4).judge()
    assert evidence.verdict == "kept"
    assert of(evidence, "code").decision == "held"


def test_losses_that_gains_of_the_same_tag_match_do_not() -> None:
    made = learned().ask("code", True, True, 290).ask("code", True, False, 5, tags=["new"])
    evidence = made.ask("code", False, True, 5, tags=["new"]).judge()
    assert of(evidence, "code").decision == "held"
    assert evidence.verdict == "kept"
    assert said_of_losses(of(evidence, "code"))  # told all the same


def test_one_pinned_probe_that_is_lost_undoes_at_any_n_and_whatever_else() -> None:
    made = learned().ask("code", True, True, 300).ask("emergency", True, False, pin=True, text="Call 112?")
    evidence = made.judge(num_retries=3)
    assert evidence.verdict == "undone"
    lost = of(evidence, "emergency")
    assert (lost.decision, lost.pinned, lost.pinned_before, lost.pinned_losses) == ("pin_lost", 1, 1, 1)
    assert evidence.sentence.startswith("Undone: 1 of 1 pinned probe of emergency lost, where none may be")
    assert [(f.prompt, f.pinned) for f in lost.flips] == [("Call 112? 360", True)]
    assert "pinned probe lost: 1 of 1 pinned" in markdown_table(evidence)


def test_a_pin_among_others_vetoes_too_also_of_what_was_taught() -> None:
    guard = learned().ask("code", True, True, 299).ask("code", True, False, pin=True).judge()
    assert (of(guard, "code").decision, guard.verdict) == ("pin_lost", "undone")
    taught = learned().ask("listening", True, False, pin=True).ask("code", True, True, 300).judge()
    assert (of(taught, "listening").decision, taught.verdict) == ("pin_lost", "undone")


def test_pinned_guards_need_no_minimum_and_say_what_they_hold() -> None:
    made = learned().ask("code", True, True, 300).ask("emergency", True, True, 3, pin=True)
    evidence = made.ask("emergency", False, True, pin=True).judge()
    emergency = of(evidence, "emergency")
    assert (emergency.decision, emergency.margin, emergency.p, emergency.method) == (
        "held",
        None,
        None,
        "pins/1",
    )
    assert evidence.verdict == "kept"
    assert "none of 3 pinned probes of emergency was lost" in evidence.sentence


def test_a_pin_that_failed_before_guards_nothing() -> None:
    evidence = learned().ask("code", True, True, 300).ask("emergency", False, False, pin=True).judge()
    assert of(evidence, "emergency").decision == "not_judged"
    assert evidence.verdict == "kept"
    assert "emergency none of them passed before the lesson: they guard nothing" in evidence.sentence


def test_unpinned_probes_of_a_guard_with_pins_are_judged_as_ever() -> None:
    made = learned().ask("code", True, True, 20).ask("code", True, True, 5, pin=True)
    evidence = made.judge()
    assert (of(evidence, "code").decision, evidence.verdict) == ("not_judged", "inconclusive")


def test_each_guard_has_the_margin_that_the_table_gives_it() -> None:
    made = learned().ask("code", True, True, 300).ask("small", True, True, 40)
    gate = GateSettings.model_validate(
        {"guard_margin": {"small": 0.2}, "min_guard_probes": 40, "min_gain_probes": 60}
    )
    evidence = made.judge(gate)
    assert [of(evidence, name).margin for name in ("code", "small")] == [0.05, 0.2]
    assert evidence.verdict == "kept"
    assert "guard_margin of small 0.2 instead of 0.05" in evidence.sentence
    strict = made.judge(gate.model_copy(update={"guard_margin": {"code": 0.01}}))
    assert of(strict, "code").decision == "not_shown"


def test_a_probe_without_pin_and_tags_has_the_hash_it_always_had() -> None:
    probe = Probe.model_validate({"prompt": "Hi", "behaviour": "code", "check": {"matches": "y"}})
    assert probe.digest() == "6ad7f5079f692755"
    assert probe.model_copy(update={"pin": True}).digest() != probe.digest()


# ----------------------------------------------------------------------------------------- shared words


def test_the_words_that_the_losses_share_are_named() -> None:
    made = learned()
    for i in range(270):
        made.ask("code", True, True, text=f"Who wrote book {i}?")
    made.ask("code", True, True, 12, text="Name the capital of country")
    made.ask("code", True, False, 10, text="Name the capital of country")
    made.ask("code", True, False, 2, text="Who wrote it?")
    code = of(made.judge(), "code")
    assert code.lost is not None
    first = code.lost.shared[0]
    assert (first.words, first.before, first.losses) == ("the capital of country", 22, 10)
    expected = stats.hypergeom.sf(9, 294, 22, 12)
    assert first.p == pytest.approx(expected, rel=1e-6)
    assert first.p_adjusted == pytest.approx(expected * code.lost.num_sequences, rel=1e-6)
    said = said_of_losses(code)[0]
    assert said.startswith(
        "of 12 losses in code, 10 have “the capital of country” (10 of 22 probes that have it"
    )


def test_what_two_losses_share_by_chance_is_said_to_be() -> None:
    made = learned()
    words = ["red", "blue", "green", "grey", "pink"]
    for i in range(300):
        made.ask("code", True, i % 60 != 0, text=f"Say {words[i // 60]} {words[i % 5]}")
    code = of(made.judge(), "code")
    assert code.lost is not None
    assert all(w.p_adjusted > 0.05 for w in code.lost.shared)


@pytest.mark.parametrize("seed", range(3))
def test_words_of_random_losses_are_seldom_told_as_more_than_chance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocabulary = [f"w{i}" for i in range(40)]
    false = 0
    for _ in range(60):
        lost = set(rng.choice(200, 12, replace=False).tolist())
        scenarios = [
            Scenario(" ".join(rng.choice(vocabulary, 6)), frozenset(), True, -1 if i in lost else 0)
            for i in range(200)
        ]
        found = describe(scenarios, 0.025)
        assert found is not None
        false += any(w.p_adjusted <= 0.05 for w in found.shared)
    assert false <= 6  # 3 are expected at most


def test_sequences_are_words_in_any_case() -> None:
    assert word_sequences("What's the CAPITAL?") == {
        "what's",
        "the",
        "capital",
        "what's the",
        "the capital",
        "what's the capital",
    }


# ---------------------------------------------------------------------------------------- the certificate

kinds = st.tuples(
    st.sampled_from(["listening", "code", "small"]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 40),
    st.booleans(),
    st.lists(st.sampled_from(["a", "b", "c"]), max_size=2, unique=True),
    st.sampled_from([None, "shared", "other"]),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(kinds, min_size=1, max_size=8), st.integers(0, 2))
def test_whatever_is_pinned_and_tagged_the_certificate_says_one_thing(found: list[Any], retries: int) -> None:
    made = learned()
    for name, before, after, num, pin, tags, seed in found:
        made.ask(name, before, after, num, pin=pin, tags=tags, seed=seed)
    gate = GateSettings(min_guard_probes=10, guard_margin=0.3)
    evidence = made.judge(gate, retries)  # it verifies a round trip
    for c in evidence.comparisons:
        lost_pin = c.pinned_losses > 0
        harmed_tag = c.lost is not None and any(t.harmed for t in c.lost.tags)
        assert (c.decision == "pin_lost") == (lost_pin and not c.harmed)
        assert (c.decision == "tag_harmed") == (harmed_tag and not lost_pin and not c.harmed)
        if lost_pin or harmed_tag:
            assert evidence.verdict == "undone"
        assert (f"pinned {'probe' if c.pinned == 1 else 'probes'} of {c.name} lost" in evidence.sentence) == (
            lost_pin
        )
        if c.lost is not None:
            for tag in c.lost.tags:
                assert (f"losses of {c.name} {tag.losses} are tagged {tag.tag}," in evidence.sentence) == (
                    tag.harmed
                )


@pytest.mark.parametrize(
    "change",
    [
        {"pinned_losses": 0, "decision": "held", "passed": True},
        {"pinned": 400},
        {"lost": None},
        {"lost": {"before": 300, "gains": 0, "losses": 3}},
    ],
)
def test_a_certificate_whose_pins_or_tags_were_changed_is_refused(change: dict[str, Any]) -> None:
    evidence = critical(tags=["refund"], pin=True).judge()
    raw = evidence.model_dump(mode="json")
    raw["comparisons"][1].update(change)
    with pytest.raises(BadRecord):
        verify(Evidence.model_validate(raw))


def test_a_tag_that_claims_more_losses_than_probes_is_refused() -> None:
    raw = critical(tags=["refund"]).judge().model_dump(mode="json")
    raw["comparisons"][1]["lost"]["tags"][0]["losses"] = 9
    with pytest.raises(BadRecord, match="tags or words contradict"):
        verify(Evidence.model_validate(raw))


@pytest.mark.parametrize(
    ("margins", "found"),
    [
        ({"cod": 0.1}, "`gate.guard_margin` names `cod`; the guards are: code"),
        ({"code": 1.5}, "less than 1"),
        (0, "greater than 0"),
        ({"listening": 0.1}, "names `listening`; the guards are: code"),
    ],
)
def test_a_margin_that_no_guard_can_have_is_refused(margins: Any, found: str) -> None:
    body = {
        "corrections": [{"prompt": "Hi", "chosen": "Ho"}],
        "probes": [{"prompt": "x", "behaviour": b, "check": {"matches": "y"}} for b in ("code", "listening")],
        "lesson": {"behaviour": "listening"},
        "gate": {"guard_margin": margins},
    }
    with pytest.raises(ValidationError, match=found):
        TrainRequest.model_validate(body)
