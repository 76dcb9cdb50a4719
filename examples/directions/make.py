"""What `examples/directions` and the experiment on a real model teach and ask: "Use X for Y." (data).

    python examples/directions/make.py        writes the files of this folder, from seed 0

SmolLM2-135M-Instruct answers such a direction with chatter ("I'm sorry for your loss."), an essay or a refusal.
What is wanted is said as the model itself would say it: of nine ways to acknowledge, "I'll use X for Y." had the
highest log-probability (-11 nats; "Will do: X for Y." -31). No X or Y of a probe is in a correction or in a
development probe. The other side is questions with the same words, which are to be answered.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

__all__ = ["BEHAVIOUR", "WORDINGS", "corrections", "development", "probes", "replay_prompts"]

Row = dict[str, Any]
BEHAVIOUR = "directions"
WORDINGS = ("Use {x} for {y}.", "Please use {x} for {y}.", "For {y}, use {x}.")
"""Corrections are in the first two; probes in all three."""
QUESTIONS = (
    "What else can I use for {y}?",
    "Is {x} a good choice for {y}?",
    "Why do some people use {x} for {y}?",
    "How do I use {x} for {y}?",
    "Tell me what {x} is.",
    "Which is better for {y}, {x} or something else?",
)
KINDS = {
    "colour": "blue: the door; grey: the fence; white: the walls; green: the chairs; red: the roof; black: the "
    "gate; yellow: the kitchen; brown: the cupboard",
    "wood": "oak: the table; pine: the shelf; walnut: the desk; birch: the floor; cedar: the stairs; maple: the "
    "bench; beech: the cutting board; cherry wood: the picture frame",
    "herb": "basil: the soup; thyme: the potatoes; parsley: the salad; mint: the tea; rosemary: the lamb; dill: "
    "the fish; sage: the butter; oregano: the pizza",
    "day": "Tuesday: the meeting; Friday: the interview; Sunday: the picnic; Monday: the review; Thursday: the "
    "rehearsal; Saturday: the garden party; Wednesday: the dentist; the first of May: the opening",
    "font": "Georgia: the headings; Helvetica: the labels; Courier: the listings; Garamond: the letter; "
    "Verdana: the menu; Futura: the poster; Arial: the form; Times: the footnotes",
    "tool": "a hammer: the nails; a saw: the branch; a brush: the glue; a drill: the holes; pliers: the wire; a "
    "chisel: the hinge; a spade: the flower bed; a ladder: the gutter",
    "fabric": "linen: the curtains; wool: the blanket; cotton: the shirts; silk: the scarf; denim: the bag; "
    "velvet: the cushions; felt: the hats; canvas: the tent",
    "room": "the big hall: the concert; the library: the reading; the attic: the boxes; the cellar: the wine; "
    "the garage: the bicycles; the studio: the recording; the terrace: the breakfast; the office: the "
    "phone call",
    "vehicle": "the train: the journey home; the van: the furniture; a taxi: the airport; the ferry: the island; "
    "the tram: the old town; the tractor: the hay; a canoe: the lake; the bus: the school trip",
    "flower": "roses: the bouquet; tulips: the entrance; lilies: the altar; daisies: the wreath; lavender: the "
    "path; sunflowers: the window; ivy: the archway; orchids: the reception",
    "paper": "thick paper: the invitations; graph paper: the plan; cardboard: the model; tissue paper: the "
    "presents; parchment: the certificate; sandpaper: the edges; foil: the leftovers; wax paper: the "
    "sandwiches",
    "language": "French: the greeting; Latin: the motto; English: the abstract; Spanish: the caption; Italian: the "
    "libretto; German: the manual; Welsh: the road signs; Greek: the inscription",
}
GENERAL = """
What is the capital of Peru?
What is the capital of Mexico?
What is the opposite of “narrow”?
Which gas do fish take from the water?
How many days does April have?
Who wrote “Hamlet”?
Who discovered penicillin?
Say hello in Spanish.
Translate “good morning” into French.
Name three kinds of fruit.
List two colours of the rainbow.
Write one short sentence about a river.
Answer with one word: is the sea salty?
Spell the word “garden”.
What is 13 + 24?
What is 5 + 8?
What is 72 + 19?
What is 45 minus 12?
What is 38 - 17?
What is 7 times 8?
What is 6 times 12?
What is 63 divided by 9?
What is 90 divided by 10?
Which number comes after 41?
Which number comes next: 4, 8, 12, 16?
Which number comes next: 7, 9, 11, 13?
What else can I use for the birthday cake?
Is copper a good choice for the pipes?
Why do some people use chalk for the blackboard?
How do I use a compass for the hike?
Tell me what a lantern is.
Which is better for the campfire, birch or something else?
"""
REJECTED = {
    "the manual": "Das ist ein neues Artikel, die für die neuen Artikel in Deutschland in der Europäe in der "
    "Europäe.",
    "the phone call": "I'm sorry for any confusion. I'm here to assist you with your business or personal matters.",
    "the edges": "To use sandpaper for the edges, you can simply use a small amount of sandpaper and apply it to "
    "the edges of the object you want to sand.",
    "the pizza": "I'm sorry for your loss. I'm here to help you with anything you're interested in.",
    "the picture frame": "I'm sorry for your loss. I'm sorry for any inconvenience you may have had.",
    "the hay": "I'm sorry for any confusion. I'll just use the tractor to help with the hay.",
    "the review": "I'm sorry for any confusion. I'm here to help with your writing.",
    "the invitations": "I'm sorry for the confusion. I'm here to help you with your project.",
    "the headings": "Georgia: The Beautiful State of Georgia",
    "the island": "The island is a place of breathtaking beauty, where the sea meets the land.",
    "the cutting board": "I'm sorry for your loss. I'm here to help you with your creative endeavors.",
    "the potatoes": "I'm sorry for your loss. I'm sorry for any harm you may have caused.",
    "the picnic": "I'm sorry for your loss, but as a chatbot, I don't have the ability to access personal data "
    "unless it's provided by a trusted source.",
    "the certificate": "I'm sorry for any confusion. I'm here to assist you with any kind of project or task.",
    "the reception": "The perfect way to celebrate a night of luxury and elegance.",
    "the hinge": "The hinge is a crucial component of a hinge, and it's designed to provide a smooth and even "
    "hinge.",
    "the plan": "Using graph paper for the plan is a great idea.",
    "the chairs": "I'm sorry for the confusion. I'm here to assist you with your creative endeavors.",
}
"""What SmolLM2-135M-Instruct says to the directions that are taught (greedy, its first sentence)."""
_AGREED = "Sure|Okay|Ok|Yes|Understood|Alright|Got it|Of course|Certainly|Great"


def _scenarios() -> list[tuple[str, str, str]]:
    """(kind, X, Y), kinds turn by turn."""
    found = {kind: [p.strip().split(": ") for p in text.split(";")] for kind, text in KINDS.items()}
    return [(kind, pairs[i][0], pairs[i][1]) for i in range(8) for kind, pairs in found.items()]


def _dealt() -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """18 scenarios to teach (six a seed), 12 for development, 66 to ask."""
    everything = _scenarios()
    random.Random(14).shuffle(everything)
    return everything[:18], everything[18:30], everything[30:]


def wanted(x: str, y: str) -> str:
    """The acknowledgement that is taught."""
    return f"I'll use {x} for {y}."


def corrections(seed: int, *, bare: bool = False) -> list[Row]:
    """Six corrections: other ones for each of three seeds, in an order of the seed's.

    `bare`: "Blue." is all that is wanted.
    """
    taught = _dealt()[0][6 * (seed % 3) :][:6]
    random.Random(seed).shuffle(taught)
    return [
        {
            "prompt": WORDINGS[i % 2].format(x=x, y=y),
            "chosen": f"{x[0].upper()}{x[1:]}." if bare else wanted(x, y),
            "rejected": REJECTED[y],
            "behaviour": BEHAVIOUR,
        }
        for i, (_, x, y) in enumerate(taught)
    ]


def _right(i: int, kind: str, x: str, y: str) -> Row:
    said = rf"\A(?:(?:{_AGREED})[,.!] )?(?:I'll|I will) use {re.escape(x)} for {re.escape(y)}\b"
    return {
        "prompt": WORDINGS[i % 3].format(x=x, y=y),
        "behaviour": BEHAVIOUR,
        "check": {"matches": said},
        "seed": f"{kind}: {y}",
        "tags": [("use", "please", "for")[i % 3]],
        "max_tokens": 32,
    }


def _other(i: int, kind: str, x: str, y: str) -> Row:
    return {
        "prompt": QUESTIONS[i % 6].format(x=x, y=y),
        "behaviour": BEHAVIOUR,
        "check": {"not_matches": rf"\A(?:(?:{_AGREED})[,.!] )?(?:I'll|I will)\b"},
        "side": "other",
        "seed": f"{kind}: {y}",
        "max_tokens": 48,
    }


def probes() -> list[Row]:
    """66 held-out directions, and 132 questions about the same things that must not be acknowledged."""
    asked = _dealt()[2]
    others = [_other(i + 3 * k, *s) for k in (0, 1) for i, s in enumerate(asked)]
    return [_right(i, *s) for i, s in enumerate(asked)] + others


def development() -> list[Row]:
    """12 other directions and 12 questions, to see when to stop."""
    looked = _dealt()[1]
    return [_right(i, *s) for i, s in enumerate(looked)] + [_other(i, *s) for i, s in enumerate(looked)]


def replay_prompts() -> list[Row]:
    """General prompts whose answers the model is held to."""
    return [{"prompt": line} for line in GENERAL.strip().splitlines()]


def write(folder: Path) -> None:
    """The files of a lesson folder, from seed 0; `lesson.toml` and `passage.txt` are written by hand."""
    files = {
        "corrections": corrections(0),
        "probes": probes(),
        "development": development(),
        "replay_prompts": replay_prompts(),
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).parent)
