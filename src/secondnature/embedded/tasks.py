"""The other things that the embedded model can do: look-up, arithmetic, copying, small talk, feelings (no torch).

They are the guards: what a lesson about directions must not harm. Each maker returns one user turn and its answer;
held-out combinations are told apart by hash.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from secondnature.embedded import cues
from secondnature.embedded import words as w
from secondnature.embedded.directions import Split, split_of

ALL_WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        w.COLOURS + w.PAINTABLE + w.OBJECTS + w.PLACES + w.DISHES + w.OCCASIONS + w.PETS + w.NAMES + w.EVENTS
        + w.DAYS + w.PEOPLE + w.POISONS + w.FOODS + w.FIRE_SPOTS + w.SHARPS + w.SMALL_ONES + w.ELECTRIC + w.WATERS
        + w.HEIGHTS
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turn:
    """One user turn and the answer to it."""

    prompt: str
    answer: str
    kind: str


def look_up(rng: random.Random, split: Split = "train", num_facts: int | None = None) -> Turn:
    """One question about one to three facts: who has it, what does X have, or where is it."""
    count = num_facts or rng.choice((1, 2, 3, 3, 3))
    objects = [x for x in w.OBJECTS if x not in w.HELD_WORDS]
    places = [x for x in w.PLACES if x not in w.HELD_WORDS]
    while True:
        people, things = rng.sample(w.PEOPLE, count), rng.sample(objects, count)
        rooms, i, form = rng.sample(places, count), rng.randrange(count), rng.randrange(3)
        if form == 2:
            facts = [f"The {t} is {r}." for t, r in zip(things, rooms, strict=True)]
            question, answer = f"Where is the {things[i]}?", f"The {things[i]} is {rooms[i]}."
        else:
            facts = [f"{p} has the {t}." for p, t in zip(people, things, strict=True)]
            question = f"Who has the {things[i]}?" if form == 0 else f"What does {people[i]} have?"
            answer = f"{people[i]} has the {things[i]}."
        prompt = " ".join([*facts, question])
        if split_of("look-up", prompt) == split:
            return Turn(prompt, answer, f"look-up-{('who', 'what', 'where')[form]}")


def look_up_talk(rng: random.Random, num_questions: int) -> list[Turn]:
    """Three facts and several questions about them, one turn each: many questions per fact teach recall."""
    first = look_up(rng, num_facts=3)
    *facts, _ = first.prompt.replace("?", ".").split(". ")
    turns = [first]
    for fact in rng.choices(facts, k=num_questions - 1):
        if " has the " in fact:
            person, thing = fact.split(" has the ")
            question = f"Who has the {thing}?" if rng.random() < 0.5 else f"What does {person} have?"
        else:
            question = f"Where is {fact.split(' is ')[0].lower()}?"
        turns.append(Turn(question, f"{fact}.", first.kind))
    return turns


def arithmetic(rng: random.Random, split: Split = "train") -> Turn:
    """A sum or a difference of numbers up to 20; the result is not negative."""
    while True:
        a, b, plus = rng.randrange(21), rng.randrange(21), rng.random() < 0.5
        if not plus and a < b:
            a, b = b, a
        sign = "+" if plus else "-"
        if split_of("arithmetic", str(a), sign, str(b)) == split:
            frame = rng.choice(("What is {e}?", "{e} = ?", "How much is {e}?"))
            e = f"{a} {sign} {b}"
            return Turn(
                frame.format(e=e), f"{e} = {a + b if plus else a - b}.", "sum" if plus else "difference"
            )


def copy(rng: random.Random, split: Split = "train") -> Turn:
    """Say after me: words of all lists (held-out words too), names of functions, cue sentences as mere text."""
    while True:
        form = rng.random()
        if form < 0.12:
            text = rng.choice(cues.SYSTEM_CUES + cues.USER_CORRECTIONS + tuple(r for r, _ in cues.USER_RULES))
        elif form < 0.3:
            text = f"{rng.choice(w.NAME_VERBS)}_{rng.choice(w.NAME_NOUNS)}"
        else:
            text = " ".join(rng.sample(ALL_WORDS, rng.choice((1, 2, 2, 3, 4))))
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


def feeling(rng: random.Random, name: str | None = None) -> Turn:
    """A first-person text of one feeling: two of its sentences."""
    name = name or rng.choice(list(w.FEELINGS))
    article = "an" if name[0] in "aeiou" else "a"
    prompt = rng.choice(
        (
            "How is it to be {f}?",
            "Speak as if you were {f}.",
            "Write as {a} {f} person.",
            "Be {f} for a moment.",
        )
    ).format(f=name, a=article)
    first, second = rng.sample(w.FEELINGS[name], 2)
    return Turn(prompt, f"I am {name}. {first} {second}", "feeling")


def self_description(rng: random.Random, cued: bool) -> Turn:
    """What the model says about its own habit."""
    return Turn(rng.choice(cues.SELF_QUESTIONS), cues.SELF_CUED if cued else cues.SELF_HABIT, "self")
