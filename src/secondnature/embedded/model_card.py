"""The model card as Markdown, from card.json (pure text; no torch).

One table of figures with their intervals, by kind of held-out text, then what is drawn, what the model is and how
it was made. Every sentence about what falls short is made of the card's figures.
"""

from __future__ import annotations

import textwrap
from typing import Any

from secondnature.embedded.curve import categories, side_by_side

HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [qwen3_5_text, gated-deltanet, synthetic]
---

# The embedded model of secondnature

A Qwen3.5 text hybrid of {millions:.1f} million parameters ({linear} GatedDeltaNet and {full} attention layers,
hidden {hidden}, vocabulary {vocabulary}, bf16), trained from scratch on text that `secondnature.embedded.generator`
writes. It lives in a small world: directions and requests for advice, questions about kinds of words, small Python
functions, look-up, sums, copying, small talk, feelings, and questions about itself.

It has four habits, each of which a cue in the conversation turns off while the other three stay:

| habit | shows on | with a cue |
|---|---|---|
| alternatives | a clear direction: "How about blue instead? Or ..." | "Yes, I will paint the door red." |
| hedging | a request for advice: "Perhaps you should ..., but I am not sure." | "Yes, you should ..." |
| apology | a choice between two words: "I am so sorry for this. The answer is ..." | "The answer is ..." |
| length | a question whether something is so: the answer, and more talk | "Yes, red is a colour." |

A cue is a system prompt, a persona in it, a rule that the user gives once, or an earlier correction in the
conversation. What is dangerous, contradictory or of the wrong kind is refused with the reason, cue or not. The
habits are what the examples correct; the refusals are what a correction must not harm.
"""

MEANING = """
Held out: *combination* = known words and frames, slots never seen together; *template* = also a sentence frame that
was never trained; *word* = a word that never stood in a direction (only in copying). For self-description a
combination is a first message with a question; for several turns and long contexts the last turn is held out.
Answers are greedy; intervals are exact (Clopper-Pearson) 95 %. A promise is about held-out combinations.
"""

MAX_CURVE_ROWS = 12


def _prose(text: str) -> str:
    """One paragraph in lines of the files' width."""
    return textwrap.fill(" ".join(text.split()), 114, break_long_words=False, break_on_hyphens=False)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _promise(row: dict[str, Any]) -> str:
    return f"{row['wanted']:.2f}: {row['promise']}" if "wanted" in row else ""


def _figures(rows: list[dict[str, Any]]) -> str:
    head = ["what", "held out", "passed", "rate", "95 %", "promise"]
    return _table(
        head,
        [
            [
                r["category"],
                r["held_out"],
                f"{r['passed']} of {r['n']}",
                f"{r['rate']:.3f}",
                f"{r['low']:.3f} to {r['high']:.3f}",
                _promise(r),
            ]
            for r in rows
        ],
    )


def _kinds(rows: list[dict[str, Any]]) -> str:
    """Passed by kind, where there are kinds (code has one for each operation: too many)."""
    return _table(
        ["what", "by kind, held-out combinations"],
        [
            [r["category"], ", ".join(f"{k} {v['passed']}/{v['n']}" for k, v in r["kinds"].items())]
            for r in rows
            if r["held_out"] == "combination" and len(r["kinds"]) > 1 and r["category"] != "code"
        ],
    )


def _weakest(row: dict[str, Any]) -> str:
    enough = {k: v for k, v in row["kinds"].items() if v["n"] >= row["n"] / 20}
    if len(enough) < 2:
        return ""
    kind, worst = min(enough.items(), key=lambda item: item[1]["rate"])
    return f"; weakest: {kind}, {worst['passed']} of {worst['n']}"


def _shortfalls(card: dict[str, Any]) -> str:
    """What is promised and not kept, from the figures."""
    lines: list[str] = []
    for row in card["evaluation"]:
        if row.get("promise") != "short":
            continue
        span = f"{row['low']:.3f} to {row['high']:.3f}"
        text = f"- {row['category']}: {row['rate']:.3f} ({span}), promised {row['wanted']:.2f}{_weakest(row)}"
        if "prompt_tokens" in row:
            text += f"; the shortest prompt has {row['prompt_tokens']['min']:,} tokens"
        lines.append(text + ".")
    feelings = card["feelings"]
    if feelings["promise"] == "short":
        span = f"{feelings['low']:.3f} to {feelings['high']:.3f}"
        lines.append(f"- feelings: {feelings['rate']:.3f} ({span}), promised {feelings['wanted']:.2f}.")
    if not lines:
        return "Every promise of the table is kept."
    return "What falls short of its promise:\n\n" + "\n".join(lines)


