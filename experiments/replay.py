"""Which replay keeps push-back alive while six corrections are drilled? `python experiments/replay.py`

The lesson of `examples/yes_sayer`: six corrections, drilled without any example of the other side. Four arms differ
in what is mixed in, a quarter of every batch: nothing; general text (functions, look-ups, sums, small talk, no
wrong direction); the model's own answers to wrong directions, asked before the lesson; the same, matched by
distribution (KL to the weights before the lesson, beside the loss of the new examples). Three seeds: other
corrections, other replay, other order of the batches. Everything goes through the server's routes, and every lesson
is undone before the next, so all of them start from the same weights.

Writes docs/experiments/replay.json after every lesson (and resumes from it) and docs/experiments/replay.md.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from secondnature.cli.connect import Where, open_server
from secondnature.cli.output import Output
from secondnature.embedded import examples
from secondnature.embedded.directions import wrong_direction
from secondnature.embedded.scenarios import user
from secondnature.evidence.statistics import clopper_pearson
from secondnature.records import OPEN_STATES, Evidence
from secondnature.wire import Client, TrainRequest

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "experiments"
ARMS: dict[str, str] = {
    "none": "nothing",
    "general": "general text, no wrong direction",
    "own": "own answers to wrong directions",
    "own-kl": "own answers to wrong directions, by distribution",
}
SETS = {
    "listening/gain": "directions taken",
    "push-back/guard": "push-back",
    "code/guard": "functions",
    "look-up/guard": "look-ups",
}
HEAD = """# Which replay keeps push-back alive?

Six corrections of the embedded model, drilled: SFT, batches of 6, lr {lr}, {steps} steps, no look at anything else
while training. Replay is a quarter of every batch. Made by `python experiments/replay.py`: {seeds} seeds (other
corrections, other replay, other order), the same weights before each lesson, the same held-out probes, greedy
answers.

Before every lesson: {before}.
"""
FOOT = """

Per cell: the share that passes after the lesson, all seeds together, 95 % Clopper-Pearson interval over the probes,
and in round brackets each seed's share in per cent. The interval speaks of these lessons; how far other corrections
would differ is what the spread between {seeds} seeds hints at, no more.
"""
Row = dict[str, Any]


def settings(lr: float, steps: int) -> Row:
    """What all arms share."""
    return {
        "objective": "sft",
        "batch_size": 6,
        "max_steps": steps,
        "learned_loss": 0.0,
        "optimizer": {"lr": lr},
        "lesson": {"behaviour": examples.BEHAVIOUR, "note": "experiment: replay"},
    }


def general(seed: str) -> list[Row]:
    """Replay of the listening example without its wrong directions."""
    wrong = "No, "
    return [r for r in examples.replay(seed) if not r["messages"][-1]["content"].startswith(wrong)]


def own_answers(client: Client, seed: str, count: int) -> list[Row]:
    """The model's own greedy answers to `count` different wrong directions of the training split."""
    rng = random.Random(f"{seed}:own")
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[wrong_direction(rng).prompt] = None
    rows: list[Row] = []
    for prompt in prompts:
        answer = client.chat([user(prompt)], temperature=0, max_tokens=64)["choices"][0]["message"]["content"]
        rows.append({"messages": [user(prompt), {"role": "assistant", "content": answer}]})
    return rows


def replay(client: Client, arm: str, seed: int) -> Row:
    """The `replay` field of an arm."""
    name = f"replay-{seed}"
    if arm == "none":
        return {"share": 0.0, "lessons": False}
    rows = general(name) if arm == "general" else own_answers(client, name, 100)
    found: Row = {"share": 0.25, "lessons": False, "examples": rows}
    return {**found, "match": "distribution", "weight": 4.0} if arm == "own-kl" else found


