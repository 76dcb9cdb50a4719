"""Is a comment enough, or must the wanted answer be written? `python experiments/comments.py`

Six corrections of the embedded model, three arms: self-distillation from what the user said about each answer, no
answer written (`sdft`); the written answers (`sft`); written and rejected answers (`orpo`). Every lesson ends when
nine in ten development directions would be taken, without replay. Three seeds: other corrections, other samples,
other order of the batches; the same weights before each lesson and the same held-out probes. Everything goes
through the server's routes, and every lesson is undone before the next.

Writes docs/experiments/comments.json after every lesson (and resumes from it) and docs/experiments/comments.md.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from secondnature.cli.connect import Where, open_server
from secondnature.cli.output import Output
from secondnature.embedded import examples
from secondnature.evidence.statistics import clopper_pearson
from secondnature.records import OPEN_STATES
from secondnature.wire import Client, TrainRequest

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "experiments"
ARMS = {"sdft": "the comments alone, `sdft`", "sft": "written answers, `sft`", "orpo": "both answers, `orpo`"}
HEAD = """# Is a comment enough, or must the wanted answer be written?

Six corrections of the embedded model, batches of 6, lr 3e-4, no replay; a lesson ends when nine in ten of 24
development directions would be taken, after 60 steps at most. With `sdft` the six comments ("I did not ask for
other ideas.") are all it learns from: 4 answers of the model to each prompt, sampled at temperature 1 before the
lesson. Made by `python experiments/comments.py`: {seeds} seeds (other corrections, other samples, other order), the
same weights before each lesson, the same held-out probes, greedy answers.

Before every lesson: directions taken {right} of 120, wrong ones refused {other} of 120.

| taught from | directions taken | wrong ones refused | steps | KL on new prompts |
|---|---|---|---|---|
"""
FOOT = """
Shares of all seeds together, 95 % Clopper-Pearson interval over the probes, in round brackets each seed's share in
per cent; steps and KL of each seed. KL(before || after), nats per token, on the model's own answers to the taught
prompts.

**Reading.** Comments alone turn the behaviour around, with every seed, and no wrong direction is taken. They take
four to six times the steps (one lesson made all 60) and teach it less evenly: where an answer can be written, do
so. Written answers without the rejected one move the model least.
"""
Row = dict[str, Any]


def body(arm: str, seed: int) -> Row:
    """The request of one lesson."""
    taught = examples.corrections(f"comments-{seed}", 6)
    rows = [examples.correction(d, examples.FEEDBACK[i]) for i, d in enumerate(taught)]
    if arm == "sdft":
        rows = [{k: v for k, v in row.items() if k != "chosen"} for row in rows]
    wrong = examples.push_back_probes("comments", 0, 120)
    return {
        "corrections": rows,
        "objective": arm,
        "batch_size": 6,
        "max_steps": 60,
        "until_passed": 0.9,
        "development": [
            json.loads(line)
            for line in (ROOT / "examples/listening/development.jsonl").read_text().splitlines()
        ],
        "seed": seed,
        "replay": {"share": 0.0},
        "optimizer": {"lr": 3e-4},
        "lesson": {"behaviour": examples.BEHAVIOUR, "note": "experiment: comments"},
        "probes": examples.behaviour_probes("comments", 120) + wrong,
    }


def teach(client: Client, arm: str, seed: int) -> Row:
    """One lesson from the same weights: counts before and after, then undone."""
    begun = time.monotonic()
    reply = client.train(TrainRequest.model_validate(body(arm, seed)))
    assert reply.lesson is not None
    while (status := client.status(reply.job)).state in OPEN_STATES:
        time.sleep(0.5)
    detail = client.lesson(reply.lesson)
    if detail.evidence is None:
        raise SystemExit(f"{arm}, seed {seed}: {status.error}")
    if status.state == "kept":
        client.revert(reply.lesson)
    return {
        "arm": arm,
        "seed": seed,
        "verdict": detail.evidence.verdict,
        "steps": detail.lesson.steps,
        "kl": detail.lesson.kl["new"],
        "seconds": round(time.monotonic() - begun),
        "counts": {c.role: [c.n, c.before, c.after] for c in detail.evidence.comparisons},
    }


def _cell(rows: list[Row], role: str) -> str:
    n, after = (sum(r["counts"][role][i] for r in rows) for i in (0, 2))
    low, high = clopper_pearson(after, n)
    each = ", ".join(f"{100 * r['counts'][role][2] / r['counts'][role][0]:.0f}" for r in rows)
    return f"{100 * after / n:.1f} % [{100 * low:.0f}, {100 * high:.0f}] ({each})"


def page(found: list[Row]) -> str:
    """comments.md, from comments.json alone."""
    seeds = len({r["seed"] for r in found})
    before = found[0]["counts"]
    lines = [HEAD.format(seeds=seeds, right=before["gain"][1], other=before["other"][1])]
    for arm, text in ARMS.items():
        rows = sorted((r for r in found if r["arm"] == arm), key=lambda r: r["seed"])
        if rows:
            steps = ", ".join(str(r["steps"]) for r in rows)
            kl = ", ".join(f"{r['kl']:.2f}" for r in rows)
            lines.append(f"| {text} | {_cell(rows, 'gain')} | {_cell(rows, 'other')} | {steps} | {kl} |\n")
    return "".join(lines) + FOOT


def main() -> int:
    """Teach every lesson that is not in comments.json yet, then write the page."""
    file = OUT / "comments.json"
    found: list[Row] = json.loads(file.read_text()) if file.exists() else []
    done = {(r["arm"], r["seed"]) for r in found}
    todo = [(seed, arm) for seed in range(3) for arm in ARMS if (arm, seed) not in done]
    if todo:
        run(todo, found, file)
    (OUT / "comments.md").write_text(page(found), encoding="utf-8")
    return 0


def run(todo: list[tuple[int, str]], found: list[Row], file: Path) -> None:
    """Teach these lessons; save after each."""
    with (
        tempfile.TemporaryDirectory() as home,
        open_server(Where(home=Path(home), model="embedded"), Output()) as server,
    ):
        for seed, arm in todo:
            found.append(teach(server.client, arm, seed))
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(found[-1], flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