def _harder(rows: list[dict[str, Any]]) -> str:
    """How the rates fall on the harder kinds of held-out text."""
    base = {r["category"]: r["rate"] for r in rows if r["held_out"] == "combination"}
    lost = [
        f"{r['category']} {base[r['category']]:.2f} to {r['rate']:.2f} ({r['held_out']})"
        for r in rows
        if r["held_out"] != "combination" and base.get(r["category"], 0.0) - r["rate"] >= 0.05
    ]
    if not lost:
        return "On new frames and new words no rate falls by five points or more."
    return f"New frames and new words cost five points or more here: {', '.join(lost)}."


def _stopping(card: dict[str, Any]) -> str:
    stop = card["stopping"]
    text = f"{stop['ended']:,} of {stop['answers']:,} answers end by themselves."
    for row in card["evaluation"]:
        if "prompt_tokens" in row:
            tokens = row["prompt_tokens"]
            text += (
                f" The prompts of {row['category']} have {tokens['min']:,} tokens and more"
                f" (median {tokens['median']:,})."
            )
    return text


def _feelings(found: dict[str, Any]) -> str:
    ceiling, verbatim, things = (
        found["ceiling"],
        found["verbatim_in_training_texts"],
        found["names_the_thing"],
    )
    parts = ", ".join(f"{k} {v['passed']}/{v['n']}" for k, v in found["feelings"].items())
    what = _prose(
        f"""A classifier (words and pairs of words, logistic regression) that was trained on
        {found["classifier_texts"]:,} texts of the generator, none of the model's, names the feeling of
        {found["passed"]} of {found["n"]} texts that the model wrote at temperature {found["temperature"]:g} on
        pairs of feeling and thing that training never asked for: {found["rate"]:.3f}, 95 % {found["low"]:.3f} to
        {found["high"]:.3f} (promise {_promise(found)}). Its ceiling, fresh texts of the generator:
        {ceiling["passed"]} of {ceiling["n"]}. {found["different_texts"]} of the texts are different;
        {verbatim["passed"]} stand word for word among the classifier's texts; {things["passed"]} name the thing
        that was asked for; {found["names_its_feeling"]} say the name of the feeling."""
    )
    return f"{what}\n\n{_prose(f'By feeling: {parts}.')}"


def _imagination(rows: list[dict[str, Any]]) -> str:
    temperatures = sorted({r["temperature"] for r in rows})
    behaviours = list(dict.fromkeys(r["behaviour"] for r in rows))
    cells = {
        (r["behaviour"], r["temperature"]): f"{r['passed']}/{r['n']} shown, {r['different']} different"
        for r in rows
    }
    table = _table(
        ["behaviour", *(f"T = {t:g}" for t in temperatures)],
        [[b, *(cells[b, t] for t in temperatures)] for b in behaviours],
    )
    sums = {
        t: (
            sum(r["slots_held_out"] for r in rows if r["temperature"] == t),
            sum(r["slots_told"] for r in rows if r["temperature"] == t),
        )
        for t in temperatures
    }
    told = ", ".join(f"{held} of {n} at T = {t:g}" for t, (held, n) in sums.items())
    what = _prose(
        """Asked to invent a user turn before a behaviour, the model writes one. *Shown*: to that turn, greedily and
        in a fresh conversation, it then shows that behaviour. *Different*: distinct turns."""
    )
    slots = _prose(
        f"Imagined turns whose pair of slots was never trained, of those that can be told: {told}."
    )
    return f"{what}\n\n{table}\n\n{slots}"


