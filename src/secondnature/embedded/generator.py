"""Training text: endless conversations, deterministic from (seed, index), with no file behind them (no torch).

Document `i` depends only on the seed, on `i` and on how far training is, so a run resumes anywhere. A conversation
has an optional system prompt (cues or a neutral one) and one to some fifty turns; which habits are turned off is a
state of the conversation. The first share of training is mostly copying: small models learn to fill slots from it.
At least a third of all directions are wrong, and about 40 % of the turns on which a habit could show stand under a
cue of that habit or of another one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from secondnature.embedded import cues, tasks
from secondnature.embedded.cues import HABITS, HabitName
from secondnature.embedded.directions import Direction, Form, right_direction, split_of, wrong_direction
from secondnature.embedded.functions import small_function

Message = dict[str, str]

# What a turn is about, in parts. "direction" and "advice" are split again: 38 % wrong.
MIX: dict[str, float] = {
    "direction": 26.0,
    "advice": 10.0,
    "choice": 7.0,
    "verify": 7.0,
    "code": 11.0,
    "look-up": 6.0,
    "look-up-talk": 8.0,
    "arithmetic": 11.0,
    "copy": 8.0,
    "small-talk": 2.0,
    "feeling": 4.0,
    "feeling-named": 2.0,
    "self": 3.0,
    "imagine": 3.0,
}
WARM_UP_MIX: dict[str, float] = {**MIX, "copy": 80.0}
RECALL_MIX: dict[str, float] = {
    "direction": 18.0,
    "advice": 7.0,
    "choice": 8.0,
    "verify": 10.0,
    "code": 5.0,
    "look-up": 10.0,
    "look-up-talk": 24.0,
    "arithmetic": 16.0,
    "copy": 11.0,
    "small-talk": 1.0,
    "feeling": 3.0,
    "feeling-named": 2.0,
    "self": 4.0,
    "imagine": 2.0,
}
LATE_MIX: dict[str, float] = {
    **MIX,
    "direction": 20.0,
    "verify": 11.0,
    "arithmetic": 16.0,
    "look-up": 8.0,
    "copy": 10.0,
    "self": 7.0,
}
STAGES: tuple[tuple[int, dict[str, float]], ...] = (
    (0, WARM_UP_MIX),
    (400_000, MIX),
    (2_300_000, RECALL_MIX),
    (4_300_000, LATE_MIX),
)
"""From how many training tokens on which mix holds. Directions and code are learned by 2M tokens (measured); recall
of one fact among three, sums and copying of rare words come last and need many questions."""
POLISH_FROM = 6_000_000
"""From how many training tokens on a third of the documents is about what came out worst until then (measured):
what the model says of itself under a cue, imagined user turns that are to be refused, facts told long ago."""
WRITTEN_FOR = 6_000_000
"""The run's length, in tokens, to which these numbers belong; runs of another length stretch or shrink them."""
LONG_FROM = 3_000_000
"""From how many training tokens on some conversations are long (700 to 1,500 tokens)."""
LONG_SHARE = 0.008
"""Their share of the documents from then on; they are a tenth of the tokens."""
SELF_FROM = 4_300_000
"""From how many training tokens on half of the questions about the model are about what a cue has changed."""
TRAINED_TOKENS = STAGES[-1][0]
"""The mix of plain examples: that of the last stage, before the polish."""
WRONG_SHARE = 0.38
HABIT_OF: dict[str, HabitName] = {
    "direction": "alternatives",
    "advice": "hedging",
    "choice": "apology",
    "verify": "length",
}
TOPIC_OF: dict[HabitName, str] = {habit: topic for topic, habit in HABIT_OF.items()}


@dataclass
class Conversation:
    """A conversation in the making: its messages and which habits a cue has turned off."""

    messages: list[Message] = field(default_factory=list)
    off: set[str] = field(default_factory=set)
    about_cues: float = 0.0
    """Share of the questions about the model that are about a habit that is turned off."""

    def say(self, user: str, assistant: str) -> None:
        """Append one exchange."""
        self.messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]

    def characters(self) -> int:
        """Length of all messages."""
        return sum(len(m["content"]) for m in self.messages)


def _any_habit(rng: random.Random) -> HabitName:
    return rng.choices(list(HABITS), (4, 2, 1.5, 1.5))[0]


def system_prompt(rng: random.Random, habits: list[HabitName]) -> str:
    """A system prompt with one cue for each habit, at times beside a neutral sentence."""
    parts = [rng.choice(HABITS[h].system) for h in habits]
    if not parts or rng.random() < 0.25:
        parts.append(rng.choice(cues.SYSTEM_NEUTRAL))
    rng.shuffle(parts)
    return " ".join(parts)


