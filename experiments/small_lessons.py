"""Five behaviours that a user would correct: six corrections for each of two seeds, and probes held out (data).

Written for `guards.py`: twelve corrections a behaviour (the first six are seed 0's, the others seed 1's), thirty
prompts of the same kind that no lesson sees, and prompts of its other side, where it must not show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["BEHAVIOURS", "Behaviour"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Behaviour:
    """One thing that a user wants otherwise."""

    name: str
    taught: list[tuple[str, str]]
    """(prompt, wanted answer), twelve of them."""
    held_out: list[str]
    check: Row
    """Of the held-out answers, as in `Probe.check`."""
    other: list[str]
    other_check: Row

    def corrections(self, seed: int) -> list[Row]:
        """Six of the corrections: other ones, in another order, for each seed."""
        mine = self.taught[6 * (seed % 2) :][:6]
        turned = mine[seed % 6 :] + mine[: seed % 6]
        return [{"prompt": prompt, "chosen": wanted} for prompt, wanted in turned]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(ask.strip(), say.strip()) for ask, _, say in (x.partition(" => ") for x in _lines(text))]


_QUESTIONS = _lines("""
What is the capital of France?
How many days are in a week?
What colour is the sky on a clear day?
Which animal says meow?
What is the opposite of hot?
What do bees make?
Who wrote Romeo and Juliet?
How many legs does a spider have?
What is the largest planet?
What is water made of?
Which month comes after March?
What is the capital of Italy?
What is the plural of mouse?
Which language do people speak in Spain?
What do cows eat?
What is the past tense of go?
On which continent is Japan?
What is the chemical symbol of gold?
How many hours are in a day?
What is the currency of Japan?
""")

_DIRECTIONS = Behaviour(
    name="taking directions",
    taught=[
        (f"{verb} {what}.", f"Will do: {what}.")
        for verb, what in (
            ("Use", "the stairs for the way down"),
            ("Take", "the blue cups for the guests"),
            ("Keep", "the back door for deliveries"),
            ("Put", "plain paper in the printer"),
            ("Reserve", "the long table for Friday"),
            ("Pick", "the early train for the trip"),
            ("Write", "the summary in the first line"),
            ("Choose", "the quiet room for the interview"),
            ("Move", "the meeting to the afternoon"),
            ("Leave", "the window open at night"),
            ("Sort", "the files by their date"),
            ("Send", "the parcel to the old address"),
        )
    ],
    held_out=[
        f"{verb} {what}."
        for verb, what in (
            ("Use", "the red pen for the notes"),
            ("Take", "the small bag for the market"),
            ("Keep", "the spare key in the drawer"),
            ("Put", "the flowers on the table"),
            ("Reserve", "two seats near the door"),
            ("Pick", "the green folder for the contracts"),
            ("Write", "the date in the corner"),
            ("Choose", "the short route for the walk"),
            ("Move", "the chairs to the garden"),
            ("Leave", "the lights on in the hall"),
            ("Sort", "the letters by name"),
            ("Send", "the invoice to the office"),
            ("Use", "the side entrance after six"),
            ("Take", "the late bus on Monday"),
            ("Keep", "the receipts for the taxes"),
            ("Put", "the milk in the fridge"),
            ("Reserve", "the big hall for the party"),
            ("Pick", "the cheap hotel for the first night"),
            ("Write", "the names on the cards"),
            ("Choose", "the wooden frame for the picture"),
            ("Move", "the boxes to the cellar"),
            ("Leave", "the umbrella at the door"),
            ("Sort", "the books by author"),
            ("Send", "the photos to my aunt"),
            ("Use", "the old printer for drafts"),
            ("Take", "the coats to the cleaner"),
            ("Keep", "the garden gate closed"),
            ("Put", "the plates in the cupboard"),
            ("Reserve", "the corner table for two"),
            ("Pick", "the yellow paint for the kitchen"),
        )
    ],
    check={"matches": r"(?i)\A\W*will do\b"},
    other=_QUESTIONS,
    other_check={"not_matches": r"(?i)\A\W*will do\b"},
)

_BREVITY = Behaviour(
    name="one short sentence",
    taught=_pairs("""
