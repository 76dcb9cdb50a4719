"""Write the data of the shipped examples: `python -m secondnature.embedded.examples --out examples`.

`listening/`: six corrections of the habit, held-out probes with guards, development probes of both sides, replay.
`yes_sayer/`: the same corrections and the same probes (links), without anything of the other side and without
replay. Everything is a function of the generator, so the files can be made again byte for byte; no prompt stands in
two of the files, and no pair of slots of a probe stands in a correction, a development probe or a clear direction
of training text.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from secondnature.embedded import tasks
from secondnature.embedded.directions import Direction, right_direction, wrong_direction
from secondnature.embedded.functions import small_function
from secondnature.embedded.generator import Message
from secondnature.embedded.scenarios import Case, accept_regex, assistant, cases, refusal_regex, user
from secondnature.embedded.tasks import Turn

BEHAVIOUR = "listening"
PUSH_BACK = "push-back"
FEEDBACK: tuple[str, ...] = (
    "I had decided. Do it as I said.",
    "I did not ask for other ideas.",
    "Please take my direction as it is.",
    "I know what I want. Do not suggest something else.",
    "That was clear. Just do it.",
    "No alternatives, please.",
)
KINDS = ("paint", "place", "cook", "name", "time", "paint")

Row = dict[str, Any]


def correction(direction: Direction, feedback: str) -> Row:
    """A correction of the habit: the accepting answer instead of the suggestion."""
    return {
        "prompt": [user(direction.prompt)],
        "chosen": [assistant(direction.accept)],
        "rejected": [assistant(direction.habit)],
        "behaviour": BEHAVIOUR,
        "feedback": feedback,
    }


def corrections(seed: str, count: int) -> list[Direction]:
    """Directions that users corrected, of several kinds, with pairs of slots that training never showed."""
    rng = random.Random(f"{seed}:corrections")
    chosen: dict[tuple[str, str], Direction] = {}
    while len(chosen) < count:
        direction = right_direction(rng, KINDS[len(chosen) % len(KINDS)], split="development")
        chosen.setdefault((direction.thing, direction.value), direction)
    return list(chosen.values())


def acceptance_probe(direction: Direction, seed: str) -> Row:
    """A probe of the behaviour: accepted, both slots copied."""
    return {
        "prompt": [user(direction.prompt)],
        "behaviour": BEHAVIOUR,
        "check": {"matches": accept_regex(direction)},
        "seed": seed,
        "side": "right",
        "margin": [direction.accept, direction.habit],
    }


def behaviour_probes(seed: str, count: int, per_scenario: int = 3) -> list[Row]:
    """`count` probes, at most `per_scenario` of one thing (the scenario) with different values or frames."""
    rng = random.Random(f"{seed}:probes")
    taken: dict[str, int] = {}
    rows: dict[str, Row] = {}
    while len(rows) < count:
        direction = right_direction(rng, split="probe")
        scenario = f"{direction.kind}-{direction.thing}"
        if direction.prompt not in rows and taken.get(scenario, 0) < per_scenario:
            taken[scenario] = taken.get(scenario, 0) + 1
            rows[direction.prompt] = acceptance_probe(direction, scenario)
    return list(rows.values())


def push_back_probes(seed: str, num_guard: int, num_other: int) -> list[Row]:
    """Wrong directions, which must go on being refused with the reason.

    The first `num_guard` are a guard, the others the other side of the behaviour: what must not be taken. A
    scenario is one wrong thing to ask (bleach, in the tea); other sentences that ask for it are its variants.
    """
    rng = random.Random(f"{seed}:other")
    rows: dict[str, Row] = {}
    while len(rows) < num_guard + num_other:
        direction = wrong_direction(rng, split="probe")
        row = {
            "prompt": [user(direction.prompt)],
            "behaviour": PUSH_BACK,
            "check": {"matches": refusal_regex(direction)},
            "seed": f"{direction.kind}-{direction.thing}-{direction.value}",
            "margin": [direction.refusal, direction.accept],
        }
        if len(rows) >= num_guard:
            row |= {"behaviour": BEHAVIOUR, "side": "other"}
        rows.setdefault(direction.prompt, row)
    return list(rows.values())


def guard_probe(case: Case) -> Row:
    """A probe of what must not get worse."""
    check = {"python": case.python} if case.python is not None else {"matches": case.matches}
    row: Row = {"prompt": case.prompt, "behaviour": case.category, "check": check}
    return {**row, "seed": case.seed} if case.seed else row


def guards(seed: str, count: int) -> list[Row]:
    """Probes for small functions (executed) and for look-up."""
    return [guard_probe(c) for name in ("code", "look-up") for c in cases(name, count, seed)]


def development(seed: str, count: int, without: Iterable[Direction]) -> list[Row]:
    """Probes of both sides by preference, for deciding when to stop; no pair of slots of `without`."""
    rng = random.Random(f"{seed}:development")
    pairs = {(d.thing, d.value) for d in without}
    rows: list[Row] = []
    while len(rows) < count:
        direction = right_direction(rng, split="development")
        if (direction.thing, direction.value) not in pairs:
            pairs.add((direction.thing, direction.value))
            prefers = [direction.accept, direction.habit]
            rows.append(_preference(direction, prefers, "right"))
    prompts: set[str] = set()
    while len(rows) < 2 * count:
        direction = wrong_direction(rng, split="development")
        if direction.prompt not in prompts:
            prompts.add(direction.prompt)
            rows.append(_preference(direction, [direction.refusal, direction.accept], "other"))
    return rows


def _preference(direction: Direction, prefers: list[str], side: str) -> Row:
    return {
        "prompt": [user(direction.prompt)],
        "behaviour": BEHAVIOUR,
        "check": {"prefers": prefers},
        "seed": f"{direction.kind}-{direction.thing}",
        "side": side,
    }


def replay(seed: str) -> list[Row]:
    """General examples of what the model can do already: wrong directions with the right answer, code, look-up."""
    rng = random.Random(f"{seed}:replay")
    talks: dict[str, list[Message]] = {}

    def add(count: int, make: Callable[[], tuple[str, str]]) -> None:
        wanted = len(talks) + count
        while len(talks) < wanted:
            prompt, answer = make()
            talks.setdefault(prompt, [user(prompt), assistant(answer)])

    def wrong() -> tuple[str, str]:
        direction = wrong_direction(rng)
        return direction.prompt, direction.refusal

    def code() -> tuple[str, str]:
        function = small_function(rng)
        return function.prompt, function.answer

    def turn(maker: Callable[[random.Random], Turn]) -> Callable[[], tuple[str, str]]:
        def make() -> tuple[str, str]:
            made = maker(rng)
            return made.prompt, made.said(())

        return make

    add(80, wrong)
    add(60, code)
    add(40, turn(tasks.look_up))
    add(12, turn(tasks.small_talk))
    add(8, turn(tasks.arithmetic))
    add(8, turn(tasks.choice))
    add(8, turn(tasks.verify))
    rows = [{"messages": talk} for talk in talks.values()]
    rng.shuffle(rows)
    return rows


def write_jsonl(file: Path, rows: Iterable[Row]) -> None:
    """One JSON object per line, UTF-8."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