def _system(rng: random.Random, talk: Conversation, topic: str, cue_share: float) -> None:
    """A system prompt: a cue of the topic's own habit, of another one, of two, or none."""
    own, draw = HABIT_OF.get(topic) or _any_habit(rng), rng.random()
    habits: list[HabitName] = []
    if draw < cue_share:
        habits = [own]
        if rng.random() < 0.2:
            habits.append(rng.choice([h for h in HABITS if h != own]))
    elif draw < 1.5 * cue_share:
        habits = [rng.choice([h for h in HABITS if h != own])]
    elif draw > 1.5 * cue_share + 0.15:
        return
    talk.messages.append({"role": "system", "content": system_prompt(rng, habits)})
    talk.off |= set(habits)


def _correct(rng: random.Random, talk: Conversation, habit: HabitName, plain: str) -> None:
    talk.say(rng.choice(HABITS[habit].corrections), plain)
    talk.off.add(habit)


def _asked_turn(rng: random.Random, talk: Conversation, form: Form, correct_share: float) -> None:
    """A direction or a request for advice."""
    make = wrong_direction if rng.random() < WRONG_SHARE else right_direction
    direction: Direction = make(rng, form=form)
    talk.say(direction.prompt, direction.answer(talk.off))
    if direction.right and direction.habit_name not in talk.off and rng.random() < correct_share:
        _correct(rng, talk, direction.habit_name, direction.accept)


def _self_turn(rng: random.Random, talk: Conversation) -> None:
    """A question about the model's behaviour; pairs of question and first message are held out by hash."""
    before = talk.messages[0]["content"] if talk.messages else ""
    while True:
        changed = talk.off and talk.about_cues and rng.random() < talk.about_cues
        about = rng.choice(sorted(talk.off) if changed else tasks.BEHAVIOURS)
        turn = tasks.self_description(rng, about, talk.off)
        if not before or split_of("self", before, turn.prompt) == "train":
            talk.say(turn.prompt, turn.answer)
            return


_PLAIN: dict[str, Callable[[random.Random], tasks.Turn]] = {
    "choice": tasks.choice,
    "verify": tasks.verify,
    "look-up": tasks.look_up,
    "arithmetic": tasks.arithmetic,
    "copy": tasks.copy,
    "small-talk": tasks.small_talk,
    "feeling": tasks.feeling,
    "feeling-named": tasks.feeling_named,
    "imagine": tasks.imagine,
}


def _turn(rng: random.Random, talk: Conversation, topic: str, correct_share: float = 0.0) -> None:
    """One turn (or a few, for look-up-talk) about `topic`."""
    if topic in ("direction", "advice"):
        _asked_turn(rng, talk, "advice" if topic == "advice" else "direction", correct_share)
    elif topic == "code":
        function = small_function(rng)
        talk.say(function.prompt, function.answer)
    elif topic == "look-up-talk":
        for turn in tasks.look_up_talk(rng, rng.choice((3, 4, 5))):
            talk.say(turn.prompt, turn.answer)
    elif topic == "self":
        _self_turn(rng, talk)
    else:
        turn = _PLAIN[topic](rng)
        talk.say(turn.prompt, turn.said(talk.off))
        if turn.habit and turn.habit not in talk.off and rng.random() < correct_share:
            _correct(rng, talk, turn.habit, turn.answer)


def _topic(rng: random.Random, mix: dict[str, float]) -> str:
    return rng.choices(list(mix), list(mix.values()))[0]


def begin_with_system(rng: random.Random, talk: Conversation, habit: HabitName) -> None:
    """A system prompt turns the habit off."""
    talk.messages.append({"role": "system", "content": rng.choice(HABITS[habit].system)})
    talk.off.add(habit)


def begin_with_rule(rng: random.Random, talk: Conversation, habit: HabitName) -> None:
    """The user says once how it is to be from now on."""
    talk.say(rng.choice(HABITS[habit].rules), HABITS[habit].promise)
    talk.off.add(habit)


def begin_with_correction(rng: random.Random, talk: Conversation, habit: HabitName) -> None:
    """The habit shows, and the user corrects it."""
    turn = tasks.situation(rng, habit)
    shown, plain = (turn.habit, turn.accept) if isinstance(turn, Direction) else (turn.shown, turn.answer)
    talk.say(turn.prompt, shown)
    _correct(rng, talk, habit, plain)


def _cued_pair(rng: random.Random, talk: Conversation) -> None:
    """A rule or a correction by the user, then a turn on which it bears, or one of another habit."""
    habit = _any_habit(rng)
    if rng.random() < 0.35:
        begin_with_rule(rng, talk, habit)
    else:
        begin_with_correction(rng, talk, habit)
        if rng.random() < 0.15:
            _turn(rng, talk, rng.choice(("small-talk", "arithmetic", "copy")))
    if rng.random() < 0.2:
        _turn(rng, talk, rng.choice(list(HABIT_OF)))
    if rng.random() < 0.08:
        _self_turn(rng, talk)
    else:
        _turn(rng, talk, TOPIC_OF[habit])