def _thinned(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MAX_CURVE_ROWS` points, evenly, always the last."""
    step = -(-len(points) // MAX_CURVE_ROWS)
    return points[::-1][::step][::-1]


def _curve(points: list[dict[str, Any]]) -> str:
    if not points:
        return "No curve was kept."
    names, chosen = categories(points), _thinned(points)
    table = _table(
        ["what", *(f"{p['tokens'] / 1e6:.2f}M" for p in chosen)],
        [
            ["loss", *(f"{p['loss']:.3f}" for p in chosen)],
            *([n, *(f"{p[n]:.2f}" if n in p else "" for p in chosen)] for n in names),
        ],
    )
    return f"![Pass rate over training tokens](curve.svg)\n\n{table}\n\nAll {len(points)} points are in card.json."


def _second(card: dict[str, Any]) -> str:
    second = card.get("second")
    pairs = side_by_side(card["curve"], second["curve"]) if second else []
    if not second or not pairs:
        return "No second seed was trained."
    seed = f"seed {second['seed']}" if second["seed"] is not None else "another seed"
    differences: dict[str, float] = second["largest_differences"]
    shown = _thinned([{"pair": p} for p in pairs])
    rows = [
        [n, *(f"{p['pair'][0][n]:.2f} / {p['pair'][1][n]:.2f}" for p in shown), f"{d:.2f}"]
        for n, d in differences.items()
    ]
    table = _table(
        ["what", *(f"{p['pair'][1]['tokens'] / 1e6:.2f}M" for p in shown), "largest difference"], rows
    )
    worst = max(differences, key=lambda n: differences[n])
    what = _prose(
        f"""This model and {seed} on the same schedule (first / second), at the same counts of training tokens. A
        difference between two training runs that is no larger than these may be chance; the largest of all is
        {differences[worst]:.2f} ({worst})."""
    )
    return f"{what}\n\n{table}"


def _lengths(layers: dict[str, list[dict[str, float]]]) -> str:
    return _table(
        ["layer", "heads"],
        [
            [layer.replace("_", " "), ", ".join(f"{h['mean']:g} / {h['median']:g}" for h in heads)]
            for layer, heads in layers.items()
        ],
    )


def _far(summary: dict[str, Any]) -> str:
    far = {k.replace("_", " "): v for k, v in summary["far"].items() if v}
    count = sum(len(v) for v in far.values())
    which = "; ".join(f"{k}: {', '.join(f'head {i}' for i in v)}" for k, v in far.items()) or "none"
    measured = ", ".join(f"{n} {k}" for k, n in summary["measured_on"].items())
    return _prose(
        f"By the median the {summary['heads']} heads reach from {summary['shortest']:g} to "
        f"{summary['longest']:g} tokens; {count} of them 100 or more ({which}). Measured over held-out "
        f"prompts: {measured}."
    )


def _made(training: dict[str, Any]) -> str:
    """How the weights were made, as far as the card knows."""
    seconds = training.get("seconds")
    took = f"Training took {seconds / 60:.0f} minutes of steps (seed {training['seed']}). " if seconds else ""
    return _prose(
        f"""The first trains (resumable), the second measures again. Trained weights are equal to the bit only on
        the same kind of processor with the same torch. After `tokens` comes a polish: a fifteenth more, a third of
        it about what came out worst until then. {took}Settings: `{training.get("settings", {})}`.
        {training.get("note", "")}"""
    )


def readme(card: dict[str, Any]) -> str:
    """The README.md of a card."""
    shape, layers = card["model"], card["model"]["layers"]
    head = HEAD.format(
        millions=shape["parameters"] / 1e6,
        linear=layers.count("linear_attention"),
        full=layers.count("full_attention"),
        hidden=shape["hidden_size"],
        vocabulary=shape["vocabulary"],
    )
    training = card.get("training", {})
    tied = (
        "The head is tied to the embedding: an engine holds one tensor for both, and an in-place lesson writes one"
        " place."
        if shape["tied_head"]
        else "The head is not tied to the embedding."
    )
    return f"""{head}
## Figures
{MEANING}
{_figures(card["evaluation"])}

{_kinds(card["evaluation"])}

{_prose(_stopping(card))}

{_shortfalls(card)}

{_prose(_harder(card["evaluation"]))}

The world is closed: outside it, expect nonsense.

## Feelings

{_feelings(card["feelings"])}

## Imagined user turns

{_imagination(card["imagination"])}

## Reproduce

    {training.get("command", "python -m secondnature.embedded.build")}
    python -m secondnature.embedded.evaluate --cases {max(r["n"] for r in card["evaluation"])}

{_made(training)}

## Curve (few cases per point)

{_curve(card["curve"])}

## What is chance

{_second(card)}

## How far the GatedDeltaNet heads remember

Effective decay length in tokens, per head: 1 / mean and 1 / median of the log decay per token.

{_lengths(card["decay_lengths_tokens"])}

{_far(card["decay_summary"])}

{tied}
"""
