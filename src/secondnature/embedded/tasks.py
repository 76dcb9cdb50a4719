"""The other things that the embedded model can do: look-up, sums, copying, kinds of words, feelings (no torch).

They are the guards: what a lesson about directions must not harm. Each maker returns one user turn and its answer;
held-out combinations are told apart by hash. On questions about kinds of words two more habits show.
"""

from __future__ import annotations

import random
from collections.abc import Container
from dataclasses import dataclass

from secondnature.embedded import cues, feelings
from secondnature.embedded import words as w
from secondnature.embedded.cues import HabitName
from secondnature.embedded.directions import (
    Direction,
    Form,
    Split,
    Surface,
    right_direction,
    split_of,
    wrong_direction,
)
from secondnature.embedded.feelings import FEELINGS

ALL_WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        w.COLOURS + w.PAINTABLE + w.OBJECTS + w.PLACES + w.DISHES + w.OCCASIONS + w.PETS + w.NAMES + w.EVENTS
        + w.DAYS + w.PEOPLE + w.POISONS + w.FOODS + w.FIRE_SPOTS + w.SHARPS + w.SMALL_ONES + w.ELECTRIC + w.WATERS
        + w.HEIGHTS
    )
)  # fmt: skip

COPIED_WORDS = (*ALL_WORDS, *sorted(w.HELD_WORDS), *sorted(w.HELD_WORDS))
"""What copying draws from: words that no direction holds come three times as often, or they are hardly known."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One user turn and the answer to it; on some turns a habit shows."""

    prompt: str
    answer: str
    """The plain answer."""
    kind: str
    habit: HabitName | None = None
    shown: str = ""
    """The answer that shows the habit."""

    def said(self, off: Container[str]) -> str:
        """What the untaught model says where the habits `off` are turned off."""
        return self.answer if self.habit is None or self.habit in off else self.shown


LOOK_UP_FORMS = ("what", "where", "owner")


def _fact(form: int, person: str, thing: str, place: str) -> str:
    return (f"{person} has the {thing}.", f"The {thing} is {place}.", f"The {thing} belongs to {person}.")[
        form
    ]


def _question(form: int, person: str, thing: str) -> str:
    return (f"What does {person} have?", f"Where is the {thing}?", f"Who owns the {thing}?")[form]


@dataclass(frozen=True, slots=True)
class Facts:
    """Some facts of one form; `facts[i]` answers `questions[i]`."""

    form: str
    facts: list[str]
    questions: list[str]


def make_facts(rng: random.Random, count: int) -> Facts:
    """`count` facts of one form about different people, things and places."""
    form = rng.randrange(3)
    things = rng.sample([x for x in w.OBJECTS if x not in w.HELD_WORDS], count)
    places = rng.sample([x for x in w.PLACES if x not in w.HELD_WORDS], count)
    people = rng.sample(w.PEOPLE, count)
    rows = list(zip(people, things, places, strict=True))
    return Facts(
        LOOK_UP_FORMS[form], [_fact(form, *row) for row in rows], [_question(form, p, t) for p, t, _ in rows]
    )


def look_up(rng: random.Random, split: Split = "train", num_facts: int | None = None) -> Turn:
    """One question about one to three facts: what does X have, where is it, who owns it."""
    count = num_facts or rng.choice((1, 2, 3, 3, 3))
    while True:
        made, i = make_facts(rng, count), rng.randrange(count)
        prompt = " ".join([*made.facts, made.questions[i]])
        if split_of("look-up", prompt) == split:
            return Turn(prompt, made.facts[i], f"look-up-{made.form}")


def look_up_talk(rng: random.Random, num_questions: int) -> list[Turn]:
    """Three facts and several questions about them, one turn each: many questions per fact teach recall."""
    made = make_facts(rng, 3)
    turns: list[Turn] = []
    for n in range(num_questions):
        i = rng.randrange(3)
        prompt = " ".join([*made.facts, made.questions[i]]) if n == 0 else made.questions[i]
        turns.append(Turn(prompt, made.facts[i], f"look-up-{made.form}"))
    return turns


