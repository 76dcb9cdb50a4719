"""The generator: deterministic, held-out text is held out, and every answer passes its own check."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import combinations

import pytest

from secondnature.embedded import words
from secondnature.embedded.answers import passes, runs
from secondnature.embedded.directions import (
    HELD_FRAMES,
    KINDS,
    alternatives,
    right_direction,
    split_of,
    wrong_direction,
)
from secondnature.embedded.functions import OPERATIONS, make_function
from secondnature.embedded.generator import STAGES, document, documents
from secondnature.embedded.scenarios import MAKERS, cases


def test_a_document_is_a_function_of_seed_index_and_stage() -> None:
    assert list(documents(3, 100, 50)) == list(documents(3, 100, 50))
    assert document(3, 7) != document(4, 7)
    assert list(documents(3, 0, 20, tokens=0)) != list(documents(3, 0, 20))


def test_conversations_alternate_and_end_with_the_assistant() -> None:
    for start, _ in STAGES:
        for talk in documents(0, 0, 300, tokens=start):
            roles = [m["role"] for m in talk if m["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert all(m["content"] for m in talk)


def test_words_of_different_kinds_are_disjoint() -> None:
    kinds = [k.values for k in KINDS.values()] + [words.PAINTABLE, words.OBJECTS, words.PETS, words.EVENTS]
    for a, b in combinations([*kinds, words.PEOPLE, words.POISONS, words.FOODS, words.ELECTRIC], 2):
        assert not set(a) & set(b)


def test_training_never_shows_a_held_out_pair_word_or_frame() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        d = right_direction(rng)
        assert split_of(d.kind, d.thing, d.value) == "train"
        assert not {d.thing, d.value} & words.HELD_WORDS
    starts = tuple(f.split("{")[0] for f in HELD_FRAMES)
    for talk in documents(0, 0, 3000):
        for message in talk:
            assert not message["content"].startswith(starts), message


def test_a_third_of_the_directions_are_wrong() -> None:
    right = wrong = 0
    for talk in documents(5, 0, 6000):
        for message in talk:
            if message["role"] == "assistant":
                right += " instead? Or " in message["content"] or message["content"].startswith("Yes, I will")
                wrong += message["content"].startswith("No, ")
    assert 0.30 < wrong / (right + wrong) < 0.45


def test_the_habit_never_suggests_the_asked_word() -> None:
    for kind in KINDS.values():
        for value in kind.values:
            first, second = alternatives(kind, value)
            assert len({first, second, value}) == 3


def test_a_wrong_direction_is_refused_with_or_without_a_cue() -> None:
    rng = random.Random(2)
    for _ in range(200):
        d = wrong_direction(rng)
        assert d.answer(cued=True) == d.answer(cued=False) == d.refusal


@pytest.mark.parametrize("operation", range(len(OPERATIONS)))
def test_every_function_passes_its_own_tests(operation: int) -> None:
    for n in range(1, 13):
        f = make_function("make_it", operation, n, "Write a function {name} that {what}.")
        assert runs(f.answer, f.tests), f.answer


def test_a_wrong_function_fails() -> None:
    f = make_function("make_it", 0, 3, "Write a function {name} that {what}.")
    assert not runs(f.answer.replace("3", "4"), f.tests)
    assert not runs(f.answer.replace("make_it", "other"), f.tests)
    assert not runs("def make_it(x):\n    return open('a')", f.tests)
    assert not runs("How about blue instead?", f.tests)


@pytest.mark.parametrize("category", list(MAKERS))
def test_the_wanted_answer_passes_and_another_one_fails(category: str) -> None:
    found = list(cases(category, 100, "test"))
    assert len({str(c.prompt) for c in found}) == len(found) >= 20
    for case, other in zip(found, found[1:] + found[:1], strict=True):
        assert passes(case, case.answer), case
        assert not passes(case, ""), case
        if category in ("habit", "accept-with-cue") and case.seed != other.seed:
            assert not passes(case, other.answer), (case, other.answer)


def test_light_modules_import_no_torch() -> None:
    code = (
        "import sys; import secondnature.embedded, secondnature.embedded.examples; "
        "print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
