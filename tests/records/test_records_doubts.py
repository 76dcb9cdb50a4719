"""What may be meant otherwise is said, and what nobody can mean is known."""

from __future__ import annotations

from typing import Any

import pytest

from secondnature.records import (
    Contradictions,
    Correction,
    doubts,
    kind_of_doubt,
    kinds_of_doubt,
    nothing_asked,
)

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
BLANK = {"role": "assistant", "content": " "}


def correction(**fields: Any) -> Correction:
    return Correction.model_validate({"prompt": "Why?", "chosen": "So.", **fields})


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({}, []),
        ({"prompt": [USER, BLANK, USER]}, ["a blank turn in the conversation"]),
        ({"prompt": [SYSTEM]}, ["nobody asks"]),
        ({"prompt": [USER, SYSTEM]}, ["the system has the last word"]),
        ({"prompt": "The sky is", "chosen": "The sky is blue."}, ["the answer begins with the prompt"]),
        ({"prompt": "Yes", "chosen": "Yes"}, []),
        ({"chosen": " So."}, ["the answer begins with a space or a line end"]),
        ({"rating": -1}, ["rated down beside a wanted answer alone"]),
        ({"rating": -1, "said": "No."}, []),
        ({"rating": -1, "rejected": "No."}, []),
    ],
)
def test_each_doubt_is_said(fields: dict[str, Any], kinds: list[str]) -> None:
    assert [kind_of_doubt(d) for d in doubts(correction(**fields))] == kinds


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("Why?", True),
        ("", False),
        (" \n", False),
        ([USER, {"role": "assistant", "content": "So."}, {"role": "user", "content": ""}], False),
        ([SYSTEM], True),
        ([SYSTEM, {"role": "user", "content": " "}], False),
    ],
)
def test_who_asks_nothing_is_known(prompt: Any, asked: bool) -> None:
    assert (nothing_asked(correction(prompt=prompt)) is None) == asked


def test_contradictions_are_found_whatever_their_order() -> None:
    one, other = correction(chosen="a", rejected="b"), correction(chosen="b", rejected="a")
    down = correction(chosen=None, said="a", rating=-1)
    elsewhere = correction(prompt="How?", chosen="b", rejected="a")
    seen = Contradictions()
    assert [seen.take(c, i) for i, c in enumerate([one, one, elsewhere, other, down])] == [
        None,
        None,
        None,
        0,
        0,
    ]
    assert kinds_of_doubt([one, elsewhere, other]) == {Contradictions.KIND: 1}
    assert Contradictions().take(correction(chosen=None, feedback="no"), 0) is None