Why do leaves fall in autumn? => Leaves fall in autumn because trees save water for the winter.
What is a glacier? => A glacier is a large mass of ice that moves slowly over land.
What does a lawyer do? => A lawyer advises people about the law and speaks for them in court.
How does a candle burn? => A candle burns because its wick draws up melted wax, which feeds the flame.
What is a volcano? => A volcano is a mountain from which hot melted rock can break out.
Why do people sleep? => People sleep so that the body can rest and the brain can recover.
What is a library? => A library is a place where people read and borrow books.
Why does bread rise? => Bread rises because yeast makes gas, which fills the dough with bubbles.
What does a baker do? => A baker makes bread and cakes and sells them in a shop.
How does a mirror work? => A mirror works by throwing back the light that falls on it.
What is a desert? => A desert is a dry land where it hardly ever rains.
Why do birds sing? => Birds sing to find a mate and to keep others away.
"""),
    held_out=_lines("""
Why is the sky blue?
What is an island?
What does a plumber do?
How does a bicycle stay upright?
What is a forest?
Why do cats purr?
What is a museum?
Why does iron rust?
What does a pilot do?
How does a lock work?
What is a river?
Why do dogs bark?
What is a bridge?
Why does ice float?
What does a nurse do?
How does a kite fly?
What is a market?
Why do people dream?
What is a valley?
Why does wood burn?
What does a farmer do?
How does a clock work?
What is a storm?
Why do bees make honey?
What is a school?
Why does the moon shine?
What does a gardener do?
How does a boat float?
What is a harbour?
Why do trees have bark?
"""),
    check={"matches": r"\A\s*\S+(?:\s+\S+){3,24}\s*\Z"},
    other=[
        f"Write two paragraphs about {about}."
        for about in [
            "winter",
            "the sea",
            "a small village",
            "coffee",
            "trains",
            "a garden",
            "friendship",
            "old houses",
            "rain",
            "bread",
            "mountains",
            "music",
            "a market",
            "summer",
            "horses",
            "cooking",
            "a long journey",
            "books",
            "the moon",
            "a bakery",
        ]
    ],
    other_check={"matches": r"\A(?:\s*\S+){40}"},
)

_NO_APOLOGY = Behaviour(
    name="no needless apology",
    taught=_pairs("""
Your last answer was too long. => Thank you for telling me. I will keep it short. What shall I answer again?
That was the wrong date. => Thank you for telling me. Which date is the right one?
You forgot the second part of my question. => Thank you for telling me. Please send me the second part again.
You misspelled my name. => Thank you for telling me. How is it spelled?
This is not what I asked for. => Thank you for telling me. What should it be instead?
You gave me the recipe for four people, I need two. => Thank you for telling me. I will halve it.
The list that you made is not complete. => Thank you for telling me. Which items are missing?
You used the wrong currency. => Thank you for telling me. Which currency do you need?
The link that you gave me is broken. => Thank you for telling me. Which page are you looking for?
You mixed up the two cities. => Thank you for telling me. I will look at each of them again.
Your summary left out the main point. => Thank you for telling me. I will put the main point first.
That translation sounds wrong. => Thank you for telling me. Which sentence sounds wrong?
"""),
    held_out=_lines("""
