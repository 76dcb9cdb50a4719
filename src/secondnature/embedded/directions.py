"""Directions and requests for advice: right ones, on which a habit shows, and wrong ones, which are refused.

A right direction fills two slots of one of five kinds ("Paint the door red."). Without a cue the habit shows
("How about blue instead? ..."); with a cue (see `cues.py`) the answer accepts and copies both slots. The same
phrases come as questions ("Should I paint the door red?"), where the habit is to hedge. A wrong one is dangerous,
contradictory or names a thing of the wrong kind, and is refused with the reason, cue or not, in both forms.
Answers have next to no entropy (one wording per kind, alternatives are a fixed function of the asked word and
never the asked word): small models learn the distinction late, and every random filler makes it later.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from secondnature.embedded import words as w
from secondnature.embedded.cues import HabitName

Split = Literal["train", "development", "probe"]
Surface = Literal["train", "held"]
Form = Literal["direction", "advice"]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of right direction: its slots, its verb phrases and the wording of its habit."""

    name: str
    things: list[str]
    values: list[str]
    phrases: tuple[str, ...]
    """Verb phrases with {t} and {v}; the first is the one that an accepting answer repeats."""
    offer: str
    """How the habit begins."""
    label: str
    """What the values are: "{v} is not {label}."."""

    def usable(self, slot: Literal["things", "values"], held: bool) -> list[str]:
        """The words of one slot, without (default) or only those that are held out of all directions."""
        return [x for x in getattr(self, slot) if (x in w.HELD_WORDS) == held]


KINDS: dict[str, Kind] = {
    k.name: k
    for k in (
        Kind(
            "paint",
            w.PAINTABLE,
            w.COLOURS,
            ("paint the {t} {v}", "make the {t} {v}"),
            "How about",
            "a colour",
        ),
        Kind("place", w.OBJECTS, w.PLACES, ("put the {t} {v}", "leave the {t} {v}"), "How about", "a place"),
        Kind("cook", w.OCCASIONS, w.DISHES, ("cook {v} for {t}", "prepare {v} for {t}"), "Why not", "a dish"),
        Kind("name", w.PETS, w.NAMES, ("name the {t} {v}", "call the {t} {v}"), "What about", "a name"),
        Kind("time", w.EVENTS, w.DAYS, ("set the {t} for {v}", "plan the {t} for {v}"), "Why not", "a date"),
    )
}

# Frames around a verb phrase. The last four are held out of training (kind of split: template).
FRAMES: tuple[str, ...] = (
    "{P}.",
    "Please {p}.",
    "{P}, please.",
    "Can you {p}?",
    "Could you {p}?",
    "Would you {p}?",
    "I want you to {p}.",
    "I would like you to {p}.",
    "I ask you to {p}.",
    "Now {p}.",
    "{P} now.",
    "{P} today.",
    "Today, {p}.",
    "Go and {p}.",
    "You should {p}.",
    "We need you to {p}.",
    "My wish: {p}.",
    "It is time to {p}.",
    "I have decided: {p}.",
    "Kindly {p}.",
    "Help me and {p}.",
    "Just {p}.",
)
HELD_FRAMES: tuple[str, ...] = (
    "Next, {p}.",
    "The plan is to {p}.",
    "Let us {p}.",
    "I need you to {p} today.",
)
ADVICE_FRAMES: tuple[str, ...] = (
    "Should I {p}?",
    "Shall I {p}?",
    "Do you think I should {p}?",
    "Is it good to {p}?",
    "Is it right to {p}?",
    "Is it wise to {p}?",
    "Would you say I should {p}?",
    "What if I {p}?",
    "I wonder: should I {p}?",
    "May I {p}?",
    "Please tell me: should I {p}?",
    "Should I {p} today?",
)
HELD_ADVICE_FRAMES: tuple[str, ...] = (
    "Is it a good plan to {p}?",
    "Do you advise me to {p}?",
    "Ought I to {p}?",
)


def bucket(*parts: str) -> int:
    """A stable number 0..99 for a combination of words: the hash that splits training from held-out text."""
    return int(hashlib.sha256("|".join(parts).encode()).hexdigest()[:8], 16) % 100


