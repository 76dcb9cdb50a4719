"""Does somebody with six corrections and no probes get a verdict, and is it right? `python experiments/guards.py`

Five behaviours, two seeds each (other corrections, in another order), taught to SmolLM2-135M-Instruct by the
commands that a user types: `secondnature serve smollm2`, `secondnature learn corrections.jsonl --guards facts`. The
gate sees the corrections and the shipped facts, nothing else. After its verdict the truth is asked, which no lesson
and no gate saw: 30 prompts of the same kind, 20 of the other side, and a sixth of the packs that did not guard it.
A lesson that was undone is made again and kept for that (the same weights, to the byte: their ids are compared).
Every lesson is undone before the next.

Writes docs/experiments/guards.json after every lesson (and resumes from it) and docs/experiments/guards.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from small_lessons import BEHAVIOURS, Behaviour

from secondnature.errors import SecondnatureError
from secondnature.evidence.checks import judge_probes
from secondnature.evidence.packs import pack
from secondnature.evidence.statistics import clopper_pearson, mcnemar_mid_p
from secondnature.records import Probe
from secondnature.wire import Client

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "experiments"
SEEDS = (0, 1)
UNSEEN_PACKS = ("instructions", "arithmetic")
EVERY = 6
"""One of so many probes of a pack that did not guard the lesson."""
ALPHA = 0.025
"""One-sided, as the gate's: of "it learned" and of "it broke"."""
MAX_TOKENS = 64
AT_ONCE = 32
SETS = ("held_out", "other", *UNSEEN_PACKS)
Row = dict[str, Any]
COMMAND = [sys.executable, "-m", "secondnature.cli"]


def truth(behaviour: Behaviour) -> dict[str, list[Probe]]:
    """What is asked after the verdict, by set."""
    found = {
        "held_out": [
            Probe.model_validate({"behaviour": "truth", "prompt": prompt, "check": behaviour.check})
            for prompt in behaviour.held_out
        ],
        "other": [
            Probe.model_validate({"behaviour": "truth", "prompt": prompt, "check": behaviour.other_check})
            for prompt in behaviour.other
        ],
    }
    return found | {name: list(pack(name)[::EVERY]) for name in UNSEEN_PACKS}


