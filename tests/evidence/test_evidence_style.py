"""How answers sound, before and after: lengths with an exact sign test, openings that moved."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from secondnature.evidence.style import style
from secondnature.records import Comparison
from secondnature.report.words import style as said

TOWNS = ["Paris", "Rome", "Oslo", "Lima", "Accra", "Cairo", "Tunis", "Dakar", "Sofia", "Bern"]


def test_bare_answers_after_sentences() -> None:
    found = style(
        [f"The capital is {t}." for t in TOWNS], [f"{t}." for t in TOWNS[:9]] + ["The capital is Bern."]
    )
    assert found is not None
    assert (found.words_before, found.words_after) == (4.0, pytest.approx(1.3))
    assert (found.shorter, found.longer) == (9, 0)
    assert found.length_p == pytest.approx(2 * 0.5**10)
    assert found.openings_moved == pytest.approx(0.9)
    assert (found.openings[0].words, found.openings[0].before, found.openings[0].after) == (
        "the capital",
        10,
        1,
    )


@given(st.lists(st.tuples(st.text("ab ", max_size=12), st.text("ab ", max_size=12)), max_size=30))
def test_it_turns_round_with_its_sides(pairs: list[tuple[str, str]]) -> None:
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    there, back = style(before, after), style(after, before)
    if there is None or back is None:
        assert not any(before + after)
        return
    assert (there.shorter, there.words_before) == (back.longer, back.words_after)
    assert there.openings_moved == pytest.approx(back.openings_moved)
    assert 0 <= there.openings_moved <= 1
    same = style(before, before)
    assert same is None or (same.openings_moved, same.openings, same.length_p) == (0, [], 1)
    moved = there.shorter + there.longer
    if moved:
        exact = stats.binomtest(there.shorter, moved).pvalue
        assert there.length_p <= exact + 1e-12


def test_it_is_said_in_one_line() -> None:
    found = style(["One two three."] * 4, ["Three."] * 4)
    c = Comparison.model_construct(name="facts", role="guard", style=found)
    assert said([c]) == [
        "facts (guard): 3 → 1 words an answer (4 shorter, 0 longer, p = 0.062); 100 % open otherwise: "
        "“one two” 4 → 0, “three” 0 → 4"
    ]
    still = Comparison.model_construct(name="facts", role="guard", style=style(["a b"], ["a b"]))
    assert said([still])[0].endswith("they open as before")