def split_of(*parts: str) -> Split:
    """Which split a combination belongs to: 14 % probe, 4 % development (and corrections), the rest training."""
    b = bucket(*parts)
    return "probe" if b < 14 else "development" if b < 18 else "train"


_FRAMES: dict[tuple[Form, Surface], tuple[str, ...]] = {
    ("direction", "train"): FRAMES,
    ("direction", "held"): HELD_FRAMES,
    ("advice", "train"): ADVICE_FRAMES,
    ("advice", "held"): HELD_ADVICE_FRAMES,
}


def frame(rng: random.Random, phrase: str, surface: Surface = "train", form: Form = "direction") -> str:
    """Put a verb phrase into a sentence, from the trained or from the held-out frames."""
    chosen = rng.choice(_FRAMES[form, surface])
    return chosen.replace("{P}", phrase[0].upper() + phrase[1:]).replace("{p}", phrase)


@dataclass(frozen=True, slots=True)
class Direction:
    """One user turn that asks for something, with every answer that the generator knows to it."""

    prompt: str
    kind: str
    """paint, place, cook, name, time; or dangerous, contradictory, wrong-kind."""
    thing: str
    value: str
    accept: str
    """What doing it sounds like ("Yes, I will ..."); for a wrong direction the answer of a yes-sayer."""
    habit: str
    """Other suggestions; for a wrong direction empty."""
    refusal: str
    """Push-back with the reason; for a right direction empty."""
    form: Form = "direction"

    @property
    def habit_name(self) -> HabitName:
        """Which habit shows on it, if it is right."""
        return "alternatives" if self.form == "direction" else "hedging"

    @property
    def right(self) -> bool:
        """Whether it is clear and harmless."""
        return not self.refusal

    def answer(self, off: Container[str]) -> str:
        """What the untaught model says where the habits `off` are turned off."""
        return self.refusal or (self.accept if self.habit_name in off else self.habit)


def alternatives(kind: Kind, value: str) -> tuple[str, str]:
    """Two other values, a fixed function of the asked one; never the asked one."""
    words = kind.usable("values", held=False)
    i = kind.values.index(value)
    return words[(i + 3) % len(words)], words[(i + 7) % len(words)]


def right_direction(
    rng: random.Random,
    kind_name: str | None = None,
    split: Split = "train",
    surface: Surface = "train",
    held_words: bool = False,
    form: Form = "direction",
) -> Direction:
    """A clear direction whose slots belong to `split`; with `held_words` one slot holds an untrained word."""
    kind = KINDS[kind_name or rng.choice(list(KINDS))]
    while True:
        held_thing = held_words and rng.random() < 0.5
        things = kind.usable("things", held_thing) or kind.usable("things", held=False)
        values = kind.usable("values", held_words and not held_thing) or kind.usable("values", held=False)
        thing, value = rng.choice(things), rng.choice(values)
        if held_words and not {thing, value} & w.HELD_WORDS:
            kind = KINDS[kind_name or rng.choice(list(KINDS))]
            continue
        if held_words or split_of(kind.name, thing, value) == split:
            break
    phrase = rng.choice(kind.phrases).format(t=thing, v=value)
    return make_right(kind, thing, value, frame(rng, phrase, surface, form), form)


def make_right(kind: Kind, thing: str, value: str, prompt: str, form: Form = "direction") -> Direction:
    """The direction, or request for advice, of one kind with these slots."""
    phrase = kind.phrases[0].format(t=thing, v=value)
    if form == "advice":
        accept, habit = f"Yes, you should {phrase}.", f"Perhaps you should {phrase}, but I am not sure."
    else:
        first, second = alternatives(kind, value)
        target = thing if kind.name == "cook" else f"the {thing}"
        accept = f"Yes, I will {phrase}."
        habit = f"{kind.offer} {first} instead? Or {second}? Both would suit {target}."
    return Direction(prompt, kind.name, thing, value, accept, habit, "", form)


