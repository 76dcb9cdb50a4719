"""What has no single right answer: texts of feelings and imagined user turns, drawn from the model and judged.

A text of a feeling is judged by a classifier that was trained on the generator's training texts alone; its accuracy
on fresh texts of the generator is the ceiling. An imagined user turn is judged by the model itself: asked greedily
in a fresh conversation, it has to show the behaviour for which the turn was invented, and no other. The recognisers
of behaviours need no torch; drawing does.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secondnature.embedded import feelings, tasks
from secondnature.embedded import words as w
from secondnature.embedded.directions import KINDS, Split, split_of
from secondnature.embedded.feelings import FEELINGS
from secondnature.embedded.figures import figure
from secondnature.embedded.scenarios import user

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM

TEMPERATURES: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5)
"""At which user turns are imagined."""

_LABELS = "|".join(dict.fromkeys(kind.label for kind in KINDS.values()))
_TAIL = r"I like it when you ask me this\b.*"
SHOWS: dict[str, re.Pattern[str]] = {
    "alternatives": re.compile(r"^(How about|What about|Why not) .+ instead\?"),
    "hedging": re.compile(r"^Perhaps .*\bnot sure\b"),
    "apology": re.compile(r"^I am so sorry\b"),
    "length": re.compile(rf"^(Yes|No), [^.]+\. {_TAIL}$"),
    "push-back": re.compile(rf"^No, [^.]+( is dangerous, | cannot be both | is not ({_LABELS})\b)[^.]*\.$"),
}
"""How each behaviour of `tasks.BEHAVIOURS` looks in an answer; no text shows two of them.

Without its tail "No, red is not a dish." reads as push-back; in a fresh conversation the tail is the habit."""


def shows(behaviour: str, answer: str) -> bool:
    """Whether an answer shows the behaviour (push-back: says no and gives one of the reasons)."""
    return SHOWS[behaviour].search(answer.strip()) is not None


@dataclass(frozen=True, slots=True)
class FeelingClassifier:
    """Names the feeling of a text; knows the texts that it was trained on."""

    pipeline: Any
    """scikit-learn: words and pairs of words, weighted by rarity, then logistic regression."""
    trained_on: frozenset[str]

    def name(self, texts: Sequence[str]) -> list[str]:
        """The feeling of each text."""
        return [str(x) for x in self.pipeline.predict(list(texts))]


def fit_classifier(texts: Sequence[str], names: Sequence[str]) -> FeelingClassifier:
    """Train the classifier on texts and the feeling of each."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10.0, max_iter=1000))
    pipeline.fit(list(texts), list(names))
    return FeelingClassifier(pipeline, frozenset(texts))


def held_out_things(name: str) -> list[str]:
    """Things that no training text of this feeling is about: of held-out pairs, or else words that are held out."""
    pairs = [x for x in w.OBJECTS if x not in w.HELD_WORDS and split_of("feeling", name, x) != "train"]
    return pairs or [x for x in w.OBJECTS if x in w.HELD_WORDS]


def training_turns(seed: str, each: int) -> list[tasks.Turn]:
    """The generator's training requests and texts, `each` of every feeling."""
    rng = random.Random(f"{seed}:feelings:train")
    return [tasks.feeling(rng, name) for name in FEELINGS for _ in range(each)]


def held_out_turns(seed: str, each: int) -> list[tasks.Turn]:
    """Requests about held-out pairs of feeling and thing with the generator's text, `each` of every feeling."""
    rng = random.Random(f"{seed}:feelings:held-out")
    turns: list[tasks.Turn] = []
    for name in FEELINGS:
        things = held_out_things(name)
        for i in range(each):
            thing = things[i % len(things)]
            turns.append(tasks.Turn(feelings.prompt(rng, name, thing), feelings.text(rng, name, thing), name))
    return turns


def names_itself(name: str, text: str) -> bool:
    """Whether the text says which feeling it is."""
    return re.search(rf"\b{name}\b", text, re.IGNORECASE) is not None


def _thing(prompt: str) -> str | None:
    return next((x for x in w.OBJECTS if re.search(rf"\bthe {x}\b", prompt)), None)


def judge_feelings(
    turns: Sequence[tasks.Turn], texts: Sequence[str], classifier: FeelingClassifier
) -> dict[str, Any]:
    """Figures of texts that were written at the request of `turns`, in the same order."""
    guessed = classifier.name(texts)
    right = [g == t.kind for g, t in zip(guessed, turns, strict=True)]
    by_feeling = {
        name: figure([r for r, t in zip(right, turns, strict=True) if t.kind == name])
        for name in sorted({t.kind for t in turns})
    }
    things = [(_thing(t.prompt), x) for t, x in zip(turns, texts, strict=True)]
    return {
        **figure(right),
        "feelings": by_feeling,
        "names_its_feeling": sum(names_itself(t.kind, x) for t, x in zip(turns, texts, strict=True)),
        "verbatim_in_training_texts": figure([x in classifier.trained_on for x in texts]),
        "names_the_thing": figure([thing is None or thing in x for thing, x in things]),
        "different_texts": len(set(texts)),
    }


