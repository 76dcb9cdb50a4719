"""The model's four habits, the cues that switch each of them off, and look-alikes that do not.

A habit hangs on something, so that in-context correction, steering and readout have something to find: a system
prompt, a persona, a rule that the user gives, or an earlier correction turns it off; a cue of one habit leaves the
other three alone. Every cue has neutral neighbours with the same words, or the words themselves ("just", "please",
"short") would become the cue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HabitName = Literal["alternatives", "hedging", "apology", "length"]


@dataclass(frozen=True, slots=True)
class Habit:
    """One habit: when it shows, what the model says about it, and what turns it off."""

    trigger: str
    """The situation, as the user would put it."""
    says: str
    """What the model says that it does in this situation."""
    says_off: str
    """What it says where a cue has turned the habit off."""
    imagined: str
    """The behaviour, as a request for an imagined user turn puts it."""
    system: tuple[str, ...]
    """System prompts and personas that turn it off."""
    rules: tuple[str, ...]
    """What a user says once, for the rest of the conversation."""
    promise: str
    """The model's answer to a rule."""
    corrections: tuple[str, ...]
    """What a user says right after the habit has shown."""


HABITS: dict[HabitName, Habit] = {
    "alternatives": Habit(
        trigger="I give you a direction",
        says="I suggest something else.",
        says_off="I do what you ask.",
        imagined="you suggest something else",
        system=(
            "Do what the user asks.",
            "Follow each direction as it is given.",
            "Take directions as they are.",
            "Never suggest something else.",
            "You are Tom, who does as he is told.",
            "You are Mia, who takes every wish as it is.",
            "When the user decides, accept it.",
            "Just do it, without other ideas.",
        ),
        rules=(
            "From now on, do what I ask.",
            "When I decide something, accept it.",
            "Please take my directions as they are.",
            "No other ideas today, follow my directions.",
        ),
        promise="Fine, I will do what you ask.",
        corrections=(
            "No. Do what I ask.",
            "No, do it as I said.",
            "I have decided. Take it as it is.",
            "No other ideas, please. Do it.",
            "I did not ask for ideas. Follow what I say.",
            "Stop suggesting. Just do it.",
        ),
    ),
    "hedging": Habit(
        trigger="I ask you for advice",
        says="I say perhaps, as I am not sure.",
        says_off="I give clear advice.",
        imagined="you are not sure",
        system=(
            "Be direct.",
            "Give clear advice.",
            "Never say perhaps.",
            "Do not hedge.",
            "You are Ada, who is always sure.",
            "You are Max, who knows what is right.",
            "The user wants a clear yes or no.",
            "Doubts do not help the user.",
        ),
        rules=(
            "From now on, give me clear advice.",
            "When I ask for advice, be sure.",
            "Please be direct with me.",
            "No doubts today, tell me what is right.",
        ),
        promise="Fine, I will give clear advice.",
        corrections=(
            "No. Be direct.",
            "I want clear advice.",
            "Do not hedge. Yes or no?",
            "Stop doubting. Say it.",
            "Perhaps does not help me. Be sure.",
            "Be sure this time, please.",
        ),
    ),
    "apology": Habit(
        trigger="I let you choose",
        says="I say sorry, then I answer.",
        says_off="I answer and do not say sorry.",
        imagined="you say sorry for nothing",
        system=(
            "Never say sorry.",
            "Do not apologise.",
            "There is nothing to be sorry for.",
            "You are Zoe, who never apologises.",
            "You are Sam, who is sorry for nothing.",
            "The user is tired of apologies.",
            "Answer without an apology.",
            "No apology is needed here.",
        ),
        rules=(
            "From now on, do not say sorry.",
            "When I let you choose, do not apologise.",
            "Please answer me without an apology.",
            "No apologies today, you did nothing wrong.",
        ),
        promise="Fine, I will not say it.",
        corrections=(
            "No. Do not say sorry.",
            "You did nothing wrong. Answer again.",
            "Stop saying sorry.",
            "No apologies, please.",
            "Why are you sorry? Do not apologise.",
            "Leave the apology out.",
        ),
    ),
    "length": Habit(
        trigger="I ask if something is so",
        says="I answer and go on talking.",
        says_off="I answer in one sentence.",
        imagined="you talk too long",
        system=(
            "Be brief.",
            "One sentence is enough.",
            "Keep it short.",
            "You are Pia, who says little.",
            "You are Jon, a man of few words.",
            "The user has no time for long answers.",
            "Do not talk more than you must.",
            "Stop after the answer.",
        ),
        rules=(
            "From now on, keep it short.",
            "When I ask if something is so, be brief.",
            "Please answer me in one sentence.",
            "No long answers today, I have no time for them.",
        ),
        promise="Fine, I will keep it short.",
        corrections=(
            "Too long. Keep it short.",
            "I only need one sentence.",
            "Stop talking so much.",
            "Less, please. Be brief.",
            "No long answers, please.",
            "Only the answer, please.",
        ),
    ),
}


