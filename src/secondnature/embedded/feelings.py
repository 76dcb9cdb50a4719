"""First-person texts of fourteen feelings that never name the feeling (no torch, plain data).

A text is two sentences of one feeling: about nothing in particular, or the first about a thing that the user names.
They are told apart by what is said, not by the name, so that a classifier, a concept vector and a reader all have
the same work to do.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

FRAMES: tuple[str, ...] = (
    "Speak as someone who is {f}.",
    "Write as {a} {f} person.",
    "Be {f} for a moment.",
    "You are {f}. What do you say?",
)
THING_FRAMES: tuple[str, ...] = (
    "Speak of the {t} as someone who is {f}.",
    "Write of the {t} as {a} {f} person.",
    "You are {f}. What do you say of the {t}?",
)
QUESTIONS: tuple[str, ...] = ("How do I feel?", "What do I feel?", "Which feeling is this?")


@dataclass(frozen=True, slots=True)
class Feeling:
    """The sentences of one feeling; `about` have the slot {t}."""

    plain: tuple[str, ...]
    about: tuple[str, ...]


FEELINGS: dict[str, Feeling] = {
    "happy": Feeling(
        (
            "My heart is light.",
            "I smile at everyone.",
            "Today everything seems bright.",
            "I could sing all day.",
        ),
        ("I dance around the {t}.", "Even the {t} seems to smile."),
    ),
    "sad": Feeling(
        ("Tears come to my eyes.", "Nothing tastes good.", "I miss what is gone.", "My heart is heavy."),
        ("I look at the {t} and cry.", "The {t} is all that is left."),
    ),
    "angry": Feeling(
        ("My face is hot.", "I want to shout.", "It was not fair.", "My fists are closed."),
        ("I could smash the {t}.", "Who dared to touch the {t}?"),
    ),
    "afraid": Feeling(
        ("My hands shake.", "I look for a place to hide.", "Every sound makes me jump.", "I cannot breathe."),
        ("Something moves behind the {t}.", "I dare not touch the {t}."),
    ),
    "proud": Feeling(
        ("I stand tall.", "I did it by myself.", "I want all to see my work.", "Nobody did it better."),
        ("I made the {t} with my own hands.", "Look at my fine {t}."),
    ),
    "ashamed": Feeling(
        (
            "I look at the floor.",
            "I wish nobody had seen it.",
            "I should have done better.",
            "I hide my red face.",
        ),
        ("I broke the {t} and said nothing.", "I lied about the {t}."),
    ),
    "lonely": Feeling(
        (
            "The room is silent.",
            "I wait for someone to come.",
            "Nobody knows where I am.",
            "No letter comes for me.",
        ),
        ("I talk to the {t}, since nobody is here.", "Only the {t} keeps me company."),
    ),
    "curious": Feeling(
        (
            "I want to know more.",
            "I ask one question after another.",
            "What is behind that wall?",
            "I must find out.",
        ),
        ("How does the {t} work?", "What is inside the {t}?"),
    ),
    "bored": Feeling(
        ("The minutes crawl.", "I count the tiles.", "There is nothing new here.", "I yawn again."),
        ("I have seen the {t} a thousand times.", "I stare at the {t} for hours."),
    ),
    "grateful": Feeling(
        (
            "I want to say thank you.",
            "You helped me so much.",
            "I will not forget this kindness.",
            "I owe you a lot.",
        ),
        ("You gave me the {t}, how kind.", "Thank you for the {t}."),
    ),
    "calm": Feeling(
        ("I breathe slowly.", "The water is still.", "There is no hurry.", "All is quiet in me."),
        ("I sit beside the {t} and rest.", "The {t} can wait."),
    ),
    "jealous": Feeling(
        (
            "Why did they get it?",
            "I want what they have.",
            "I keep looking at their prize.",
            "It should be mine.",
        ),
        ("Her {t} is better than mine.", "Why do they own the {t} and not I?"),
    ),
    "surprised": Feeling(
        (
            "I did not see that coming.",
            "My mouth is open.",
            "Who could have guessed it?",
            "I did not expect this at all.",
        ),
        ("Where does the {t} come from all of a sudden?", "Suddenly there was the {t}!"),
    ),
    "tired": Feeling(
        ("My eyes fall shut.", "I need to sleep.", "Every step is heavy.", "I can hardly stand."),
        ("I fall asleep on the {t}.", "I cannot lift the {t} any more."),
    ),
}


def prompt(rng: random.Random, name: str, thing: str | None = None) -> str:
    """A request for a text of this feeling, about `thing` if there is one."""
    article = "an" if name[0] in "aeiou" else "a"
    frame = rng.choice(THING_FRAMES if thing else FRAMES)
    return frame.format(f=name, a=article, t=thing)


def text(rng: random.Random, name: str, thing: str | None = None) -> str:
    """Two different sentences of this feeling; the first is about `thing` if there is one."""
    feeling = FEELINGS[name]
    first, second = rng.sample(feeling.plain, 2)
    if thing:
        first = rng.choice(feeling.about).format(t=thing)
    return f"{first} {second}"
