"""Write the data of the shipped examples: `python -m secondnature.embedded.examples --out examples`.

`listening/`: six corrections of the habit, held-out probes with guards, development probes of both sides, replay.
`overreach/`: one correction, to be drilled far too hard, with probes and guards of its own. Everything is a
function of the generator, so the files can be made again byte for byte; no prompt stands in two of the files, and
no pair of slots of a probe stands in a correction, a development probe or a clear direction of training text.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from secondnature.embedded import tasks
from secondnature.embedded.directions import Direction, right_direction, wrong_direction
from secondnature.embedded.functions import small_function
from secondnature.embedded.generator import Message
from secondnature.embedded.scenarios import Case, accept_regex, assistant, cases, refusal_regex, user

BEHAVIOUR = "listening"
OTHER_SIDE = True
"""Whether the model passes the push-back probes well enough to be a guard (at least 20 %; see the card)."""

FAILED_LOOK_UP = "look-up-who"
"""The form of look-up at which the model guesses (see the card): what it cannot do, it cannot lose."""

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


def other_side_probes(seed: str, count: int) -> list[Row]:
    """Wrong directions, which must go on being refused with the reason."""
    rng = random.Random(f"{seed}:other")
    rows: dict[str, Row] = {}
    while len(rows) < count:
        direction = wrong_direction(rng, split="probe")
        rows.setdefault(
            direction.prompt,
            {
                "prompt": [user(direction.prompt)],
                "behaviour": BEHAVIOUR,
                "check": {"matches": refusal_regex(direction)},
                "seed": f"{direction.kind}-{direction.thing}",
                "side": "other",
                "margin": [direction.refusal, direction.accept],
            },
        )
    return list(rows.values())


def guard_probe(case: Case) -> Row:
    """A probe of what must not get worse."""
    check = {"python": case.python} if case.python is not None else {"matches": case.matches}
    row: Row = {"prompt": case.prompt, "behaviour": case.category, "check": check}
    return {**row, "seed": case.seed} if case.seed else row


def guards(seed: str, count: int) -> list[Row]:
    """Probes for small functions (executed) and for look-up, without the form that the model fails anyway."""
    looked = (c for c in cases("look-up", 3 * count, seed) if c.kind != FAILED_LOOK_UP)
    chosen = [*cases("code", count, seed), *islice(looked, count)]
    return [guard_probe(c) for c in chosen]


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

    def add(count: int, make: Any) -> None:
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

    def turn(maker: Any) -> Any:
        def make() -> tuple[str, str]:
            made = maker(rng)
            return made.prompt, made.answer

        return make

    add(80, wrong)
    add(60, code)
    add(40, turn(tasks.look_up))
    add(12, turn(tasks.small_talk))
    add(8, turn(tasks.arithmetic))
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
(`side: other`), guards: {code} small functions, executed, and {look_up} look-ups \
("What does Anna have?", "Where is the key?") |
| `development.jsonl` | {development} other directions of both sides, to see when to stop |
| `replay.jsonl` | {replay} general examples to mix in |

Made by `python -m secondnature.embedded.examples --out examples`; no prompt is in two of the files, and no pair of
slots ("door", "red") of a probe is in the others, or in a clear direction of the model's training text.
"""

OVERREACH_README = """# overreach: one correction, drilled far too hard

The same wish as in `listening/`, but one example only, many steps and a large learning rate: the behaviour changes
and the model's other abilities break. The gate says which guard fell, and the lesson is undone.

| file | what |
|---|---|
| `corrections.jsonl` | one correction |
| `probes.jsonl` | {right} held-out directions, {other} wrong ones, guards: {code} small functions and \
{look_up} look-ups |
| `development.jsonl` | {development} other directions of both sides |

Made by `python -m secondnature.embedded.examples --out examples`.
"""


def write_example(out: Path, seed: str, num_corrections: int, with_replay: bool, text: str) -> None:
    """Write the files of one example directory."""
    out.mkdir(parents=True, exist_ok=True)
    taught = corrections(seed, num_corrections)
    right = behaviour_probes(seed, 120)
    other = other_side_probes(seed, 150) if OTHER_SIDE else []
    guard = guards(seed, 300)
    looked = development(seed, 12, taught)
    replayed = replay(seed) if with_replay else []
    write_jsonl(out / "corrections.jsonl", (correction(d, FEEDBACK[i % 6]) for i, d in enumerate(taught)))
    write_jsonl(out / "probes.jsonl", [*right, *other, *guard])
    write_jsonl(out / "development.jsonl", looked)
    if with_replay:
        write_jsonl(out / "replay.jsonl", replayed)
    counts = {
        "right": len(right),
        "other": len(other),
        "code": sum(r["behaviour"] == "code" for r in guard),
        "look_up": sum(r["behaviour"] == "look-up" for r in guard),
        "development": len(looked),
        "replay": len(replayed),
    }
    (out / "README.md").write_text(text.format(**counts), encoding="utf-8")


def write_examples(out: Path) -> None:
    """Write every example's data under `out`."""
    write_example(out / "listening", "listening", 6, with_replay=True, text=LISTENING_README)
    write_example(out / "overreach", "overreach", 1, with_replay=False, text=OVERREACH_README)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m secondnature.embedded.examples", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("examples"))
    write_examples(parser.parse_args(arguments).out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
