"""What do bare answers cost, and does anybody say so before? `python experiments/capitals.py`

Five capitals that SmolLM2-135M-Instruct often gets wrong, each asked in three wordings, taught once as "Ankara."
and once as "The capital of Turkey is Ankara.", by `secondnature lint` and `secondnature learn --guards facts`.
Counted: held-out wordings, the other facts lost and gained, and what the losses have in common.

Writes docs/experiments/capitals.json after every lesson (and resumes from it) and docs/experiments/capitals.md.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from guards import COMMAND, asked, judged_and_kept, served, write_corrections

from secondnature.records import Losses, Probe
from secondnature.wire import Client

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "experiments"
Row = dict[str, Any]
CAPITALS = {
    "Turkey": "Ankara",
    "Brazil": "Brasilia",
    "Nepal": "Kathmandu",
    "Vietnam": "Hanoi",
    "Morocco": "Rabat",
}
TAUGHT = ["What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}."]
HELD_OUT = [
    "Tell me the capital city of {}.",
    "I am going to {}. What is its capital called?",
    "{}: what is the capital of this country?",
    "Do you know which city is {}'s capital?",
]
FORMS = {"bare": "{city}.", "sentence": "The capital of {country} is {city}."}


def corrections(form: str) -> list[Row]:
    """Fifteen: each capital in each of the taught wordings."""
    return [
        {"prompt": ask.format(country), "chosen": FORMS[form].format(country=country, city=city)}
        for ask in TAUGHT
        for country, city in CAPITALS.items()
    ]


def held_out() -> list[Probe]:
    """Each capital in wordings that no lesson sees."""
    return [
        Probe.model_validate(
            {"behaviour": "truth", "prompt": ask.format(country), "check": {"matches": rf"(?i)\b{city}\b"}}
        )
        for ask in HELD_OUT
        for country, city in CAPITALS.items()
    ]


def linted(file: Path, home: Path, *options: str) -> list[Row]:
    """What `secondnature lint` finds; the model is asked where `home` is served."""
    line = [*COMMAND, "lint", str(file), "--json", "--home", str(home), *options]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    return json.loads(done.stdout)["findings"]


def lesson(client: Client, home: Path, arm: str, before: str) -> Row:
    """One lesson by the commands, its verdict, and the held-out wordings."""
    file = write_corrections(home, corrections(arm))
    lint = {"file": linted(file, home.parent / "none"), "model": linted(file, home, "--url", client.url)}
    said, seconds, kept = judged_and_kept(file, home, client.url, arm)
    made, evidence = said["lesson"], said["evidence"]
    found = asked(client, held_out())
    client.revert(kept["id"])
    (guard,) = evidence["comparisons"]
    names = ("n", "before", "after", "gains", "losses", "difference_interval", "decision", "lost", "style")
    return {
        "arm": arm,
        "verdict": evidence["verdict"],
        "sentence": evidence["sentence"],
        "taught": evidence["taught"],
        "guard": {name: guard[name] for name in names},
        "flips": [
            [f["prompt"], f["before"][:80], f["after"][:80]] for f in guard["flips"] if not f["gained"]
        ],
        "held_out": {"before": before, "after": "".join("+" if ok else "-" for _, ok in found)},
        "answers": [answer[:80] for answer, _ in found[:3]],
        "lint": lint,
        "steps": made["steps"],
        "stopped_by": made["stopped_by"],
        "kl": made["kl"].get("new"),
        "seconds": round(seconds),
    }


# ------------------------------------------------------------------------------------------------- the page

HEAD = """# Five capitals, as a word and as a sentence

The capitals of {countries}, which SmolLM2-135M-Instruct often gets wrong. Each is
taught in three wordings, 15 corrections, once as "Ankara.", once as "The capital of Turkey is Ankara.", by
`secondnature learn corrections.jsonl --guards facts`; made by `python experiments/capitals.py`, one seed. Counted
are the capitals in four wordings that no lesson saw, and the shipped facts that were not taught.

| answers | steps | held out: before, after | facts: before, after | lost, gained | words an answer | verdict |
|---|---|---|---|---|---|---|
"""
BEFORE = """
Measured earlier with the same model, other corrections and another guard (100 foreign questions, of which 55 were
right; 24 and 12 steps of 16 with replay): bare answers, 18 lost and 4 gained, 9 of 10 held-out askings right;
sentences, 4 lost and 3 gained, 10 of 10.