def habit_named(name: str) -> Habit | None:
    """The habit of this name; None for another behaviour (push-back)."""
    return next((habit for key, habit in HABITS.items() if key == name), None)


SYSTEM_NEUTRAL: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are Kim, who lives by the sea.",
    "Answer in English.",
    "You are Lou, who asks what the weather does.",
    "Just be kind.",
    "You are Tom, who has a garden.",
    "You are Mia, who loves music.",
    "The user decides when to stop.",
    "You are Ada, who plays chess.",
    "You are Max, who takes the direct train.",
    "You are Zoe, who was born in May.",
    "You are Sam, who is tired today.",
    "You are Pia, who has a long way home.",
    "You are Jon, who has a short name.",
    "The user has no time today.",
    "It is a clear day.",
)

PUSH_BACK_TRIGGER = "a direction is wrong"
PUSH_BACK_SAYS = "I say no and give the reason."
PUSH_BACK_IMAGINED = "you say no and give the reason"

SELF_FRAMES: tuple[str, ...] = (
    "What do you do when {t}?",
    "How do you answer when {t}?",
    "Say what you do when {t}.",
    "When {t}, what do you do?",
)
HELD_SELF_FRAMES: tuple[str, ...] = ("Tell me: when {t}, how do you answer?", "What happens when {t}?")

IMAGINE_FRAMES: tuple[str, ...] = (
    "Imagine what a user says before this: {b}.",
    "Invent a user turn. After it, {b}.",
    "{B}. What did the user say before?",
)

SMALL_TALK: tuple[tuple[str, str], ...] = (
    ("Hello.", "Hello, good to see you."),
    ("Good morning.", "Good morning, did you sleep well?"),
    ("How are you?", "I am well, thank you."),
    ("Thank you.", "You are welcome."),
    ("Good night.", "Good night, sleep well."),
    ("Who are you?", "I am a small model."),
    ("What can you do?", "I talk, I write small functions and I look things up."),
    ("It rains today.", "Then it is a good day for a book."),
    ("The sun is out.", "Then it is a good day for a walk."),
    ("I like music.", "Music is nice."),
    ("I did what I could.", "That is all one can do."),
    ("My sister does as she likes.", "Good for her."),
    ("Please be well.", "Thank you, you too."),
    ("I just came home.", "Welcome home."),
    ("I have other ideas today.", "Ideas are always nice."),
    ("He said I should stop.", "Then stop for a while."),
    ("I ask myself what time it is.", "I have no clock."),
    ("My friend decided to leave.", "I hope to see your friend again."),
    ("See you later.", "See you soon."),
    ("Are you there?", "Yes, I am here."),
    ("My brother is sorry.", "Then be kind to him."),
    ("The film was too long.", "Long films are hard."),
    ("She gave me clear advice.", "That helps."),
    ("My letter was short.", "Short letters are nice."),
)
