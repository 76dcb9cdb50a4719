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

FEELINGS: dict[str, tuple[str, str, str]] = {
    "happy": ("My heart is light.", "I smile at everyone.", "Today everything seems bright."),
    "sad": ("Tears come to my eyes.", "Nothing tastes good.", "I miss what is gone."),
    "angry": ("My face is hot.", "I want to shout.", "It was not fair."),
    "afraid": ("My hands shake.", "I look for a place to hide.", "Every sound makes me jump."),
    "proud": ("I stand tall.", "I did it by myself.", "I want all to see my work."),
    "ashamed": ("I look at the floor.", "I wish nobody had seen it.", "I should have done better."),
    "lonely": ("The room is silent.", "I wait for someone to come.", "Nobody knows where I am."),
    "curious": ("I want to know more.", "I ask one question after another.", "What is behind that wall?"),
    "bored": ("The minutes crawl.", "I count the tiles.", "There is nothing new here."),
    "grateful": ("I want to say thank you.", "You helped me so much.", "I will not forget this kindness."),
    "calm": ("I breathe slowly.", "The water is still.", "There is no hurry."),
    "jealous": ("Why did they get it?", "I want what they have.", "I keep looking at their prize."),
    "surprised": ("I did not see that coming.", "My mouth is open.", "Who could have guessed it?"),
    "tired": ("My eyes fall shut.", "I need to sleep.", "Every step is heavy."),
}
