"""The lint finds what it looks for, names the lines, and stays silent about good files."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secondnature.evidence.lint import NEAR, SHINGLE_WORDS, _Near, lint, lint_form
from secondnature.records import Correction, Probe

CAPITALS = {"Turkey": "Ankara", "Kenya": "Nairobi", "Peru": "Lima", "Norway": "Oslo", "Ghana": "Accra"}


def correction(prompt: str, chosen: str, **fields: Any) -> Correction:
    return Correction.model_validate({"prompt": prompt, "chosen": chosen, **fields})


def probe(prompt: str) -> Probe:
    return Probe.model_validate({"prompt": prompt, "behaviour": "x", "check": {"matches": "y"}})


def kinds(*corrections: Correction, probes: list[Probe] | None = None) -> list[str]:
    return [f.kind for f in lint(corrections, probes or [])]


def full() -> list[Correction]:
    forms = [
        "The capital of {} is {}.",
        "{} is governed from {}.",
        "In {}, it is {}.",
        "It's {1}, in {0}.",
        "{1} is.",
    ]
    return [
        correction(f"What is the capital of {c}?", form.format(c, t))
        for (c, t), form in zip(CAPITALS.items(), forms, strict=True)
    ]


def test_a_good_file_is_passed_in_silence() -> None:
    assert (
        lint(full(), [probe("Who governs from Paris?"), probe("Which town is the largest of Spain?")]) == []
    )


def test_bare_answers_are_named_with_their_lines() -> None:
    found = lint([correction(f"What is the capital of {c}?", f"{t}.") for c, t in CAPITALS.items()])
    assert [f.kind for f in found] == ["bare answers"]
    assert str(found[0]).startswith(
        "bare answers (lines 1, 2, 3, 4, 5): 5 of 5 wanted answers have 3 words or fewer; bare answers teach"
    )


def test_beside_what_the_model_said_its_form_decides() -> None:
    said = "I think that the capital of that country is the town of Constantinople."
    bare = [correction(f"Capital of {c}?", f"{t}.", said=said, rating=-1) for c, t in CAPITALS.items()]
    found = lint(bare)
    assert [f.kind for f in found] == ["length skew", "answer form"]
    assert "have 1 words, the model's own 13 (medians)" in found[1].found
    alike = [correction(f"Capital of {c}?", f"{t}.", said="Paris.") for c, t in CAPITALS.items()]
    assert kinds(*alike) == []
    assert lint_form(["Yes."] * 2, [said] * 2, "") == []  # two answers have no form


def test_contradictions_and_repetitions() -> None:
    found = lint(
        [
            *full(),
            correction("What is the capital of  turkey", "Istanbul, people say."),
            correction("What is the capital of Peru?", full()[2].chosen[0].content),  # type: ignore[index]
        ],
        lines=[2, 3, 5, 6, 7, 9, 11],
    )
    assert [f.kind for f in found] == ["contradiction", "repeated"]
    assert found[0].where == "lines 2, 9"
    assert (
        "is to be answered “The capital of Turkey is Ankara.” and “Istanbul, people say.”" in found[0].found
    )
    assert found[1].where == "lines 5, 11"


def test_near_copies_of_probes() -> None:
    taught = [
        correction("Please sort the files in my folder by their names.", "Sorting the files by name now."),
        correction("Use tabs.", "Will do."),
    ]
    probes = [
        probe("please sort the files in my folder by their NAMES"),
        probe("I ask you, please sort the files in my folder by size, and quickly, for I have to go."),
        probe("Use spaces."),
        probe("Sort my mail."),
    ]
    (found,) = lint(taught, probes, lines=[4, 5], probe_lines=[10, 11, 12, 13])
    assert (found.kind, found.where) == ("near copy", "probe lines 10, 11")
    assert "2 of 4 probes" in found.found
    assert "(the first: probe line 10, correction line 4)" in found.found


words = st.lists(st.sampled_from([f"w{i}" for i in range(12)]), min_size=1, max_size=14)


@settings(deadline=None, max_examples=200)
@given(st.lists(words, min_size=1, max_size=12), words)
def test_near_copies_are_those_of_comparing_all(texts: list[list[str]], asked: list[str]) -> None:
    def shingles(t: list[str]) -> set[tuple[str, ...]]:
        return {tuple(t[i : i + SHINGLE_WORDS]) for i in range(len(t) - SHINGLE_WORDS + 1)}

    def near(t: list[str]) -> bool:
        both = set(t) & set(asked)
        return bool(shingles(t) & shingles(asked)) or len(both) >= NEAR * len(set(t) | set(asked))

    found = _Near(texts).nearest(asked)
    assert (found is not None) == any(map(near, texts))
    assert found is None or near(texts[found])


def test_length_that_tells_the_two_answers_apart() -> None:
    long = "Of course, I will be glad to do that for you at once, and with pleasure, as I said before"
    pairs = [correction(f"Do {i}.", f"Number {i} it is", rejected=f"{long} {i}") for i in range(5)]
    (skew,) = [f for f in lint(pairs) if f.kind == "length skew"]
    assert "5 of 5 wanted answers are 3 times shorter" in skew.found
    mixed = [*pairs, *(correction(f"Say {i}.", f"{long} {i}", rejected=f"No {i}") for i in range(5))]
    assert "length skew" not in kinds(*mixed)


def test_one_answer_or_one_opening_for_all() -> None:
    one = [correction(f"Please do number {i} for me", "I will do it at once.") for i in range(4)]
    (found,) = lint(one)
    assert "4 of 4 are “I will do it at once.”" in found.found
    begun = [correction(f"Please do number {i} for me", f"Will do: number {i} for you.") for i in range(4)]
    (found,) = lint(begun)
    assert "4 of 4 wanted answers begin with “will do”" in found.found


@pytest.mark.parametrize("num", [0, 1, 2])
def test_few_corrections_have_no_form(num: int) -> None:
    assert lint([correction(f"Do it {i} times please", "Yes.") for i in range(num)]) == []


def test_ten_thousand_corrections_and_probes_are_looked_at() -> None:
    """Prompts of one template: what a comparison of all with all could not do."""
    rng = random.Random(3)
    names = [f"{rng.randrange(10**6)}" for _ in range(20_000)]
    taught = [correction(f"Please rename the file {n} to its date", f"Renaming {n}.") for n in names[:10_000]]
    probes = [probe(f"Kindly move folder {n} into the archive") for n in names[10_000:]]
    assert "near copy" not in kinds(*taught, probes=probes)
    copy = probe(f"please rename the file {names[7]}: to its date")
    (found,) = [f for f in lint(taught, [*probes, copy]) if f.kind == "near copy"]
    assert "1 of 10001 probes" in found.found


SAID = [f"The capital of {c} is Constantinople." for c in CAPITALS]


def test_the_form_of_bare_answers_beside_the_models_own_with_what_it_would_say() -> None:
    bare = [f"{t}." for t in CAPITALS.values()]
    (found,) = lint_form(bare, SAID, "5 prompts", {2: "The capital of Peru is Lima."})
    assert found.found == (
        "the wanted answers have 1 words, the model's own 6 (medians); 5 of 5 are 3 words or fewer, 5 of 5 of the "
        "model's own are not; the model begins 5 of 5 with “the capital”, and no wanted answer begins so"
    )
    assert found.hint.endswith(
        "(it says “The capital of Peru is Constantinople.”; “Lima.” would be “The capital of Peru is Lima.”)"
    )


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("The capital of {} is {}.", None),
        ("The capital of {} is {}", "5 of 5 end without a full stop, 5 of 5 of the model's own end with one"),
        ("the capital of {} is {}.", "5 of 5 begin with a small letter, 5 of 5 of the model's own do not"),
        (
            "Sure, for {} that is {}.",
            "the model begins 5 of 5 with “the capital”, and no wanted answer begins so",
        ),
    ],
)
def test_stops_capitals_and_openings_are_compared(form: str, expected: str | None) -> None:
    found = lint_form([form.format(c, t) for c, t in CAPITALS.items()], SAID, "")
    assert [f.found for f in found] == ([] if expected is None else [expected])