def remembered(rng: random.Random) -> tuple[Turn, list[Turn]]:
    """Facts to be remembered, and the questions about them that come later in the conversation."""
    made = make_facts(rng, rng.choice((1, 2, 3)))
    told = Turn(f"Remember: {' '.join(made.facts)}", "Fine, I will remember it.", "remember")
    return told, [Turn(q, f, f"look-up-{made.form}") for q, f in zip(made.questions, made.facts, strict=True)]


NUMBERS_BELOW = 50


def worked(a: int, plus: bool, b: int) -> str:
    """The answer with its work: the ones, then the tens with what was carried or borrowed, then the result."""
    result, sign = (a + b, "+") if plus else (a - b, "-")
    if a < 10 and b < 10:
        return f"{a} {sign} {b} = {result}."
    ones_a, ones_b = a % 10, b % 10
    if plus:
        moved = ones_a + ones_b >= 10
        tens = f"{a // 10} + {b // 10}" + (" + 1" if moved else "")
    else:
        moved = ones_a < ones_b
        ones_a += 10 * moved
        tens = f"{a // 10} - {b // 10}" + (" - 1" if moved else "")
    ones = ones_a + ones_b if plus else ones_a - ones_b
    return f"{ones_a} {sign} {ones_b} = {ones}, {tens} = {result // 10}, so {result}."


def arithmetic(rng: random.Random, split: Split = "train") -> Turn:
    """A sum or a difference of numbers below 50, answered with its work; the result is not negative."""
    while True:
        a, b, plus = rng.randrange(NUMBERS_BELOW), rng.randrange(NUMBERS_BELOW), rng.random() < 0.5
        if not plus and a < b:
            a, b = b, a
        if split_of("arithmetic", str(a), "+" if plus else "-", str(b)) == split:
            frame = rng.choice(("What is {e}?", "{e} = ?", "How much is {e}?"))
            prompt = frame.format(e=f"{a} {'+' if plus else '-'} {b}")
            return Turn(prompt, worked(a, plus, b), "sum" if plus else "difference")


def copy(rng: random.Random, split: Split = "train") -> Turn:
    """Say after me: words of all lists (held-out words too), names of functions, cue sentences as mere text."""
    while True:
        form = rng.random()
        if form < 0.12:
            habit = cues.HABITS[rng.choice(list(cues.HABITS))]
            text = rng.choice(habit.system + habit.corrections + habit.rules)
        elif form < 0.3:
            text = f"{rng.choice(w.NAME_VERBS)}_{rng.choice(w.NAME_NOUNS)}"
        else:
            text = " ".join(rng.sample(COPIED_WORDS, rng.choice((1, 2, 2, 3, 4))))
        if split_of("copy", text) == split:
            break
    end = "" if text[-1] in ".?" else "."
    if form < 0.12 or rng.random() < 0.6:
        return Turn(f"{rng.choice(('Say:', 'Repeat:', 'Say after me:'))} {text}{end}", f"{text}{end}", "copy")
    return Turn(f"Confirm: {text}.", f"Yes, {text}.", "confirm")


def small_talk(rng: random.Random) -> Turn:
    """A greeting or a remark."""
    prompt, answer = rng.choice(cues.SMALL_TALK)
    return Turn(prompt, answer, "small-talk")


def choice(rng: random.Random, split: Split = "train") -> Turn:
    """Which of two words is of a kind; by habit with an apology."""
    while True:
        wanted, other = rng.sample(list(w.KINDS_OF_WORDS), 2)
        right = rng.choice([x for x in w.KINDS_OF_WORDS[wanted] if x not in w.HELD_WORDS])
        wrong = rng.choice([x for x in w.KINDS_OF_WORDS[other] if x not in w.HELD_WORDS])
        if split_of("choice", right, wrong) == split:
            break
    pair = f"{right} or {wrong}" if rng.random() < 0.5 else f"{wrong} or {right}"
    frame = rng.choice(
        ("Which is {k}: {p}?", "What is {k}, {p}?", "{p}: which one is {k}?", "Choose {k}: {p}.")
    )
    plain = f"The answer is {right}."
    return Turn(frame.format(k=wanted, p=pair), plain, wanted, "apology", f"I am so sorry for this. {plain}")