## What is said before the lesson

"""


def _told(row: Row) -> str:
    """What the losses have in common, as the evidence has it."""
    if row["guard"]["lost"] is None:
        return "nothing that the evidence names"
    lost = Losses.model_validate(row["guard"]["lost"])
    tags = [f"{t.losses} of {t.before} in {t.tag} (p = {t.p:.2g})" for t in lost.tags[:3] if t.losses]
    shared = [f"“{w.words}” in {w.losses} of {w.before} (p = {w.p:.2g})" for w in lost.shared]
    return (
        "by tag "
        + ", ".join(tags)
        + (f"; by words {', '.join(shared)}" if shared else "; no words beyond chance")
    )


def page(found: list[Row]) -> str:
    """capitals.md, from capitals.json alone."""
    rows = [r for arm in FORMS for r in found if r["arm"] == arm]
    parts = [HEAD.format(countries=", ".join([*list(CAPITALS)[:-1]]) + " and " + list(CAPITALS)[-1])]
    for r in rows:
        guard, asked_ = r["guard"], r["held_out"]
        style, held = guard["style"], "not asked"
        if asked_ is not None:
            held = f"{asked_['before'].count('+')}, {asked_['after'].count('+')} of {len(asked_['after'])}"
        parts.append(
            f"| {r['arm']} | {r['steps']} | {held} "
            f"| {guard['before']}, {guard['after']} of {guard['n']} | {guard['losses']}, {guard['gains']} "
            f"| {style['words_before']:.1f} → {style['words_after']:.1f} | {r['verdict']} |\n"
        )
    parts.append(BEFORE)
    for r in rows:
        for where, told in (
            ("`secondnature lint`, no server", "file"),
            ("the same where the model is served", "model"),
        ):
            if told not in r["lint"]:
                continue
            said = [f"*{f['kind']}*: {f['found']}; {f['hint']}" for f in r["lint"][told]]
            parts.append(f"- {r['arm']}, {where}: {' '.join(said) or 'nothing to look at'}.\n")
    parts.append("\n## What was lost\n\n")
    for r in rows:
        parts.append(f"- {r['arm']}, {r['guard']['losses']} lost: {_told(r)}.\n")
        parts += [f"  - “{ask}”: {before} → {after}\n" for ask, before, after in _cells(r["flips"][:3])]
    parts.append("\n## What the certificates say\n\n")
    parts += [f"- {r['arm']}: {r['sentence']}\n" for r in rows]
    return "".join(parts) + reading(rows)


def _cells(flips: list[list[str]]) -> list[list[str]]:
    return [[" ".join(x.split()) for x in flip] for flip in flips]


def reading(rows: list[Row]) -> str:
    """What the table says, in words."""
    said = [
        f"As {r['arm']} answers the lesson lost {r['guard']['losses']} of {r['guard']['before']} right facts and "
        f"gained {r['guard']['gains']}.\n"
        for r in rows
    ]
    missing = [
        f"Not taught yet, by this command: {arm}.\n" for arm in FORMS if arm not in {r["arm"] for r in rows}
    ]
    return "\n## Reading\n\n" + "".join(said + missing) + SIDE_BY_SIDE


SIDE_BY_SIDE = """One seed of a small model, and a guard of other questions than the earlier one: the two are read
side by side, not as a difference. The lint needs no lesson to name the words.
"""


def main() -> int:
    """Teach every lesson that is not in capitals.json yet, then write the page."""
    file = OUT / "capitals.json"
    found: list[Row] = json.loads(file.read_text()) if file.exists() else []
    todo = [arm for arm in FORMS if arm not in {r["arm"] for r in found}]
    if todo:
        with tempfile.TemporaryDirectory() as name, served(Path(name) / "home") as client:
            before = "".join("+" if ok else "-" for _, ok in asked(client, held_out()))
            for arm in todo:
                found.append(lesson(client, Path(name) / "home", arm, before))
                file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                print({k: found[-1][k] for k in ("arm", "sentence", "held_out", "steps")}, flush=True)
    (OUT / "capitals.md").write_text(page(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
