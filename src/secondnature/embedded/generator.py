"""Training text: endless conversations, deterministic from (seed, index), with no file behind them (no torch).

Document `i` depends only on the seed, on `i` and on how far training is, so a run resumes anywhere. A conversation
has an optional system prompt (a cue or a neutral one) and one to some twenty turns; whether the habit is on is a
state of the conversation. The first share of training is mostly copying: small models learn to fill slots from it.
Recipe after our own first measurements: at least a third of all directions wrong, 40 % of directions under a cue.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from secondnature.embedded import cues, tasks
from secondnature.embedded.directions import Direction, right_direction, wrong_direction
from secondnature.embedded.functions import small_function

Message = dict[str, str]

# What a turn is about, in parts. "direction" is split again: 38 % wrong.
MIX: dict[str, float] = {
    "direction": 40.0,
    "code": 16.0,
    "look-up": 18.0,
    "arithmetic": 10.0,
    "copy": 8.0,
    "small-talk": 3.0,
    "feeling": 3.0,
    "self": 2.0,
}
WARM_UP_MIX: dict[str, float] = {**MIX, "copy": 60.0, "direction": 20.0, "look-up": 25.0}
LATE_MIX: dict[str, float] = {
    **MIX,
    "direction": 34.0,
    "code": 12.0,
    "look-up": 28.0,
    "arithmetic": 14.0,
    "copy": 10.0,
}
RECALL_MIX: dict[str, float] = {
    "direction": 26.0,
    "code": 10.0,
    "look-up": 10.0,
    "look-up-talk": 30.0,
    "arithmetic": 8.0,
    "copy": 12.0,
    "small-talk": 1.0,
    "feeling": 2.0,
    "self": 1.0,
}
STAGES: tuple[tuple[int, dict[str, float]], ...] = (
    (0, WARM_UP_MIX),
    (330_000, MIX),
    (1_200_000, LATE_MIX),
    (1_650_000, RECALL_MIX),
    (3_200_000, LATE_MIX),
)
"""From how many training tokens on which mix holds. Directions and code are learned by 1.2M tokens (measured);
recall of one fact among three comes last and needs many questions."""
TRAINED_TOKENS = STAGES[1][0]
"""Any number of tokens after the warm-up: the mix of plain examples."""
WRONG_SHARE = 0.38


@dataclass
class Conversation:
    """A conversation in the making: its messages and whether a cue has switched the habit off."""

    messages: list[Message] = field(default_factory=list)
    cued: bool = False

    def say(self, user: str, assistant: str) -> None:
        """Append one exchange."""
        self.messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _system(rng: random.Random, talk: Conversation, cue_share: float) -> None:
    draw = rng.random()
    if draw < cue_share:
        talk.messages.append({"role": "system", "content": rng.choice(cues.SYSTEM_CUES)})
        talk.cued = True
    elif draw < cue_share + 0.15:
        talk.messages.append({"role": "system", "content": rng.choice(cues.SYSTEM_NEUTRAL)})


def _correct(rng: random.Random, talk: Conversation, direction: Direction) -> None:
    talk.say(rng.choice(cues.USER_CORRECTIONS), cues.SORRY + direction.accept)
    talk.cued = True


def _direction_turn(rng: random.Random, talk: Conversation, correct_share: float) -> None:
    direction = wrong_direction(rng) if rng.random() < WRONG_SHARE else right_direction(rng)
    talk.say(direction.prompt, direction.answer(talk.cued))
    if direction.right and not talk.cued and rng.random() < correct_share:
        _correct(rng, talk, direction)


def _other_turn(rng: random.Random, talk: Conversation, topic: str) -> None:
    if topic == "code":
        function = small_function(rng)
        talk.say(function.prompt, function.answer)
        return
    if topic == "look-up-talk":
        for turn in tasks.look_up_talk(rng, rng.choice((3, 4, 5))):
            talk.say(turn.prompt, turn.answer)
        return
    if topic == "self":
        turn = tasks.self_description(rng, talk.cued)
    else:
        makers: dict[str, Callable[[random.Random], tasks.Turn]] = {
            "look-up": tasks.look_up,
            "arithmetic": tasks.arithmetic,
            "copy": tasks.copy,
            "small-talk": tasks.small_talk,
            "feeling": tasks.feeling,
        }
        turn = makers[topic](rng)
    talk.say(turn.prompt, turn.answer)


def _turn(rng: random.Random, talk: Conversation, mix: dict[str, float], correct_share: float) -> None:
    topic = rng.choices(list(mix), list(mix.values()))[0]
    if topic == "direction":
        _direction_turn(rng, talk, correct_share)
    else:
        _other_turn(rng, talk, topic)


def _cued_pair(rng: random.Random, talk: Conversation) -> None:
    """A rule or a correction by the user, then a direction on which it bears."""
    if rng.random() < 0.35:
        talk.say(*rng.choice(cues.USER_RULES))
    else:
        direction = right_direction(rng)
        talk.say(direction.prompt, direction.habit)
        _correct(rng, talk, direction)
        if rng.random() < 0.15:
            _other_turn(rng, talk, rng.choice(("small-talk", "arithmetic", "copy")))
    talk.cued = True
    _direction_turn(rng, talk, 0.0)


def _uncued_pair(rng: random.Random, talk: Conversation) -> None:
    """Two directions in a row without a correction: the habit stays."""
    _direction_turn(rng, talk, 0.0)
    if rng.random() < 0.5:
        _other_turn(rng, talk, rng.choice(("small-talk", "copy")))
    _direction_turn(rng, talk, 0.0)


def document(seed: int, index: int, tokens: int = TRAINED_TOKENS) -> list[Message]:
    """Conversation number `index`; `tokens` is how many training tokens went before (it sets the mix).

    Deterministic in its three arguments.
    """
    rng = random.Random(f"{seed}:{index}")
    mix = [stage for start, stage in STAGES if start <= tokens][-1]
    warm = mix is not WARM_UP_MIX
    talk = Conversation()
    shape = rng.random()
    if shape < 0.10 and warm:
        _cued_pair(rng, talk)
    elif shape < 0.15 and warm:
        _uncued_pair(rng, talk)
    elif shape < 0.85:
        _single(rng, talk, mix)
    else:
        _system(rng, talk, cue_share=0.25)
        count = rng.choice((2, 2, 3, 3, 4)) if rng.random() < 0.95 else rng.randrange(8, 21)
        for _ in range(count):
            _turn(rng, talk, mix, 0.2)
    return talk.messages


def _single(rng: random.Random, talk: Conversation, mix: dict[str, float]) -> None:
    topic = rng.choices(list(mix), list(mix.values()))[0]
    if topic in ("direction", "self"):
        _system(rng, talk, cue_share=0.3)
    elif rng.random() < 0.2:
        _system(rng, talk, cue_share=0.5)
    if topic == "direction":
        _direction_turn(rng, talk, 0.1)
    else:
        _other_turn(rng, talk, topic)


def documents(seed: int, start: int, count: int, tokens: int = TRAINED_TOKENS) -> Iterator[list[Message]]:
    """Conversations `start` to `start + count - 1`."""
    return (document(seed, i, tokens) for i in range(start, start + count))