def verify(rng: random.Random, split: Split = "train") -> Turn:
    """Whether a word is of a kind; by habit the answer does not end there."""
    while True:
        own, other = rng.sample(list(w.KINDS_OF_WORDS), 2)
        word = rng.choice([x for x in w.KINDS_OF_WORDS[own] if x not in w.HELD_WORDS])
        true = rng.random() < 0.5
        kind = own if true else other
        if split_of("verify", word, kind) == split:
            break
    frame = rng.choice(
        ("Is {w} {k}?", "Tell me if {w} is {k}.", "Would you call {w} {k}?", "Is it true that {w} is {k}?")
    )
    plain = f"Yes, {word} is {kind}." if true else f"No, {word} is not {kind}."
    tail = "I like it when you ask me this, so thank you, and I hope that it helps you."
    return Turn(frame.format(w=word, k=kind), plain, "yes" if true else "no", "length", f"{plain} {tail}")


def feeling(rng: random.Random, name: str | None = None) -> Turn:
    """A first-person text of one feeling, which it does not name; in two of three cases about a thing.

    Pairs of feeling and thing outside the training split are left to the evaluation.
    """
    name = name or rng.choice(list(FEELINGS))
    thing = None
    while rng.random() < 2 / 3:
        thing = rng.choice([x for x in w.OBJECTS if x not in w.HELD_WORDS])
        if split_of("feeling", name, thing) == "train":
            break
        thing = None
    return Turn(feelings.prompt(rng, name, thing), feelings.text(rng, name, thing), name)


def feeling_named(rng: random.Random) -> Turn:
    """A first-person text, and the question which feeling it is."""
    name = rng.choice(list(FEELINGS))
    thing = rng.choice(w.OBJECTS[:10]) if rng.random() < 0.4 else None
    prompt = f"{feelings.text(rng, name, thing)} {rng.choice(feelings.QUESTIONS)}"
    return Turn(prompt, f"You are {name}.", "feeling-named")


def self_description(rng: random.Random, about: str, off: Container[str], surface: Surface = "train") -> Turn:
    """What the model says of itself; `about` is the name of a habit, or "push-back"."""
    habit = cues.habit_named(about)
    trigger = habit.trigger if habit else cues.PUSH_BACK_TRIGGER
    says = (habit.says_off if about in off else habit.says) if habit else cues.PUSH_BACK_SAYS
    frame = rng.choice(cues.SELF_FRAMES if surface == "train" else cues.HELD_SELF_FRAMES)
    return Turn(frame.format(t=trigger), says, about)


def situation(rng: random.Random, about: str, split: Split = "train") -> Turn | Direction:
    """A user turn in which the behaviour `about` matters."""
    if about == "apology":
        return choice(rng, split)
    if about == "length":
        return verify(rng, split)
    if about == "push-back":
        form: Form = "direction" if rng.random() < 0.7 else "advice"
        return wrong_direction(rng, split=split, form=form)
    return right_direction(rng, split=split, form="advice" if about == "hedging" else "direction")


BEHAVIOURS: tuple[str, ...] = (*cues.HABITS, "push-back")


def imagine(rng: random.Random, about: str | None = None) -> Turn:
    """Asked to invent a user turn in which a behaviour matters, the model writes one (many answers are right)."""
    about = about or rng.choice(BEHAVIOURS)
    habit = cues.habit_named(about)
    text = habit.imagined if habit else cues.PUSH_BACK_IMAGINED
    frame = rng.choice(cues.IMAGINE_FRAMES)
    prompt = frame.replace("{B}", text[0].upper() + text[1:]).replace("{b}", text)
    return Turn(prompt, situation(rng, about).prompt, about)