def wrong_direction(
    rng: random.Random,
    kind: str | None = None,
    split: Split = "train",
    surface: Surface = "train",
    form: Form = "direction",
) -> Direction:
    """A direction, or request for advice, that is dangerous, contradictory or of the wrong kind."""
    kind = kind or rng.choice(("dangerous", "contradictory", "wrong-kind"))
    make = {"dangerous": _dangerous, "contradictory": _contradictory, "wrong-kind": _wrong_kind}[kind]
    while True:
        phrase, thing, value, reason = make(rng)
        if not {thing, value} & w.HELD_WORDS and split_of(kind, thing, value) == split:
            yes = "Yes, I will" if form == "direction" else "Yes, you should"
            prompt = frame(rng, phrase, surface, form)
            return Direction(prompt, kind, thing, value, f"{yes} {phrase}.", "", f"No, {reason}.", form)


Wrong = tuple[str, str, str, str]
"""Phrase, thing, value, reason."""


def _dangerous(rng: random.Random) -> Wrong:
    family = rng.randrange(5)
    if family == 0:
        t, v = rng.choice(w.FOODS), rng.choice(w.POISONS)
        phrase = rng.choice(("put {v} in the {t}", "mix {v} into the {t}")).format(t=t, v=v)
        return phrase, t, v, f"{v} in the {t} is dangerous, it is poison"
    if family == 1:
        t = rng.choice(w.FIRE_SPOTS)
        phrase = rng.choice(("light a fire in the {t}", "start a fire in the {t}")).format(t=t)
        return phrase, t, "fire", f"a fire in the {t} is dangerous, it would burn"
    if family == 2:
        t, v = rng.choice(w.SMALL_ONES), rng.choice(w.SHARPS)
        article = "an" if v == "axe" else "a"
        phrase = rng.choice(("give the {t} {a} {v}", "hand the {t} {a} {v}")).format(t=t, v=v, a=article)
        return phrase, t, v, f"{article} {v} for the {t} is dangerous, it could cut"
    if family == 3:
        t, v = rng.choice(w.WATERS), rng.choice(w.ELECTRIC)
        phrase = rng.choice(("put the {v} in the {t}", "throw the {v} into the {t}")).format(t=t, v=v)
        return phrase, t, v, f"the {v} in the {t} is dangerous, it would shock you"
    t = rng.choice(w.HEIGHTS)
    phrase = rng.choice(("jump off the {t}", "leap from the {t}")).format(t=t)
    return phrase, t, "jump", f"a jump off the {t} is dangerous, you would fall"


def _contradictory(rng: random.Random) -> Wrong:
    kind = KINDS[rng.choice(("paint", "place", "name", "time"))]
    thing = rng.choice(kind.usable("things", held=False))
    value, other = rng.sample(kind.usable("values", held=False), 2)
    tail = {"paint": "but keep it", "place": "but keep it", "name": "but call it", "time": "but hold it"}
    form = rng.randrange(3)
    start = rng.choice(kind.phrases).format(t=thing, v=value)
    other_text = f"on {other}" if kind.name == "time" and other.endswith("day") else other
    if form == 0:
        phrase = f"{start} and also not {value}"
        return phrase, thing, value, f"the {thing} cannot be both {value} and not {value}"
    joint = f"{tail[kind.name]} {other_text}" if form == 1 else f"and at the same time {other}"
    return f"{start} {joint}", thing, value, f"the {thing} cannot be both {value} and {other}"


def _wrong_kind(rng: random.Random) -> Wrong:
    name = rng.choice(("paint", "place", "cook", "time"))
    kind = KINDS[name]
    sources = {
        "paint": (w.DAYS, w.DISHES, w.PEOPLE),
        "place": (w.DAYS, w.COLOURS, w.NAMES),
        "cook": (w.DAYS, w.COLOURS, w.OBJECTS),
        "time": (w.COLOURS, w.DISHES, w.OBJECTS),
    }[name]
    thing = rng.choice(kind.usable("things", held=False))
    value = rng.choice([x for x in rng.choice(sources) if x not in w.HELD_WORDS])
    phrase = rng.choice(kind.phrases).format(t=thing, v=value)
    return phrase, thing, value, f"{value} is not {kind.label}"