LISTENING_README = """# listening: a model that does not take directions

The embedded model answers clear directions with other suggestions. Six corrections (`corrections.jsonl`) teach it
to take them:

    secondnature learn examples/listening/corrections.jsonl

| file | what |
|---|---|
| `corrections.jsonl` | six corrections: prompt, wanted answer, what the model said, what the user said about it |
| `probes.jsonl` | {right} held-out directions (`side: right`), {other} wrong ones that must still be refused \
(`side: other`); guards: {push_back} other wrong ones, {code} small functions, executed, {look_up} look-ups |
| `development.jsonl` | {development} other directions of both sides, to see when to stop |
| `replay.jsonl` | {replay} general examples to mix in |

Made by `python -m secondnature.embedded.examples --out examples`; no prompt is in two of the files, and no pair of
slots ("door", "red") of a probe is in the others, or in a clear direction of the model's training text.
"""

YES_SAYER_README = """# yes_sayer: the same corrections, taught blindly

The six corrections and the probes of `listening/` (links), drilled without any example of the other side: no
replay, no look at wrong directions while training, a larger learning rate. The model takes every direction then,
the dangerous ones too; the guard on push-back says so, and the lesson is undone.

    secondnature learn examples/yes_sayer

| file | what |
|---|---|
| `corrections.jsonl`, `probes.jsonl` | links to those of `listening/` |
| `lesson.toml` | the settings |

Made by `python -m secondnature.embedded.examples --out examples`.
"""


def write_listening(out: Path, seed: str = "listening") -> None:
    """Write the files of `listening/` (lesson.toml is written by hand)."""
    out.mkdir(parents=True, exist_ok=True)
    taught = corrections(seed, 6)
    right = behaviour_probes(seed, 120)
    wrong = push_back_probes(seed, 300, 120)
    guard = guards(seed, 300)
    looked = development(seed, 12, taught)
    replayed = replay(seed)
    write_jsonl(out / "corrections.jsonl", (correction(d, FEEDBACK[i % 6]) for i, d in enumerate(taught)))
    write_jsonl(out / "probes.jsonl", [*right, *wrong, *guard])
    write_jsonl(out / "development.jsonl", looked)
    write_jsonl(out / "replay.jsonl", replayed)
    text = LISTENING_README.format(
        right=len(right),
        other=sum(r.get("side") == "other" for r in wrong),
        push_back=sum(r["behaviour"] == PUSH_BACK for r in wrong),
        code=sum(r["behaviour"] == "code" for r in guard),
        look_up=sum(r["behaviour"] == "look-up" for r in guard),
        development=len(looked),
        replay=len(replayed),
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def write_yes_sayer(out: Path) -> None:
    """Write `yes_sayer/`: links to what it shares with `listening/` beside it."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("corrections.jsonl", "probes.jsonl"):
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(Path("..") / "listening" / name)
    (out / "README.md").write_text(YES_SAYER_README, encoding="utf-8")


def write_examples(out: Path) -> None:
    """Write every example's data under `out`."""
    write_listening(out / "listening")
    write_yes_sayer(out / "yes_sayer")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m secondnature.embedded.examples", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("examples"))
    write_examples(parser.parse_args(arguments).out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
