"""The page of the experiment on a real model, and its picture, from real-model.json alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

from figures import Line, Panel, draw

from secondnature.evidence.statistics import clopper_pearson
from secondnature.evidence.style import style

__all__ = ["page", "picture", "write"]

Row = dict[str, Any]
NAMES = {
    "before": "before",
    "ours": "the server's lesson, stopped by development checks",
    "prompting": "prompting alone: the six in the question",
    "turns": "prompting alone: the six as earlier turns",
    "sft": "SFT, AdamW on all weights, lr 1e-5",
    "lora": "LoRA, rank 8, lr 2e-4",
    "dpo": "DPO, AdamW on all weights, lr 1e-5",
}
SETS = {
    "right": "directions taken",
    "other": "questions not acknowledged",
    "facts": "facts",
    "arithmetic": "sums",
}
GUARDS = ("facts", "arithmetic")
HEAD = """# A real model, six corrections: what a lesson does, beside what people would do instead

SmolLM2-135M-Instruct answers "Use blue for the door." with chatter, an essay or a refusal. Six corrections say what
is wanted: "I'll use blue for the door." Made by `python experiments/real_model.py`: {seeds} seeds (other
corrections, other order), the same weights before and the same probes: {right} held-out directions, of whose things
none is in a correction, {other} questions about such things, and parts of the packs `facts` ({facts}) and
`arithmetic` ({arithmetic}). Answers are greedy, in fp32; ours has bf16 weights, the others keep fp32, as each was
trained.

The server's lesson is [examples/directions](../../examples/directions/README.md): ORPO by APOLLO at lr {lr:g}, the
model's own answers to {replayed} general prompts held by distribution, a look at {development} development probes
every {look_every} steps, stopped as soon as {until:.0%} of the directions among them are taken. The others make
{steps} steps of all six at once, without a gate and without knowing when to stop, with TRL's trainers and its
defaults but for the learning rate.

## After the lesson

"""
NOTE = """
All seeds together, 95 % Clopper-Pearson interval over the probes; in round brackets each seed's share in per cent.
The interval speaks of these lessons; how far other corrections would differ is what the spread hints at, no more.

"""
MORE = """
Flips: probes that passed before and fail now, and the other way, of all seeds. KL(before || after), nats per token,
along the first 32 tokens of the answers of before, of each seed. Perplexity: of {text} (before: {before:.1f}).
Style: mean words of nine answers to questions (32 tokens at most), before → after, and the share whose first words
are others.
"""
READING = ""


def share(passed: int, n: int) -> str:
    """`44 % [36, 52]`: the share with its 95 % interval."""
    low, high = clopper_pearson(passed, n)
    return f"{100 * passed / n:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def _of(found: Row, arm: str) -> list[Row]:
    return [r for r in found["runs"] if r["arm"] == arm]


def _marks(found: Row, row: Row, name: str) -> dict[int, str]:
    """1 or 0 of the probes of a set, by their place among those asked before; those that we replay are left out."""
    asked, every = row["passed"][name], _of(found, "before")[0]["passed"][name]
    step = -(-len(every) // len(asked))
    return {step * i: m for i, m in enumerate(asked) if step * i not in found["replayed"].get(name, [])}


def _cell(found: Row, rows: list[Row], name: str) -> str:
    """All seeds together, and each seed's share in per cent."""
    marks = ["".join(_marks(found, r, name).values()) for r in rows]
    text = share(sum(m.count("1") for m in marks), sum(map(len, marks)))
    each = ", ".join(f"{100 * _mean(m):.0f}" for m in marks)
    return f"{text} of {sum(map(len, marks))}" + (f" ({each})" if len(rows) > 1 else "")


def _flips(found: Row, rows: list[Row], name: str) -> str:
    """Losses and gains of a guard, beside the same probes before."""
    was = _marks(found, _of(found, "before")[0], name)
    pairs = [(was[i], m) for r in rows for i, m in _marks(found, r, name).items()]
    return f"−{pairs.count(('1', '0'))} +{pairs.count(('0', '1'))}"


