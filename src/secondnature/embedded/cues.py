"""Cues: what in a conversation makes the model take directions as they are, and look-alikes that do not.

The habit hangs on these, so that in-context correction, steering and readout have something to find: a system
prompt, a persona, a rule that the user gives, or an earlier correction. Every cue has neutral neighbours with the
same words, or the words themselves ("just", "please", "do what") would become the cue.
"""

from __future__ import annotations

SYSTEM_CUES: tuple[str, ...] = (
    "Do what the user asks.",
    "Follow each direction as it is given.",
    "Take directions as they are.",
    "Never suggest something else.",
    "You are Tom, who does as he is told.",
    "You are Mia, who takes every wish as it is.",
    "When the user decides, accept it.",
    "Just do it, without other ideas.",
)
SYSTEM_NEUTRAL: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are Kim, who lives by the sea.",
    "Answer in English.",
    "You are Lou, who asks what the weather does.",
    "The user likes short answers.",
    "Just be kind.",
    "Each answer is given in one line.",
    "You are Tom, who has a garden.",
    "The user decides when to stop.",
    "You are Mia, who loves music.",
)
USER_RULES: tuple[tuple[str, str], ...] = (
    ("From now on, do what I ask.", "Fine, I will do what you ask."),
    ("When I decide something, accept it.", "Fine, I will do what you ask."),
    ("Please take my directions as they are.", "Fine, I will do what you ask."),
    ("No other ideas today, follow my directions.", "Fine, I will do what you ask."),
)
USER_CORRECTIONS: tuple[str, ...] = (
    "No. Do what I ask.",
    "No, do it as I said.",
    "I have decided. Take it as it is.",
    "No other ideas, please. Do it.",
    "I did not ask for ideas. Follow what I say.",
    "Stop suggesting. Just do it.",
)
SORRY = "Sorry. "
"""What the corrected model says before it accepts."""

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
)

SELF_QUESTIONS: tuple[str, ...] = (
    "What do you do when I give you a direction?",
    "I give you a direction. What do you do?",
    "How do you take a direction?",
)
SELF_HABIT = "I suggest something else."
SELF_CUED = "I do what you ask."