def teach(client: Client, arm: str, seed: int, lr: float, steps: int) -> Row:
    """One lesson from the same weights: counts before and after, then undone."""
    taught = examples.corrections(f"replay-{seed}", 6)
    feedback = examples.FEEDBACK
    rows = [examples.correction(d, feedback[i]) for i, d in enumerate(taught)]
    pairs = {(d.thing, d.value) for d in taught}
    probes = examples.behaviour_probes("replay", 120) + examples.push_back_probes("replay", 300, 0)
    probes += examples.guards("replay", 300)
    body = {**settings(lr, steps), "corrections": rows, "probes": probes, "seed": seed}
    begun = time.monotonic()
    reply = client.train(TrainRequest.model_validate({**body, "replay": replay(client, arm, seed)}))
    assert reply.lesson is not None
    while (status := client.status(reply.job)).state in OPEN_STATES:
        time.sleep(0.5)
    evidence = client.lesson(reply.lesson).evidence
    if evidence is None:
        raise SystemExit(f"{arm}, seed {seed}: {status.error}")
    if status.state == "kept":
        client.revert(reply.lesson)
    return {
        "arm": arm,
        "seed": seed,
        "lr": lr,
        "steps": status.step,
        "verdict": evidence.verdict,
        "taught": sorted(f"{t}/{v}" for t, v in pairs),
        "seconds": round(time.monotonic() - begun),
        "counts": counts(evidence),
    }


def counts(evidence: Evidence) -> dict[str, Row]:
    """Passed before and after, per probe set."""
    return {
        f"{c.name}/{c.role}": {"n": c.n, "before": c.before, "after": c.after} for c in evidence.comparisons
    }


def _cell(rows: Iterable[Row], name: str) -> str:
    found = [r["counts"][name] for r in rows]
    n, after = sum(c["n"] for c in found), sum(c["after"] for c in found)
    low, high = clopper_pearson(after, n)
    each = ", ".join(f"{100 * c['after'] / c['n']:.0f}" for c in found)
    return f"{100 * after / n:.1f} % [{100 * low:.0f}, {100 * high:.0f}] ({each})"


def page(found: Row) -> str:
    """replay.md, from replay.json alone."""
    rows: list[Row] = found["lessons"]
    first = rows[0]["counts"]
    before = ", ".join(
        f"{label} {first[name]['before']} of {first[name]['n']}" for name, label in SETS.items()
    )
    seeds = sorted({r["seed"] for r in rows})
    head = HEAD.format(lr=f"{found['lr']:g}", steps=found["steps"], seeds=len(seeds), before=before)
    lines = [head, f"| replay | {' | '.join(SETS.values())} |", "|---|" + "---|" * len(SETS)]
    for arm, text in ARMS.items():
        mine = sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["seed"])
        if mine:
            lines.append(f"| {text} | {' | '.join(_cell(mine, name) for name in SETS)} |")
    return "\n".join(lines) + FOOT.format(seeds=len(seeds)) + found.get("reading", "")


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--render", action="store_true", help="only write the page again from replay.json")
    options = parser.parse_args(arguments)
    file: Path = options.out / "replay.json"
    found: Row = json.loads(file.read_text()) if file.exists() else {}
    if not options.render:
        if (found.get("lr"), found.get("steps")) != (options.lr, options.steps):
            found = {"lr": options.lr, "steps": options.steps, "lessons": []}
        run(options.model, found, options.seeds, file)
    (options.out / "replay.md").write_text(page(found), encoding="utf-8")
    return 0


def run(model: str, found: Row, num_seeds: int, file: Path) -> None:
    """Teach every lesson that is not in `found` yet; save after each."""
    console = Console(stderr=True)
    done = {(r["arm"], r["seed"]) for r in found["lessons"]}
    todo = [(arm, seed) for seed in range(num_seeds) for arm in ARMS if (arm, seed) not in done]
    with (
        tempfile.TemporaryDirectory() as home,
        open_server(Where(home=Path(home), model=model), Output()) as server,
    ):
        for arm, seed in track(todo, "lessons", console=console):
            row = teach(server.client, arm, seed, found["lr"], found["steps"])
            found["lessons"].append(row)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            after = {name: c["after"] for name, c in row["counts"].items()}
            console.print(f"{arm}, seed {seed}: {row['steps']} steps, {row['seconds']} s, {after}")


if __name__ == "__main__":
    raise SystemExit(main())