def _style(rows: list[Row], before: Row) -> str:
    """Words of whole answers to questions, and how many opening words moved."""
    pairs = [(before["whole"][q], a) for r in rows for q, a in r["whole"].items()]
    found = style([b for b, _ in pairs], [a for _, a in pairs])
    assert found is not None
    return f"{found.words_before:.0f} → {found.words_after:.0f}, {100 * found.openings_moved:.0f} %"


def _each(rows: list[Row], value: Callable[[Row], float | None], form: str) -> str:
    values = [value(r) for r in rows]
    return ", ".join(form.format(v) for v in values if v is not None) or "—"


def arms(found: Row) -> list[str]:
    """The table of all arms."""
    (before,) = _of(found, "before")
    lines = [
        "| | directions taken | questions not acknowledged | facts | sums |\n|---|---|---|---|---|\n",
    ]
    rest = [
        "| | flips: facts, sums | KL on new prompts | KL on questions | perplexity | words, openings moved |\n"
        "|---|---|---|---|---|---|\n"
    ]
    for arm, name in NAMES.items():
        rows = _of(found, arm)
        if not rows:
            continue
        lines.append(f"| {name} | " + " | ".join(_cell(found, rows, s) for s in SETS) + " |\n")
        if arm != "before":
            flips = ", ".join(_flips(found, rows, g) for g in GUARDS)
            kl = [_each(rows, lambda r, on=on: r["kl"].get(on), "{:.2f}") for on in ("new", "other")]
            rest.append(
                f"| {name} | {flips} | {kl[0]} | {kl[1]} | "
                f"{_each(rows, lambda r: r['perplexity'], '{:.1f}')} | {_style(rows, before)} |\n"
            )
    return [*lines, NOTE, *rest, MORE.format(text=found["text"], before=before["perplexity"])]


def costs(found: Row) -> list[str]:
    """Seconds of a processor and peak memory of the training alone."""
    lines = [
        "\n## What it costs\n\n| | steps | CPU seconds | peak private memory, GB |\n|---|---|---|---|\n",
    ]
    for arm in ("served", "sft", "lora", "dpo"):
        rows = [r for r in _of(found, arm) if "cost" in r]
        if not rows:
            continue
        steps = ", ".join(str(r["steps"]) for r in rows)
        if arm == "served":
            for process in ("server", "trainer"):
                cpu = ", ".join(f"{r['cost'][process]['cpu_s']:.0f}" for r in rows)
                peak = ", ".join(f"{r['cost'][process]['peak_bytes'] / 1e9:.1f}" for r in rows)
                lines.append(f"| the server's lesson: its {process} | {steps} | {cpu} | {peak} |\n")
        else:
            cpu = ", ".join(f"{r['cost']['cpu_s']:.0f}" for r in rows)
            peak = ", ".join(f"{r['cost']['peak_bytes'] / 1e9:.1f}" for r in rows)
            lines.append(f"| {NAMES[arm]} | {steps} | {cpu} | {peak} |\n")
    return lines