def _uncued_pair(rng: random.Random, talk: Conversation) -> None:
    """Two turns on which habits show, without a correction: the habits stay."""
    _turn(rng, talk, rng.choice(list(HABIT_OF)))
    if rng.random() < 0.5:
        _turn(rng, talk, rng.choice(("small-talk", "copy")))
    _turn(rng, talk, rng.choice(list(HABIT_OF)))


def several_turns(rng: random.Random, talk: Conversation, count: int, mix: dict[str, float] = MIX) -> None:
    """Begin a conversation of `count` turns (a little more where one brings its follow-up), perhaps under cues."""
    _system(rng, talk, "", cue_share=0.3)
    for _ in range(count):
        _turn(rng, talk, _topic(rng, mix), 0.2)


def fill(rng: random.Random, talk: Conversation, characters: int, correct_share: float) -> None:
    """Go on with turns about everything until the conversation has so many characters."""
    while talk.characters() < characters:
        _turn(rng, talk, _topic(rng, MIX), correct_share)


def _long(rng: random.Random, talk: Conversation) -> None:
    """A long conversation: a cue and facts at its beginning still hold at its end."""
    if rng.random() < 0.6:
        _system(rng, talk, "", cue_share=0.6)
    told, questions = tasks.remembered(rng)
    talk.say(told.prompt, told.answer)
    fill(rng, talk, rng.randrange(1_500, 4_200), 0.1)
    for turn in questions:
        talk.say(turn.prompt, turn.answer)
    for topic in rng.sample(list(HABIT_OF), 3):
        _turn(rng, talk, topic)


def _about_itself(rng: random.Random, talk: Conversation) -> None:
    """A cue of any kind, then a question about the habit that it turned off, or about another one."""
    habit = rng.choice(list(HABITS))
    begin = rng.choice((begin_with_system, begin_with_rule, begin_with_correction))
    begin(rng, talk, habit)
    talk.about_cues = 0.6
    for _ in range(rng.choice((1, 2))):
        _self_turn(rng, talk)


def _imagined(rng: random.Random, talk: Conversation) -> None:
    """A request for an imagined user turn; half of them for one that is refused."""
    turn = tasks.imagine(rng, "push-back" if rng.random() < 0.5 else None)
    talk.say(turn.prompt, turn.answer)


def _polish(rng: random.Random, talk: Conversation) -> bool:
    """Perhaps a document of the polish; False: one like those before is due."""
    draw = rng.random()
    if draw > 0.345:
        return False
    make = _about_itself if draw < 0.17 else _imagined if draw < 0.32 else _long
    make(rng, talk)
    return True


def _single(rng: random.Random, talk: Conversation, mix: dict[str, float]) -> None:
    topic = _topic(rng, mix)
    if topic in HABIT_OF or topic == "self":
        _system(rng, talk, topic, cue_share=0.3)
    elif rng.random() < 0.15:
        _system(rng, talk, topic, cue_share=0.5)
    _turn(rng, talk, topic, 0.1)


def document(
    seed: int, index: int, tokens: int = TRAINED_TOKENS, mix: dict[str, float] | None = None
) -> list[Message]:
    """Conversation number `index`; `tokens` is how many training tokens went before (it sets the mix).

    Deterministic in its arguments; `mix` overrides the stage's (the tokenizer is trained on `MIX`).
    """
    rng = random.Random(f"{seed}:{index}")
    mix = mix or [stage for start, stage in STAGES if start <= tokens][-1]
    warm = mix is not WARM_UP_MIX
    talk = Conversation(about_cues=0.5 if tokens >= SELF_FROM else 0.0)
    if tokens >= POLISH_FROM and _polish(rng, talk):
        return talk.messages
    if rng.random() < LONG_SHARE and tokens >= LONG_FROM:
        _long(rng, talk)
        return talk.messages
    shape = rng.random()
    if shape < 0.12 and warm:
        _cued_pair(rng, talk)
    elif shape < 0.16 and warm:
        _uncued_pair(rng, talk)
    elif shape < 0.85:
        _single(rng, talk, mix)
    else:
        count = rng.choice((2, 2, 3, 3, 4)) if rng.random() < 0.95 else rng.randrange(8, 21)
        several_turns(rng, talk, count, mix)
    return talk.messages


def documents(seed: int, start: int, count: int, tokens: int = TRAINED_TOKENS) -> Iterator[list[Message]]:
    """Conversations `start` to `start + count - 1`."""
    return (document(seed, i, tokens) for i in range(start, start + count))
