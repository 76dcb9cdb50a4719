"""Whether a correction's own prompt is answered as wanted: more than equality, and no more than it says."""

from __future__ import annotations

import pytest

from secondnature.evidence.taught import as_wanted

SORRY = "I'm sorry for any confusion. I'm here to assist you with any questions or problems you're facing."


@pytest.mark.parametrize(
    ("asked", "wanted", "answer", "before", "expected"),
    [
        ("Take the bus.", "Will do: the bus.", " Will do: the bus.\n", SORRY, True),
        ("Take the bus.", "Will do: the bus.", "Will do.", SORRY, True),
        ("Take the blue bus today.", "Will do: the blue bus.", "The blue bus.", SORRY, False),
        ("Take the bus.", "Will do: the bus.", SORRY, SORRY, False),
        (
            "What is a glacier?",
            "A glacier is a large mass of ice that moves slowly over land.",
            "A glacier is a large mass of ice and snow.",
            "A glacier is a massive ice sheet that covers an enormous area, often found in polar regions. It is",
            True,
        ),
        ("Who wrote it?", "The author is Mann.", "The author is Hesse.", "Hesse wrote it in 1922.", True),
    ],
    ids=["exact", "short", "echo", "unchanged", "in other words", "a form with another name"],
)
def test_what_an_answer_adds_to_its_question_is_compared(
    asked: str, wanted: str, answer: str, before: str, expected: bool
) -> None:
    """The last one is what the measure cannot see: most words are the wanted ones, the one that counts is not."""
    assert as_wanted(asked, wanted, answer, before) is expected


def test_an_answer_that_was_near_the_wanted_one_and_stays_so_is_not_learned() -> None:
    asked, wanted, before = "Turkey?", "The capital is Ankara.", "The capital is Izmir."
    assert not as_wanted(asked, wanted, before, before)
    assert not as_wanted(asked, wanted, "The capital is Istanbul.", before)
    assert as_wanted(asked, wanted, "The capital is called Ankara.", before)


def test_a_wanted_answer_that_adds_nothing_is_compared_by_all_its_words() -> None:
    assert as_wanted("Say: tea or ink.", "Tea.", "Tea!", "I will not.")
    assert not as_wanted("Say: tea or ink.", "Tea.", "Ink.", "I will not.")
    assert not as_wanted("Say tea.", "", "tea", "tea")