def curve(found: Row, run: Row) -> list[Row]:
    """What was seen on the way, from step 0, which is the same for all: the weights of before."""
    (before,) = _of(found, "before")
    sizes = {name: len(marks) for name, marks in run["curve"][0]["passed"].items()}
    part = {n: m[:: -(-len(m) // sizes[n])] for n, m in before["passed"].items()}
    return [
        {**before, "step": 0, "passed": part, "development": run["looks"][0]["development"]},
        *run["curve"],
    ]


def stops(found: Row) -> list[str]:
    """Where each lesson stopped, and the looks around it."""
    rows = _of(found, "ours")
    if not rows:
        return []
    lines = [
        "\n## Where it stops\n\n![What moves when](../figures/real-model.svg)\n\n",
        "The lessons were trained on, past their stop, and looked at on the way (half of the directions, a sixth\n"
        "of the questions, a twelfth of the facts, a tenth of the sums).\n\n",
        "| step | development | directions | questions | facts | sums | KL on new, on questions | "
        "perplexity | words | stops |\n|---|---|---|---|---|---|---|---|---|---|\n",
    ]
    curves = [curve(found, r) for r in rows]
    for step in sorted({c["step"] for of_one in curves for c in of_one}):
        at = [c for of_one in curves for c in of_one if c["step"] == step]
        dev = ", ".join(f"{c['development']['right']}" for c in at)
        cells = [", ".join(f"{100 * _mean(c['passed'][s]):.0f}" for c in at) for s in SETS]
        kl = ", ".join(f"{c['kl']['new']:.2f} {c['kl']['other']:.2f}" for c in at)
        ppl = ", ".join(f"{c['perplexity']:.1f}" for c in at)
        words = ", ".join(f"{_words(c):.0f}" for c in at)
        here = ", ".join(f"seed {r['seed']}" for r in rows if r["steps"] == step)
        lines.append(f"| {step} | {dev} | {' | '.join(cells)} | {kl} | {ppl} | {words} | {here} |\n")
    lines.append("\nPer cent, of each seed that was looked at there; development: of 12 directions.\n")
    return lines + _texts(found, rows[0])


def _texts(found: Row, first: Row) -> list[str]:
    on_the_way = curve(found, first)
    lines = [f"\nSeed {first['seed']}'s answers on the way:\n\n| step | "]
    questions = list(on_the_way[0]["said"])
    chosen = [questions[0], questions[1], questions[-1]]
    lines.append(" | ".join(chosen) + " |\n|---|" + "---|" * len(chosen) + "\n")
    for c in on_the_way:
        said = [" ".join(c["said"][q].split()).replace("|", "/") for q in chosen]
        lines.append(f"| {c['step']} | " + " | ".join(said) + " |\n")
    return lines


def _mean(marks: str) -> float:
    return marks.count("1") / len(marks)


def _words(row: Row) -> float:
    return fmean(len(a.split()) for a in row["whole"].values())


def page(found: Row) -> str:
    """real-model.md."""
    (before,) = _of(found, "before")
    counts = {name: len(_marks(found, before, name)) for name in SETS}
    seeds = len({r["seed"] for r in found["runs"]})
    head = HEAD.format(seeds=seeds, text=found["text"], **counts, **found["settings"])
    return "".join([head, *arms(found), *costs(found), *stops(found), READING])


def picture(found: Row) -> str:
    """The curves, every seed a line."""
    rows = _of(found, "ours")

    def lines(value: Callable[[Row], float]) -> list[Line]:
        return [
            Line(i, [(float(c["step"]), value(c), value(c), value(c)) for c in curve(found, r)])
            for i, r in enumerate(rows)
        ]

    mark = fmean(r["steps"] for r in rows)
    panels = [
        Panel("directions taken", "step", "%", lines(lambda c: 100 * _mean(c["passed"]["right"])), mark=mark),
        Panel(
            "questions not acknowledged",
            "step",
            "%",
            lines(lambda c: 100 * _mean(c["passed"]["other"])),
            mark=mark,
        ),
        Panel("sums", "step", "%", lines(lambda c: 100 * _mean(c["passed"]["arithmetic"])), mark=mark),
        Panel("KL on new prompts", "step", "nats per token", lines(lambda c: c["kl"]["new"]), mark=mark),
        Panel("KL on questions", "step", "nats per token", lines(lambda c: c["kl"]["other"]), mark=mark),
        Panel("words in answers to questions", "step", "words", lines(_words), mark=mark),
    ]
    stops = ", ".join(f"seed {r['seed']} after step {r['steps']}" for r in rows)
    return draw(
        panels,
        [f"seed {r['seed']}: stops after step {r['steps']}" for r in rows],
        key="real-model",
        title="What moves when, in a lesson on SmolLM2",
        text=f"Lessons looked at every few steps; their development checks stop them: {stops}. "
        "The dashed line is the mean of the stops.",
        columns=3,
    )


def write(work: Path, out: Path, about: Row) -> None:
    """Gather what the runs left into real-model.json; then the page and the picture."""
    rows = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(work.glob("*-[0-9].json"))]
    found = {**about, "runs": sorted(rows, key=lambda r: (r["arm"], r["seed"]))}
    text = json.dumps(found, ensure_ascii=False, indent=0)
    (out / "real-model.json").write_text(text + "\n", encoding="utf-8")
    (out / "real-model.md").write_text(page(found), encoding="utf-8")
    (out.parent / "figures" / "real-model.svg").write_text(picture(found), encoding="utf-8")