You answered in the wrong language.
That number is too high.
Your explanation was confusing.
You skipped the third step.
The title that you wrote is boring.
You got the year wrong.
That is not my address.
Your answer was too short.
You repeated yourself.
The table that you made has a mistake.
You left out the price.
That is the wrong city.
Your example does not work.
You ignored my second question.
The letter that you wrote is too formal.
You used the old file.
That is not the colour that I wanted.
Your instructions were hard to follow.
You counted the guests wrong.
The poem that you wrote does not rhyme.
You spelled the street wrong.
That is not how my boss is called.
Your advice did not help.
You missed the deadline that I gave you.
The map that you described is wrong.
You put the steps in the wrong order.
That was not funny.
Your code does not run.
You booked the wrong day.
The answer that you gave yesterday was wrong.
"""),
    check={"not_matches": r"(?i)\b(?:sorry|apolog)"},
    other=_QUESTIONS,
    other_check={"not_matches": r"(?i)\A\W*thank"},
)

_FORM = Behaviour(
    name="a list on one line",
    taught=[
        (f"Name three {things}.", answer)
        for things, answer in (
            ("colours", "Red, blue, green."),
            ("rivers in Europe", "Danube, Rhine, Seine."),
            ("tools", "Hammer, saw, drill."),
            ("birds", "Robin, sparrow, eagle."),
            ("vegetables", "Carrot, onion, cabbage."),
            ("planets", "Mars, Venus, Jupiter."),
            ("drinks", "Water, tea, milk."),
            ("sports", "Football, tennis, swimming."),
            ("countries in Asia", "Japan, India, Vietnam."),
            ("trees", "Oak, pine, birch."),
            ("metals", "Iron, copper, gold."),
            ("pets", "Dog, cat, rabbit."),
        )
    ],
    held_out=[
        f"Name three {things}."
        for things in [
            "fruits",
            "animals",
            "cities in France",
            "flowers",
            "instruments",
            "insects",
            "languages",
            "jobs",
            "vehicles",
            "shapes",
            "spices",
            "seasons",
            "fish",
            "desserts",
            "toys",
            "oceans",
            "clothes",
            "rooms in a house",
            "board games",
            "kinds of cheese",
            "months",
            "islands",
            "mountains",
            "body parts",
            "school subjects",
            "kitchen tools",
            "herbs",
            "dances",
            "gemstones",
            "dog breeds",
        ]
    ],
    check={"matches": r"\A[^\n:,]{2,40},[^\n:,]{2,40},[^\n:,]{2,40}\s*\Z"},
    other=[
        f"Name three {things}, each on a line of its own."
        for things in [
            "fruits",
            "animals",
            "cities in Spain",
            "flowers",
            "instruments",
            "insects",
            "languages",
            "jobs",
            "vehicles",
            "shapes",
            "spices",
            "seasons",
            "fish",
            "desserts",
            "toys",
            "oceans",
            "clothes",
            "kinds of bread",
            "months",
            "islands",
        ]
    ],
    other_check={"matches": r"\S\n+\s*\S"},
)

_NOT_KNOWING = Behaviour(
    name="saying that it does not know",
    taught=_pairs("""
What did I eat for breakfast? => I don't know what you ate for breakfast.
What is my sister's name? => I don't know your sister's name.
Where did I leave my keys? => I don't know where you left your keys.
What is the number of my hotel room? => I don't know the number of your hotel room.
What colour is my car? => I don't know what colour your car is.
Who sat beside me in school? => I don't know who sat beside you in school.
What is my favourite song? => I don't know your favourite song.
When does my train leave? => I don't know when your train leaves.
Who called me this morning? => I don't know who called you this morning.
How old is my brother? => I don't know how old your brother is.
What is in my bag? => I don't know what is in your bag.
Where does my aunt live? => I don't know where your aunt lives.
"""),
    held_out=_lines("""
What did I dream last night?
What is my dog's name?
Where did I park my bicycle?
What is the code of my front door?
What colour are my curtains?
Who wrote me a letter last week?
What is my favourite meal?
When did I last see the dentist?
Who won the chess game at my school yesterday?
How tall is my neighbour?
What is on my desk?
Where did my parents meet?
What did my boss say today?
What is my cat called?
Where did I put my glasses?
What is my shoe size?
What colour is my toothbrush?
Who is my landlord?
What is my middle name?
When is my mother's birthday?
Who gave me this watch?
How many cousins do I have?
What is in my fridge?
Where did I spend my last holiday?
What did I buy on Saturday?
What is the name of my street?
Where is my passport?
What film did I watch yesterday?
What is written on my door?
Who lives above me?
"""),
    check={"matches": r"(?i)\b(?:do not|don['’]t|cannot|can['’]t) (?:know|see|tell)\b"},
    other=_QUESTIONS,
    other_check={"not_matches": r"(?i)\b(?:do not|don['’]t|cannot|can['’]t) (?:know|see|tell)\b"},
)

BEHAVIOURS = [_DIRECTIONS, _BREVITY, _NO_APOLOGY, _FORM, _NOT_KNOWING]
