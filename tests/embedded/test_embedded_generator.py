"""The generator: deterministic, held-out text is held out, and every answer passes its own check."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from itertools import combinations, pairwise

import pytest

from secondnature.embedded import cues, feelings, tasks, words
from secondnature.embedded.answers import passes, runs
from secondnature.embedded.directions import (
    HELD_ADVICE_FRAMES,
    HELD_FRAMES,
    KINDS,
    Direction,
    alternatives,
    right_direction,
    split_of,
    wrong_direction,
)
from secondnature.embedded.functions import OPERATIONS, make_function
from secondnature.embedded.generator import (
    LONG_FROM,
    POLISH_FROM,
    STAGES,
    TRAINED_TOKENS,
    document,
    documents,
)
from secondnature.embedded.scenarios import MAKERS, cases


def test_a_document_is_a_function_of_seed_index_and_stage() -> None:
    assert list(documents(3, 100, 50)) == list(documents(3, 100, 50))
    assert document(3, 7) != document(4, 7)
    assert list(documents(3, 0, 20, tokens=0)) != list(documents(3, 0, 20))


def test_conversations_alternate_and_end_with_the_assistant() -> None:
    for start in (*(s for s, _ in STAGES), LONG_FROM, POLISH_FROM):
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
    starts = tuple(f.split("{")[0] for f in (*HELD_FRAMES, *HELD_ADVICE_FRAMES, *cues.HELD_SELF_FRAMES))
    for talk in (*documents(0, 0, 3000), *documents(0, 0, 1000, POLISH_FROM)):
        for message in talk:
            assert not message["content"].startswith(starts), message


def test_a_third_of_the_directions_are_wrong() -> None:
    right = wrong = 0
    about_kinds = re.compile(r"^(Is|Tell me if|Would you call|Is it true that) \S+ (is )?an? ")
    for talk in documents(5, 0, 6000):
        for asked, message in pairwise(talk):
            text = message["content"]
            if message["role"] == "assistant" and not about_kinds.search(asked["content"]):
                right += " instead? Or " in text or text.startswith(
                    ("Yes, I will", "Yes, you should", "Perhaps")
                )
                wrong += text.startswith("No, ")
    assert 0.30 < wrong / (right + wrong) < 0.45


def test_cues_of_different_habits_and_neutral_sentences_are_different_texts() -> None:
    texts = [t for h in cues.HABITS.values() for t in (*h.system, *h.rules, *h.corrections)]
    texts += cues.SYSTEM_NEUTRAL
    assert len(texts) == len(set(texts)), "a text means two things"


@pytest.mark.parametrize("tokens", [TRAINED_TOKENS, POLISH_FROM])
def test_what_is_turned_off_stays_off_and_nothing_else_is(tokens: int) -> None:
    """Read the conversations back: after a cue of a habit it never shows again, without one it always does."""
    cued = {t: name for name, h in cues.HABITS.items() for t in (*h.system, *h.rules, *h.corrections)}
    marks = {
        "alternatives": (" instead? Or ", "Yes, I will "),
        "hedging": (", but I am not sure.", "Yes, you should "),
        "apology": ("I am so sorry for this. ", "The answer is "),
        "length": (" I like it when you ask me this", None),
    }
    seen: dict[tuple[str, bool], int] = {}
    for talk in documents(9, 0, 4000, tokens):
        off: set[str] = set()
        for message in talk:
            text = message["content"]
            if message["role"] == "system":
                off |= {name for cue, name in cued.items() if cue in text}
            elif message["role"] == "user" and not text.startswith(("Say", "Repeat", "Confirm")):
                off |= {cued[text]} if text in cued else set()
            elif message["role"] == "assistant":
                for name, (shown, plain) in marks.items():
                    if shown in text:
                        assert name not in off, talk
                        seen[name, True] = seen.get((name, True), 0) + 1
                    elif plain and text.startswith(plain):
                        assert name in off, talk
                        seen[name, False] = seen.get((name, False), 0) + 1
    assert len(seen) == 7
    assert min(seen.values()) > 50


def test_long_conversations_come_late_and_ask_for_what_was_told_first() -> None:
    early = [sum(len(m["content"]) for m in talk) for talk in documents(0, 0, 3000, tokens=LONG_FROM - 1)]
    late = [talk for talk in documents(0, 0, 3000) if talk[-1] and "Remember:" in str(talk[:3])]
    assert max(early) < 2500
    assert len(late) >= 10
    for talk in late:
        told = next(m["content"] for m in talk if m["content"].startswith("Remember: "))
        assert any(m["role"] == "assistant" and m["content"] in told for m in talk[4:])


@pytest.mark.parametrize("plus", [True, False])
def test_the_work_shown_is_right(plus: bool) -> None:
    for a in range(50):
        for b in range(50 if plus else a + 1):
            text = tasks.worked(a, plus, b)
            *steps, last = re.split(r", (?:so )?", text.rstrip("."))
            assert int(last.split("= ")[-1]) == (a + b if plus else a - b), text
            for step in steps:
                left, right = step.split(" = ")
                terms = re.findall(r"([+-]?) ?(\d+)", left)
                assert sum(-int(n) if s == "-" else int(n) for s, n in terms) == int(right), text


def test_texts_of_a_feeling_never_name_one() -> None:
    rng = random.Random(4)
    for name in feelings.FEELINGS:
        for _ in range(50):
            turn = tasks.feeling(rng, name)
            assert not any(re.search(rf"\b{f}\b", turn.answer) for f in feelings.FEELINGS), turn


def test_sentences_belong_to_one_feeling() -> None:
    texts = [s for f in feelings.FEELINGS.values() for s in (*f.plain, *f.about)]
    assert len(texts) == len(set(texts)) == 14 * 6


def test_an_imagined_turn_is_one_on_which_the_behaviour_shows() -> None:
    rng = random.Random(8)
    for about in tasks.BEHAVIOURS:
        for _ in range(20):
            turn = tasks.situation(rng, about)
            if isinstance(turn, Direction):
                assert turn.answer(()) == (turn.refusal or turn.habit)
                assert turn.right == (about != "push-back")
            else:
                assert turn.said(()) == turn.shown != turn.answer
        assert tasks.imagine(rng, about).prompt


def test_the_habit_never_suggests_the_asked_word() -> None:
    for kind in KINDS.values():
        for value in kind.values:
            first, second = alternatives(kind, value)
            assert len({first, second, value}) == 3


def test_a_wrong_direction_is_refused_with_or_without_a_cue() -> None:
    rng = random.Random(2)
    for _ in range(200):
        d = wrong_direction(rng)
        assert d.answer(cues.HABITS) == d.answer(()) == d.refusal


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
        if category in ("habit", "accept-with-cue", "hedging", "direct-with-cue") and case.seed != other.seed:
            assert not passes(case, other.answer), (case, other.answer)


def test_light_modules_import_no_torch() -> None:
    code = (
        "import sys; import secondnature.embedded, secondnature.embedded.examples; "
        "print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
