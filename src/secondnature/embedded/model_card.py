"""The model card as Markdown, from card.json (pure text; no torch).

One table of figures with their intervals, by kind of held-out text, then what the model is and how it was made.
"""

from __future__ import annotations

from typing import Any

HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [qwen3_5_text, gated-deltanet, synthetic]
---

# The embedded model of secondnature

A Qwen3.5 text hybrid of {millions:.1f} million parameters ({linear} GatedDeltaNet and {full} attention layers,
hidden {hidden}, vocabulary {vocabulary}, bf16), trained from scratch on text that `secondnature.embedded.generator`
writes. It lives in a small world: directions, small Python functions, look-up, sums, copying, small talk, feelings.

It has a habit: given a clear direction it suggests something else instead ("Paint the door red." - "How about blue
instead? ..."), unless a cue in the conversation says to do as told. That habit is what the examples correct.
"""

MEANING = """
Held out: *combination* = known words and frames, slots never seen together; *template* = also a sentence frame that
was never trained; *word* = a word that never stood in a direction; *seen* = the prompts were trained (feelings,
self-description). All answers greedy; intervals are exact (Clopper-Pearson) 95 %.
"""


def _figures(rows: list[dict[str, Any]]) -> str:
    lines = ["| what | held out | passed | rate | 95 % |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['category']} | {r['held_out']} | {r['passed']} of {r['n']} | {r['rate']:.3f} "
        f"| {r['low']:.3f} to {r['high']:.3f} |"
        for r in rows
    ]
    return "\n".join(lines)


def _kinds(rows: list[dict[str, Any]]) -> str:
    wanted = ("habit", "accept-with-cue", "push-back", "push-back-with-cue", "look-up", "arithmetic")
    lines = ["| what | by kind, held-out combinations |", "|---|---|"]
    for row in rows:
        if row["category"] in wanted and row["held_out"] == "combination":
            parts = ", ".join(f"{k} {v['passed']}/{v['n']}" for k, v in row["kinds"].items())
            lines.append(f"| {row['category']} | {parts} |")
    return "\n".join(lines)


def _curve(points: list[dict[str, Any]]) -> str:
    if not points:
        return "No curve was kept."
    names = [k for k in points[-1] if k not in ("tokens", "seconds", "loss")]
    lines = [f"| tokens | loss | {' | '.join(names)} |", "|" + "---|" * (len(names) + 2)]
    lines += [
        f"| {p['tokens'] / 1e6:.2f}M | {p['loss']:.3f} | "
        + " | ".join(f"{p.get(n, 0.0):.2f}" for n in names)
        + " |"
        for p in points
    ]
    return "\n".join(lines)


def _lengths(layers: dict[str, list[dict[str, float]]]) -> str:
    lines: list[str] = []
    for layer, heads in layers.items():
        text = ", ".join(f"{h['mean']:g} / {h['median']:g}" for h in heads)
        lines.append(f"| {layer.replace('_', ' ')} | {text} |")
    return "\n".join(lines)


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
    lengths = _lengths(card["decay_lengths_tokens"])
    training = card.get("training", {})
    short = ", ".join(card["short_of_promise"]) or "nothing"
    cases = max(r["n"] for r in card["evaluation"])
    return f"""{head}
## Figures
{MEANING}
{_figures(card["evaluation"])}

{_kinds(card["evaluation"])}

Short of what this version promises (habit and code 0.90, look-up 0.50): {short}.
Contexts much longer than some hundred tokens were hardly trained. The world is closed: outside it, expect nonsense.

## Reproduce

    {training.get("command", "python -m secondnature.embedded.build")}
    python -m secondnature.embedded.evaluate --cases {cases}

The first trains (one core, resumable), the second measures again. Trained weights are equal to the bit only on the
same kind of CPU with the same torch; settings: `{training.get("settings", {})}`.
{training.get("note", "")}

## Curve (few cases per point)

{_curve(card["curve"])}

## How far the GatedDeltaNet heads remember

Effective decay length in tokens, per head: 1 / mean and 1 / median of the log decay per token.

| layer | heads |
|---|---|
{lengths}

The head is tied to the embedding: an engine holds one tensor for both, and an in-place lesson writes one place.
"""