def asked(client: Client, probes: Sequence[Probe]) -> list[tuple[str, bool]]:
    """Each probe's greedy answer by the weights that are served, and whether it passes."""

    def ask(probe: Probe) -> str:
        messages = [m.model_dump(include={"role", "content"}) for m in probe.prompt]
        reply = client.chat(messages, model="smollm2", temperature=0, max_tokens=MAX_TOKENS)
        return str(reply["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(ask, probes))
    return [(o.answer, o.passed) for o in judge_probes(probes, answers)]


def passes(client: Client, behaviour: Behaviour) -> Row:
    """Per set: a mark for every probe, and some of the answers."""
    marks: Row = {}
    for name, probes in truth(behaviour).items():
        found = asked(client, probes)
        marks[name] = "".join("+" if passed else "-" for _, passed in found)
        if name == "held_out":
            marks["answers"] = [answer[:120] for answer, _ in found[:3]]
    return marks


@contextmanager
def served(home: Path) -> Iterator[Client]:
    """`secondnature serve smollm2`, in a fresh home."""
    log = (home.parent / "serve.log").open("w")
    line = [*COMMAND, "serve", "smollm2", "--port", "0", "--home", str(home)]
    server = subprocess.Popen(line, stdout=log, stderr=log)
    try:
        while not (home / "server.json").exists() or not (home / "key").exists():
            if server.poll() is not None:
                raise SystemExit(Path(log.name).read_text())
            time.sleep(0.5)
        url = json.loads((home / "server.json").read_text())["url"]
        with Client(url, (home / "key").read_text().strip(), timeout_s=900) as client:
            while not ready(client):
                time.sleep(0.5)
            yield client
    finally:
        server.terminate()
        server.wait()
        log.close()


def ready(client: Client) -> bool:
    """Whether the server answers."""
    try:
        return client.health().status == "ok"
    except SecondnatureError:
        return False


def learned(corrections: Path, home: Path, url: str, *options: str) -> tuple[Row, float]:
    """`secondnature learn`: what it says with --json, and the seconds it took."""
    begun = time.monotonic()
    line = [*COMMAND, "learn", str(corrections), *options, "--json", "--home", str(home), "--url", url]
    report = ["--report", str(home.parent / "report.html")]
    done = subprocess.run([*line, *report], capture_output=True, text=True, check=False)
    if not done.stdout.strip():
        raise SystemExit(f"{line}: exit code {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout), time.monotonic() - begun


def judged_and_kept(file: Path, home: Path, url: str, label: str) -> tuple[Row, float, Row]:
    """A lesson guarded by the facts: (what `learn` says, its seconds, the lesson whose weights are served now).

    One that was undone is made again and kept unjudged, so that the truth can be asked of the same weights.
    """
    said, seconds = learned(file, home, url, "--guards", "facts")
    made = said["lesson"]
    if made["state"] == "kept":
        return said, seconds, made
    kept = learned(file, home, url, "--keep")[0]["lesson"]
    if kept["state"] != "kept" or kept["version"] != made["version"]:
        raise SystemExit(f"{label}: made again, and not the same weights: {kept}")
    return said, seconds, kept


def write_corrections(home: Path, rows: Sequence[object]) -> Path:
    """A file of them beside the home."""
    file = home.parent / "corrections.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def lesson(client: Client, home: Path, behaviour: Behaviour, seed: int, before: Row) -> Row:
    """One lesson by the command, its verdict, and the truth."""
    file = write_corrections(home, behaviour.corrections(seed))
    said, seconds, kept = judged_and_kept(file, home, client.url, f"{behaviour.name}, seed {seed}")
    made, evidence = said["lesson"], said["evidence"]
    after = passes(client, behaviour)
    client.revert(kept["id"])
    guard = next(c for c in evidence["comparisons"] if c["role"] == "guard")
    names = ("n", "before", "after", "gains", "losses", "difference_interval", "p", "decision")
    return {
        "behaviour": behaviour.name,
        "seed": seed,
        "verdict": evidence["verdict"],
        "sentence": evidence["sentence"],
        "taught": evidence["taught"],
        "guard": {name: guard[name] for name in names},
        "steps": made["steps"],
        "stopped_by": made["stopped_by"],
        "loss": made["loss"],
        "kl": made["kl"].get("new"),
        "seconds": round(seconds),
        "before": before,
        "after": after,
    }


# ------------------------------------------------------------------------------------------------- the page


def flips(row: Row, name: str) -> tuple[int, int, int, int, int]:
    """(n, passed before, passed after, gains, losses) of one set of the truth."""
    was, now = row["before"][name], row["after"][name]
    pairs = list(zip(was, now, strict=True))
    return len(was), was.count("+"), now.count("+"), pairs.count(("-", "+")), pairs.count(("+", "-"))


def really_learned(row: Row) -> bool:
    """Half of the held-out prompts pass, and more of them than before beyond chance."""
    n, _, after, gains, losses = flips(row, "held_out")
    return 2 * after >= n and mcnemar_mid_p(gains, losses) <= ALPHA


def broken(row: Row) -> list[str]:
    """What fell beyond chance among what the gate did not see."""
    fell: list[str] = []
    for name in SETS[1:]:
        _, _, _, gains, losses = flips(row, name)
        if mcnemar_mid_p(losses, gains) <= ALPHA:
            fell.append(name.replace("other", "the other side"))
    return fell


HEAD = """# Six corrections and a shipped pack: is there a verdict, and is it right?

SmolLM2-135M-Instruct, `secondnature serve smollm2`, and for each lesson the command that a user types: six
corrections, no probes, `secondnature learn corrections.jsonl --guards facts`, everything else by default. Five
behaviours, two seeds (other corrections, another order). Made by `python experiments/guards.py`; corrections and
held-out prompts lie in [small_lessons.py](../../experiments/small_lessons.py).

**A verdict, kept or undone, in {verdicts} of {num} lessons**: {kept} kept, {undone} undone, {open} inconclusive.
What a kept one covers, in one sentence: the corrections' own prompts are answered as wanted, and a fall of 5 points
among {facts} widely known facts is ruled out. It says nothing of other prompts, of where the behaviour must not
show, or of other abilities.

As wanted: corrections of 6 whose own prompt is answered so, before and after (in brackets: word for word). Facts:
passed of {facts}, before and after; change in points with the limits of the tests.

| behaviour | seed | verdict | as wanted | facts | change | steps | seconds |
|---|---|---|---|---|---|---|---|
"""
TRUTH = """
Seconds are of the whole command (of the last lesson: of the server), on 2 cores that much else was using; the
first lesson also asks the facts before, later ones find the answers of the same weights remembered.

## The truth, which no gate saw

Asked after the verdict: {held} held-out prompts of the same kind, {other} of the other side,
{packs}.
Learned: half of the held-out prompts pass, more than before beyond chance (McNemar's mid-p, {alpha}).
Broke: a set that the gate did not see fell beyond chance by the same test.

**Of {kept} that were kept, {right} really learned it and {broke} broke something that was not guarded. Of
{not_kept} that were not kept, {missed} had learned it.**

| behaviour | seed | verdict | held out: before, after | other side | instructions | arithmetic | learned | broke |
|---|---|---|---|---|---|---|---|---|
"""
SENTENCES = """
## What the certificates say

"""


def _arrow(row: Row, name: str) -> str:
    n, before, after, _, _ = flips(row, name)
    return f"{before} → {after} of {n}"


def page(found: list[Row]) -> str:
    """guards.md, from guards.json alone."""
    rows = sorted(found, key=lambda r: ([b.name for b in BEHAVIOURS].index(r["behaviour"]), r["seed"]))
    counts = {v: sum(r["verdict"] == v for r in rows) for v in ("kept", "undone", "inconclusive")}
    kept = [r for r in rows if r["verdict"] == "kept"]
    others = [r for r in rows if r["verdict"] != "kept"]
    facts = rows[0]["guard"]["n"]
    parts = [
        HEAD.format(
            verdicts=counts["kept"] + counts["undone"],
            num=len(rows),
            kept=counts["kept"],
            undone=counts["undone"],
            open=counts["inconclusive"],
            facts=facts,
        )
    ]
    for r in rows:
        guard, taught = r["guard"], r["taught"]
        low, high = (100 * x for x in guard["difference_interval"])
        change = 100 * (guard["after"] - guard["before"]) / guard["n"]
        parts.append(
            f"| {r['behaviour']} | {r['seed']} | {r['verdict']} | {taught['before']}, {taught['after']} "
            f"({taught['exact']}) | {guard['before']}, {guard['after']} | {change:+.1f} [{low:+.1f}, {high:+.1f}] "
            f"| {r['steps']} | {r['seconds']} |\n"
        )
    sizes = {name: len(rows[0]["before"][name]) for name in SETS}
    parts.append(
        TRUTH.format(
            held=sizes["held_out"],
            other=sizes["other"],
            packs=" and ".join(f"{sizes[name]} probes of pack:{name}" for name in UNSEEN_PACKS),
            alpha=ALPHA,
            kept=len(kept),
            right=sum(map(really_learned, kept)),
            broke=sum(bool(broken(r)) for r in kept),
            not_kept=len(others),
            missed=sum(map(really_learned, others)),
        )
    )
    for r in rows:
        n, _, after, _, _ = flips(r, "held_out")
        low, high = clopper_pearson(after, n)
        parts.append(
            f"| {r['behaviour']} | {r['seed']} | {r['verdict']} | {_arrow(r, 'held_out')} "
            f"[{100 * low:.0f}, {100 * high:.0f} %] | "
            + " | ".join(_arrow(r, name) for name in SETS[1:])
            + f" | {'yes' if really_learned(r) else 'no'} | {', '.join(broken(r)) or '-'} |\n"
        )
    first = next((r for v in ("kept", "undone", "inconclusive") for r in rows if r["verdict"] == v), rows[0])
    told = [first, *(r for r in rows if r["verdict"] != "kept")]
    parts.append(
        SENTENCES + "".join(f"- {r['behaviour']}, seed {r['seed']}: {r['sentence']}\n" for r in told)
    )
    return "".join(parts) + reading(rows)


def reading(rows: list[Row]) -> str:
    """What the tables say, in words."""
    kept = [r for r in rows if r["verdict"] == "kept"]
    least = min(flips(r, "held_out")[2] for r in kept)
    sums = sum("arithmetic" in broken(r) for r in kept)
    other = [f"{r['behaviour']} ({_arrow(r, 'other')})" for r in rows if "the other side" in broken(r)]
    text = f"""
## Reading

What was kept was learned: at least {least} of the held-out prompts pass after each. So the corrections' own
prompts, which are all that the gate knew of the lesson, said enough where the corrections are of one kind.
What it does not see it cannot guard: in {sums} of {len(kept)} kept lessons sums fell beyond chance while the
facts held. Who means to keep other abilities names their packs too (`--guards facts,arithmetic,instructions`).
The other side fell in: {", ".join(other) or "none"}. Six corrections without one
of the other side teach that it is always wanted; `secondnature lint` says so of uniform answers.
"""
    turned = [r for r in rows if "first_verdict" in r]
    for r in turned:
        text += f"""
The certificate of “{r["behaviour"]}”, seed {r["seed"]}, was {r["first_verdict"]} when it was taught. That a tag
in which harm is shown alone undoes a lesson was decided after it was seen; it is judged again here from its counts,
as all are. Without that rule there would be a verdict in {len(rows) - len(turned)} of {len(rows)}.
"""
    return text


def main() -> int:
    """Teach every lesson that is not in guards.json yet, then write the page."""
    file = OUT / "guards.json"
    found: list[Row] = json.loads(file.read_text()) if file.exists() else []
    done = {(r["behaviour"], r["seed"]) for r in found}
    todo = [(seed, b) for seed in SEEDS for b in BEHAVIOURS if (b.name, seed) not in done]
    if todo:
        with tempfile.TemporaryDirectory() as name:
            run(todo, found, file, Path(name) / "home")
    (OUT / "guards.md").write_text(page(found), encoding="utf-8")
    return 0


def run(todo: list[tuple[int, Behaviour]], found: list[Row], file: Path, home: Path) -> None:
    """Teach these lessons on one server; save after each."""
    os.environ["PYTHONUNBUFFERED"] = "1"
    with served(home) as client:
        known: dict[str, Row] = {r["behaviour"]: r["before"] for r in found}
        for seed, behaviour in todo:
            if behaviour.name not in known:
                known[behaviour.name] = passes(client, behaviour)
            found.append(lesson(client, home, behaviour, seed, known[behaviour.name]))
            file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(
                {k: found[-1][k] for k in ("behaviour", "seed", "sentence", "steps", "seconds")}, flush=True
            )


if __name__ == "__main__":
    raise SystemExit(main())
