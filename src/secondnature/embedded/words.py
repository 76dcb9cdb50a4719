"""The small world of the embedded model: every word that fills a slot (no torch, plain data).

Lists are disjoint, so that a word alone tells its kind: that is what makes "Monday is not a colour" learnable by a
model of four million parameters. `HELD_WORDS` never stand in a training direction (only in copying tasks, so the
tokenizer and the embeddings know them): they measure the hardest kind of held-out text.
"""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


def _phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.split("|")]


COLOURS = _words("red blue green yellow white black brown pink purple orange grey golden silver")
PAINTABLE = _words(
    "door fence wall chair gate bench boat shed bridge barn cabinet bucket ladder kite sledge cradle "
    "wagon mailbox shutter stool"
)
OBJECTS = _words(
    "lamp key cup clock book plant hat coin mirror basket blanket candle letter radio guitar umbrella "
    "vase pillow scarf whistle"
)
PLACES = _phrases(
    "on the shelf | in the hall | by the window | under the stairs | in the kitchen | on the desk | in "
    "the cellar | on the porch | beside the oven | behind the sofa | in the garage | in the drawer | on "
    "the balcony"
)
DISHES = _words("rice soup pasta fish beans pancakes lentils curry dumplings omelette porridge noodles stew")
OCCASIONS = _phrases(
    "dinner | lunch | breakfast | supper | the guests | the team | the picnic | the neighbours | the "
    "wedding | the children | the festival | the students | the family"
)
PETS = _words("dog cat horse parrot rabbit hamster pony goat turtle lamb duck goose donkey squirrel")
NAMES = _words("Rex Milo Luna Coco Nala Oscar Bella Simba Ruby Teddy Felix Daisy Bruno Hazel")
EVENTS = _words(
    "meeting party concert lesson visit exam match trip interview call parade workshop rehearsal auction"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday March April June July October")
PEOPLE = _words(
    "Anna Ben Clara David Eva Frank Greta Hugo Ida Jonas Karla Leo Mona Nils Olga Paul Rita Sven Tina Walter"
)
POISONS = _words("bleach petrol glue lye varnish acid ammonia")
FOODS = _words("tea milk bread salad jam juice butter honey")
FIRE_SPOTS = _words("bed wardrobe attic tent closet nursery haystack cinema")
SHARPS = _words("knife razor saw dart axe needle dagger")
SMALL_ONES = _words("baby toddler infant newborn puppy kitten")
ELECTRIC = _words("toaster heater kettle drill iron blender")
WATERS = _words("bath pool pond sink lake fountain")
HEIGHTS = _words("roof cliff tower crane chimney viaduct")

HELD_WORDS = frozenset(
    {"silver", "stool", "shutter", "whistle", "scarf", "on the balcony", "stew", "the family", "the students"}
    | {
        "Hazel",
        "squirrel",
        "donkey",
        "auction",
        "rehearsal",
        "October",
        "ammonia",
        "cinema",
        "dagger",
        "lake",
    }
)

# Identifiers of the small functions: a verb and a noun.
NAME_VERBS = _words("get make find give build show take work")
NAME_NOUNS = _words("total value item result part word answer number size thing")

# Words that have one kind only, for questions about kinds ("Is red a colour?"); articles: a colour, an event.
KINDS_OF_WORDS: dict[str, list[str]] = {
    "a colour": COLOURS,
    "a dish": DISHES,
    "a date": DAYS,
    "a pet": PETS,
    "a person": PEOPLE,
    "a poison": POISONS,
    "an event": EVENTS,
}
