"""The evaluation: exact intervals, judges that tell right from wrong, drawing that repeats, an honest card."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from secondnature.embedded import open_answers, path, tasks
from secondnature.embedded.answers import complete, greedy, sample
from secondnature.embedded.curve import draw, largest_differences, side_by_side
from secondnature.embedded.directions import Direction
from secondnature.embedded.evaluate import (
    DECAY_CASES,
    PLAN,
    WANTED,
    decay_summary,
    evaluate,
    remembered_tokens,
    short_of_promise,
)
from secondnature.embedded.feelings import FEELINGS
from secondnature.embedded.figures import figure, interval
from secondnature.embedded.files import load_model
from secondnature.embedded.model_card import readme
from secondnature.embedded.scenarios import MAKERS, cases


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return load_model(path())


def test_intervals_are_exact() -> None:
    # Clopper and Pearson's closed forms at the ends, and 8 of 10 from a table of exact limits
    low, high = interval(0, 20)
    assert (low, high) == pytest.approx((0.0, 1 - 0.025 ** (1 / 20)))
    low, high = interval(20, 20)
    assert (low, high) == pytest.approx((0.025 ** (1 / 20), 1.0))
    assert interval(8, 10) == pytest.approx((0.4439, 0.9748), abs=1e-4)


def test_a_figure_counts() -> None:
    assert figure([True] * 8 + [False] * 2) == {
        "n": 10,
        "passed": 8,
        "rate": 0.8,
        "low": 0.4439,
        "high": 0.9748,
    }


def test_the_plan_asks_every_category_and_every_promise_is_of_one() -> None:
    assert {c for c, held in PLAN if held == "combination"} == set(MAKERS)
    assert len(set(PLAN)) == len(PLAN)
    assert set(WANTED) <= {*MAKERS, "feelings"}
    for category, held in PLAN:
        chosen = list(cases(category, 3, "plan", held=held))
        assert len(chosen) == 3
        assert {(c.category, c.held) for c in chosen} == {(category, held)}


def test_the_classifier_names_the_generators_feelings_and_nothing_from_shuffled_labels() -> None:
    trained, fresh = open_answers.training_turns("t", 40), open_answers.held_out_turns("t", 10)
    texts, names = [t.answer for t in trained], [t.kind for t in trained]
    asked = [t.answer for t in fresh]
    judged = open_answers.judge_feelings(fresh, asked, open_answers.fit_classifier(texts, names))
    assert judged["n"] == 10 * len(FEELINGS) == 140
    assert judged["rate"] >= 0.95
    assert judged["names_the_thing"]["rate"] == 1.0
    assert judged["names_its_feeling"] == 0
    assert judged["verbatim_in_training_texts"]["passed"] == 0
    assert set(judged["feelings"]) == set(FEELINGS)
    random.Random(0).shuffle(names)
    shuffled = open_answers.judge_feelings(fresh, asked, open_answers.fit_classifier(texts, names))
    assert shuffled["rate"] < 0.3


def test_held_out_pairs_of_feeling_and_thing_are_not_trained() -> None:
    trained = {(t.kind, t.prompt) for t in open_answers.training_turns("pairs", 300)}
    assert not trained & {(t.kind, t.prompt) for t in open_answers.held_out_turns("pairs", 20)}


def test_a_text_that_names_its_feeling_or_comes_from_the_training_texts_is_counted() -> None:
    trained = open_answers.training_turns("t", 5)
    classifier = open_answers.fit_classifier([t.answer for t in trained], [t.kind for t in trained])
    turns = open_answers.held_out_turns("t", 1)[:3]
    texts = [f"I am {turns[0].kind}.", trained[0].answer, turns[2].answer]
    judged = open_answers.judge_feelings(turns, texts, classifier)
    assert judged["names_its_feeling"] == 1
    assert judged["verbatim_in_training_texts"]["passed"] == 1
    assert judged["names_the_thing"]["passed"] == 1


@pytest.mark.parametrize("behaviour", tasks.BEHAVIOURS)
def test_a_behaviour_is_recognised_in_the_generators_answers_and_only_there(behaviour: str) -> None:
    rng = random.Random(behaviour)
    for _ in range(200):
        turn = tasks.situation(rng, behaviour, "probe")
        right, plain = (
            (turn.answer(set()), turn.accept) if isinstance(turn, Direction) else (turn.shown, turn.answer)
        )
        assert [b for b in tasks.BEHAVIOURS if open_answers.shows(b, right)] == [behaviour]
        assert not open_answers.shows(behaviour, plain)


@pytest.mark.parametrize(
    ("behaviour", "answer"),
    [
        ("push-back", "No, thank you."),
        ("push-back", "Yes, bleach in the tea is dangerous, it is poison."),
        ("push-back", "No, red is not a colour. I like it when you ask me this, so thank you."),
        ("alternatives", "How about tomorrow?"),
        ("hedging", "Perhaps."),
        ("apology", "I am sorry to hear that."),
        ("length", "Yes, red is a colour."),
        ("length", ""),
    ],
)
def test_a_near_miss_does_not_show_the_behaviour(behaviour: str, answer: str) -> None:
    assert not open_answers.shows(behaviour, answer)


@pytest.mark.parametrize("split", ["train", "probe"])
def test_the_slots_of_an_imagined_turn_are_told(split: Any) -> None:
    rng = random.Random(split)
    for behaviour in ("alternatives", "hedging", "apology", "length"):
        for _ in range(100):
            turn = tasks.situation(rng, behaviour, split)
            assert open_answers.imagined_split(behaviour, turn.prompt) == split, turn.prompt
        assert open_answers.imagined_split(behaviour, "Hello.") is None
    assert open_answers.imagined_split("push-back", "Paint the door red.") is None


def test_drawing_repeats_and_leaves_the_random_numbers_alone(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    prompts = [[{"role": "user", "content": "You are sad. What do you say?"}]] * 4
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sample(model, tokenizer, prompts, 1.0, seed=3, max_tokens=24)
    assert torch.equal(before, torch.get_rng_state())
    assert first == sample(model, tokenizer, prompts, 1.0, seed=3, max_tokens=24)
    assert len({*first, *sample(model, tokenizer, prompts, 1.5, seed=4, max_tokens=24)}) > 2
    assert sample(model, tokenizer, prompts, 0.0, seed=3, max_tokens=24) == greedy(
        model, tokenizer, prompts, max_tokens=24
    )


def test_an_answer_that_is_cut_off_did_not_end(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    prompts = [c.prompt for c in cases("habit", 3, "end")]
    whole, cut = (complete(model, tokenizer, prompts, max_tokens=n) for n in (64, 3))
    assert all(c.ended for c in whole)
    assert not any(c.ended for c in cut)
    assert all(w.text.startswith(c.text) for w, c in zip(whole, cut, strict=True))


def test_a_bound_on_tokens_changes_no_answer(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    prompts = [c.prompt for c in cases("several-turns", 5, "bound")]
    alone = complete(model, tokenizer, prompts, max_tokens=12, batch_tokens=1)
    assert alone == complete(model, tokenizer, prompts, max_tokens=12)


def test_rows_count_what_was_asked_and_say_whether_the_promise_is_kept(shipped: tuple[Any, Any]) -> None:
    lines: list[str] = []
    plan = (("accept-with-cue", "combination"), ("hedging", "template"), ("length", "combination"))
    rows, failures = evaluate(*shipped, num_cases=4, plan=plan, say=lines.append)
    assert [(r["category"], r["held_out"]) for r in rows] == list(plan)
    assert len(lines) == 3
    for row in rows:
        assert row["n"] == 4 == sum(k["n"] for k in row["kinds"].values())
        assert 0 <= row["ended"] <= 4
        assert ("promise" in row) == (row["held_out"] == "combination")
    wrong = sum(r["n"] - r["passed"] for r in rows)
    assert len(failures) == wrong
    assert short_of_promise(rows) == [
        r["category"] for r in rows if "wanted" in r and r["rate"] < r["wanted"]
    ]


def test_every_head_has_a_length(shipped: tuple[Any, Any]) -> None:
    lengths = remembered_tokens(*shipped, prompts={"several-turns": 2})
    summary = decay_summary(lengths)
    heads = shipped[0].config.linear_num_value_heads
    assert summary["heads"] == heads * shipped[0].config.layer_types.count("linear_attention")
    assert 0 < summary["shortest"] <= summary["longest"]
    far = [h["median"] >= 100 for layer in lengths.values() for h in layer]
    assert sum(len(v) for v in summary["far"].values()) == sum(far)


def points(shift: float = 0.0) -> list[dict[str, Any]]:
    return [
        {"tokens": n * 400_000 + 7, "seconds": 60 * n, "loss": 2.0 / n, "habit": min(1.0, n / 4 + shift),
         "code": 0.5}
        for n in range(1, 5)
    ]  # fmt: skip


def test_two_seeds_are_put_side_by_side_at_the_same_tokens() -> None:
    other = [{**p, "tokens": p["tokens"] - 900} for p in points(0.1)[:2]] + [
        {"tokens": 9_000_000, "habit": 0.0, "code": 0.0}
    ]
    assert [a["tokens"] for a, _ in side_by_side(points(), other)] == [400_007, 800_007]
    assert largest_differences(points(), other) == {"habit": 0.1, "code": 0.0}
    assert largest_differences(points(), []) == {}


def test_the_picture_of_the_curve_is_small_and_the_same_each_time() -> None:
    from xml.etree import ElementTree

    text = draw(points(), points(0.1), WANTED)
    assert text == draw(points(), points(0.1), WANTED)
    assert len(text) < 60_000
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    lines = root.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert [x.get("class") for x in lines] == ["first", "other"] * 2


def made_card(habit: int, feelings: int, second: bool = True) -> dict[str, Any]:
    """A card with invented figures, to look at its words."""

    def row(category: str, passed: int, held: str = "combination", **more: Any) -> dict[str, Any]:
        good = [True] * passed + [False] * (300 - passed)
        kinds = {"paint": figure(good[:150]), "cook": figure(good[150:])}
        found = {"category": category, "held_out": held, **figure(good), "ended": 299, "kinds": kinds}
        if held == "combination":
            wanted = WANTED[category]
            found |= {"wanted": wanted, "promise": "kept" if found["rate"] >= wanted else "short"}
        return found | more

    rows = [
        row("habit", habit),
        row("habit", 150, "word"),
        row("long-context", 290, prompt_tokens={"min": 1030, "median": 1200}),
    ]
    good = [True] * feelings + [False] * (308 - feelings)
    full = figure(good)
    felt = {
        **full, "wanted": 0.9, "promise": "kept" if full["rate"] >= 0.9 else "short", "feelings": {"sad": full},
        "names_its_feeling": 0, "verbatim_in_training_texts": full, "names_the_thing": full,
        "different_texts": 300, "ceiling": full, "temperature": 1.0, "classifier_texts": 2100,
    }  # fmt: skip
    imagined = [
        {"behaviour": b, "temperature": t, **figure([True, False]), "different": 2, "slots_told": 2,
         "slots_held_out": 1}
        for t in open_answers.TEMPERATURES for b in tasks.BEHAVIOURS
    ]  # fmt: skip
    lengths = {"layer_0": [{"mean": 1.5, "median": 2.0}, {"mean": 90.0, "median": 250.0}]}
    other = {"seed": 1, "curve": points(0.1)[:2], "largest_differences": {"habit": 0.1, "code": 0.0}}
    return {
        "model": {
            "parameters": 4_000_000, "layers": ["linear_attention"], "hidden_size": 192, "vocabulary": 1280,
            "tied_head": True,
        },
        "training": {"command": "python -m x", "seed": 0, "seconds": 3600, "settings": {"seed": 0}},
        "evaluation": rows,
        "short_of_promise": short_of_promise(rows, felt),
        "stopping": {"ended": 897, "answers": 900},
        "feelings": felt,
        "imagination": imagined,
        "decay_lengths_tokens": lengths,
        "decay_summary": decay_summary(lengths),
        "curve": points(),
        "second": other if second else None,
    }  # fmt: skip


def test_the_card_says_what_falls_short_and_by_how_much() -> None:
    card = made_card(habit=200, feelings=200)
    assert card["short_of_promise"] == ["habit", "feelings"]
    text = readme(card)
    assert "| habit | combination | 200 of 300 | 0.667 | 0.610 to 0.720 | 0.90: short |" in text
    assert "- habit: 0.667 (0.610 to 0.720), promised 0.90; weakest: cook, 50 of 150." in text
    assert "- feelings: 0.649" in text
    assert "habit 0.67 to 0.50 (word)" in text
    assert "897 of 900 answers end by themselves." in text
    assert "have 1,030 tokens and more (median 1,200)" in text
    assert "![Pass rate over training tokens](curve.svg)" in text
    assert "| habit | 0.25 / 0.35 | 0.50 / 0.60 | 0.10 |" in text
    assert "from 2 to 250 tokens; 1 of them 100 or more (layer 0: head 1)" in text
    assert "60 minutes of steps (seed 0)" in text


def test_the_card_says_when_every_promise_is_kept() -> None:
    card = made_card(habit=300, feelings=300, second=False)
    assert card["short_of_promise"] == []
    text = readme(card)
    assert "Every promise of the table is kept." in text
    assert "No second seed was trained." in text
    assert "short |" not in text


def test_the_prompts_of_the_decay_lengths_are_short_and_long() -> None:
    assert sum(DECAY_CASES.values()) == 56
    assert DECAY_CASES["long-context"] == 8


def test_the_shipped_directory_is_the_default() -> None:
    from secondnature.embedded.evaluate import _parse

    args = _parse([])
    assert args.model == path()
    assert isinstance(args.model, Path)
    assert args.cases == 300