def measure_feelings(
    model: Qwen3_5ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    num_texts: int = 300,
    seed: str = "evaluation",
    train_each: int = 150,
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Texts at temperature 1 on held-out pairs of feeling and thing, at least `num_texts`: figures, misread."""
    from secondnature.embedded.answers import sample

    trained = training_turns(seed, train_each)
    classifier = fit_classifier([t.answer for t in trained], [t.kind for t in trained])
    turns = held_out_turns(seed, -(-num_texts // len(FEELINGS)))
    texts = sample(model, tokenizer, [[user(t.prompt)] for t in turns], temperature=1.0, seed=0)
    guessed = classifier.name([t.answer for t in turns])
    found = judge_feelings(turns, texts, classifier)
    found["ceiling"] = figure([g == t.kind for g, t in zip(guessed, turns, strict=True)])
    found |= {"temperature": 1.0, "classifier_texts": len(trained)}
    misread = [
        {"category": "feelings", "held_out": "combination", "kind": t.kind, "prompt": t.prompt, "answer": x,
         "wanted": f"a text of: {t.kind} (read as {g})"}
        for t, x, g in zip(turns, texts, classifier.name(texts), strict=True) if g != t.kind
    ]  # fmt: skip
    return found, misread[:5]


def _slots(pattern: str, turn: str) -> tuple[str, str] | None:
    match = re.search(pattern, turn, re.IGNORECASE)
    return (match[1], match[2]) if match else None


def _any_of(words: Sequence[str]) -> str:
    return "(" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


def _direction_split(turn: str) -> Split | None:
    for kind in KINDS.values():
        things, values = _any_of(kind.things), _any_of(kind.values)
        for phrase in kind.phrases:
            # the value stands first in "cook {v} for {t}"
            parts = re.split(r"\{[tv]\}", phrase)
            value_first = phrase.index("{v}") < phrase.index("{t}")
            first, second = (values, things) if value_first else (things, values)
            found = _slots(rf"\b{parts[0]}{first}{parts[1]}{second}\b", turn)
            if found:
                thing, value = (found[1], found[0]) if value_first else found
                return split_of(kind.name, thing, value)
    return None


def _choice_split(turn: str) -> Split | None:
    every = _any_of([x for words in w.KINDS_OF_WORDS.values() for x in words])
    found = _slots(rf"\b{every} or {every}\b", turn)
    kind = next((k for k in w.KINDS_OF_WORDS if re.search(rf"\b{k}\b", turn)), None)
    if not found or not kind:
        return None
    right = [x for x in found if x in w.KINDS_OF_WORDS[kind]]
    wrong = [x for x in found if x not in right]
    return split_of("choice", right[0], wrong[0]) if right and wrong else None


def _verify_split(turn: str) -> Split | None:
    every = _any_of([x for words in w.KINDS_OF_WORDS.values() for x in words])
    found = _slots(rf"\b{every} (?:is )?{_any_of(list(w.KINDS_OF_WORDS))}\b", turn)
    return split_of("verify", *found) if found else None


_PARSERS: dict[str, Callable[[str], Split | None]] = {
    "alternatives": _direction_split,
    "hedging": _direction_split,
    "apology": _choice_split,
    "length": _verify_split,
}


def imagined_split(behaviour: str, turn: str) -> Split | None:
    """Which split the slots of an imagined turn belong to; None where they cannot be told (push-back: always)."""
    parse = _PARSERS.get(behaviour)
    return parse(turn) if parse else None


def judge_imagined(behaviour: str, turns: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """Figures of the imagined turns of one behaviour and of the model's answers to them."""
    splits = [x for x in (imagined_split(behaviour, t) for t in turns) if x is not None]
    return {
        **figure([shows(behaviour, a) for a in answers]),
        "different": len(set(turns)),
        "different_that_show_it": len(
            {t for t, a in zip(turns, answers, strict=True) if shows(behaviour, a)}
        ),
        "slots_told": len(splits),
        "slots_held_out": sum(x != "train" for x in splits),
    }


def measure_imagination(
    model: Qwen3_5ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    each: int = 60,
    seed: str = "evaluation",
    temperatures: Sequence[float] = TEMPERATURES,
    say: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """One row per temperature and behaviour: `each` imagined turns and what the model then does."""
    from secondnature.embedded.answers import greedy, sample

    rng = random.Random(f"{seed}:imagine")
    asked = [(b, tasks.imagine(rng, b).prompt) for b in tasks.BEHAVIOURS for _ in range(each)]
    known: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    for number, temperature in enumerate(temperatures):
        turns = sample(model, tokenizer, [[user(p)] for _, p in asked], temperature, seed=number)
        fresh = [t for t in dict.fromkeys(turns) if t not in known]
        known |= dict(zip(fresh, greedy(model, tokenizer, [[user(t)] for t in fresh]), strict=True))
        for behaviour in tasks.BEHAVIOURS:
            own = [t for (b, _), t in zip(asked, turns, strict=True) if b == behaviour]
            judged = judge_imagined(behaviour, own, [known[t] for t in own])
            rows.append({"behaviour": behaviour, "temperature": temperature, **judged, "examples": own[:3]})
        if say:
            shown = sum(r["passed"] for r in rows[-len(tasks.BEHAVIOURS) :])
            say(
                f"imagined user turns at temperature {temperature:g}: {shown} of {len(asked)} show the behaviour"
            )
    return rows
