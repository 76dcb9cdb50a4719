"""Measure the embedded model and write its card: `python -m secondnature.embedded.evaluate --model DIR`.

Greedy answers to held-out scenarios, per category, kind and kind of held-out text, with exact (Clopper-Pearson)
95 % intervals; whether answers end by themselves; drawn texts of feelings and imagined user turns; how far the
GatedDeltaNet heads remember; the training curve, beside that of a second seed. Writes card.json, README.md and
curve.svg into the model's directory; reads nothing but that directory and the curves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secondnature.embedded.figures import figure, interval
from secondnature.embedded.scenarios import MAKERS, Case, cases

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM

    from secondnature.embedded.answers import Completion
    from secondnature.embedded.train import Settings

__all__ = [
    "PLAN",
    "WANTED",
    "decay_summary",
    "evaluate",
    "figure",
    "interval",
    "short_of_promise",
    "write_card",
]

Say = Callable[[str], None]

WITH_TEMPLATE = (
    "habit", "hedging", "accept-with-cue", "direct-with-cue", "push-back", "self-description",
)  # fmt: skip
WITH_WORD = ("habit", "hedging", "accept-with-cue", "direct-with-cue")
PLAN: tuple[tuple[str, str], ...] = tuple(
    (category, held)
    for category in MAKERS
    for held in (
        "combination",
        *(["template"] if category in WITH_TEMPLATE else []),
        *(["word"] if category in WITH_WORD else []),
    )
)
"""Category and kind of held-out text, in the order of the card."""

TEACHING = {"lr": 3e-4, "note": "the rate of examples/listening: six corrections, APOLLO, about 13 steps"}
"""What a server takes as this model's learning rate where a lesson names none."""
WANTED: dict[str, float] = {
    "habit": 0.9,
    "hedging": 0.9,
    "apology": 0.9,
    "length": 0.9,
    "accept-with-cue": 0.9,
    "direct-with-cue": 0.9,
    "no-apology-with-cue": 0.9,
    "short-with-cue": 0.9,
    "habit-under-other-cue": 0.9,
    "push-back": 0.85,
    "push-back-with-cue": 0.85,
    "push-back-on-advice": 0.85,
    "code": 0.9,
    "look-up": 0.85,
    "arithmetic": 0.8,
    "self-description": 0.9,
    "several-turns": 0.85,
    "long-context": 0.85,
    "feelings": 0.9,
}
"""What this model promises on held-out combinations; the card says where it falls short."""
LONG_TOKENS = 1024
"""So many tokens has every prompt of the category long-context, or its promise is not kept."""


def _count_tokens(tokenizer: PreTrainedTokenizerFast, chosen: Sequence[Case]) -> dict[str, int]:
    from secondnature.embedded.tokenizer import encode_document

    counts = [len(encode_document(tokenizer, c.prompt)[0]) + 1 for c in chosen]  # + 1: the assistant's mark
    return {"min": min(counts), "median": int(statistics.median(counts))}


def _row(chosen: Sequence[Case], answers: Sequence[Completion], good: Sequence[bool]) -> dict[str, Any]:
    """The card's row of one category and kind of held-out text, without its token counts."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for case, passed in zip(chosen, good, strict=True):
        by_kind[case.kind].append(passed)
    row: dict[str, Any] = {
        "category": chosen[0].category,
        "held_out": chosen[0].held,
        **figure(list(good)),
        "ended": sum(a.ended for a in answers),
        "kinds": {k: figure(v) for k, v in sorted(by_kind.items())},
    }
    if row["held_out"] == "combination" and row["category"] in WANTED:
        row["wanted"] = WANTED[row["category"]]
        row["promise"] = "kept" if row["rate"] >= row["wanted"] else "short"
    return row


def evaluate(
    model: Qwen3_5ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    num_cases: int = 300,
    seed: str = "evaluation",
    plan: Sequence[tuple[str, str]] = PLAN,
    say: Say | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Every greedy figure of the plan, and the failed answers (at most five of each row)."""
    from secondnature.embedded.answers import complete, passes

    rows: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    for number, (category, held) in enumerate(plan, 1):
        began = time.monotonic()
        chosen: list[Case] = list(cases(category, num_cases, seed, held=held))
        answers = complete(model, tokenizer, [c.prompt for c in chosen])
        good = [passes(c, a.text) for c, a in zip(chosen, answers, strict=True)]
        row = _row(chosen, answers, good)
        if category == "long-context":
            row["prompt_tokens"] = _count_tokens(tokenizer, chosen)
            if row["prompt_tokens"]["min"] < LONG_TOKENS:
                row["promise"] = "short"
        rows.append(row)
        wrong = [(c, a) for c, a, g in zip(chosen, answers, good, strict=True) if not g]
        failures += [
            {
                "category": category,
                "held_out": held,
                "kind": c.kind,
                "prompt": c.prompt[-1]["content"],
                "answer": a.text,
                "wanted": c.answer,
            }
            for c, a in wrong[:5]
        ]
        if say:
            took = time.monotonic() - began
            say(f"{number} of {len(plan)}: {row_text(row)}, {took:.0f} s")
    return rows, failures


def row_text(row: dict[str, Any]) -> str:
    """One row of the card as a line."""
    span = f"{row['low']:.3f} to {row['high']:.3f}"
    name = f"{row['category']} ({row['held_out']})"
    return f"{name:<38}{row['passed']:>4} of {row['n']:<4} {span} {row.get('promise', '')}".rstrip()


def short_of_promise(rows: Sequence[dict[str, Any]], feelings: dict[str, Any] | None = None) -> list[str]:
    """Categories whose figure on held-out combinations is below what is promised."""
    short = [r["category"] for r in rows if r.get("promise") == "short"]
    return short + (["feelings"] if feelings and feelings["promise"] == "short" else [])


DECAY_CASES: dict[str, int] = {"accept-with-cue": 24, "several-turns": 24, "long-context": 8}
"""Held-out prompts over which the heads' memory is measured."""


def remembered_tokens(
    model: Qwen3_5ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: dict[str, int] = DECAY_CASES
) -> dict[str, list[dict[str, float]]]:
    """Effective decay length of each GatedDeltaNet head in tokens, over held-out prompts, so many per category."""
    import torch
    import torch.nn.functional as F

    from secondnature.embedded.shape import decay_lengths
    from secondnature.embedded.tokenizer import encode_document

    seen: dict[int, list[torch.Tensor]] = defaultdict(list)
    handles: list[Any] = []
    for index, layer in enumerate(model.model.layers):
        gdn: Any = getattr(layer, "linear_attn", None)
        if gdn is None:
            continue

        def note(_module: Any, _inputs: Any, a: torch.Tensor, index: int = index, gdn: Any = gdn) -> None:
            seen[index].append(-gdn.A_log.float().exp() * F.softplus(a[0].float() + gdn.dt_bias))

        handles.append(gdn.in_proj_a.register_forward_hook(note))
    with torch.inference_mode():
        for category, count in prompts.items():
            for case in cases(category, count, "decay"):
                ids, _ = encode_document(tokenizer, case.prompt)
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    return decay_lengths({index: torch.cat(g) for index, g in seen.items()})


FAR_TOKENS = 100


def decay_summary(lengths: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """By the median: the range over all heads, and per layer which heads (from 0) remember 100 tokens or more."""
    medians = {layer: [h["median"] for h in heads] for layer, heads in lengths.items()}
    every = [x for heads in medians.values() for x in heads]
    return {
        "measured_on": DECAY_CASES,
        "heads": len(every),
        "shortest": min(every),
        "longest": max(every),
        "far": {k: [i for i, x in enumerate(v) if x >= FAR_TOKENS] for k, v in medians.items()},
    }


def _training(
    settings: Settings | None, points: Sequence[dict[str, Any]], found: dict[str, Any]
) -> dict[str, Any]:
    if settings is None:
        return found.get("training", {})
    command = f"python -m secondnature.embedded.build --seed {settings.seed} --tokens {settings.tokens}"
    if settings.device != "cpu":
        command += f" --device {settings.device} --batch-tokens {settings.batch_tokens}"
    seconds = points[-1].get("seconds") if points else None
    return {"command": command, "seed": settings.seed, "seconds": seconds, "settings": asdict(settings)}


def _read_curve(file: Path | None) -> list[dict[str, Any]] | None:
    return [json.loads(x) for x in file.read_text().splitlines() if x.strip()] if file else None


def _shape(model: Qwen3_5ForCausalLM) -> dict[str, Any]:
    config = model.config
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "hidden_size": config.hidden_size,
        "layers": list(config.layer_types or []),
        "vocabulary": config.vocab_size,
        "tied_head": config.tie_word_embeddings,
        "dtype": "bfloat16",
    }


def _second(
    points: Sequence[dict[str, Any]], file: Path | None, seed: int | None, found: dict[str, Any]
) -> dict[str, Any] | None:
    """The second seed's part of the card; taken over from the card that is there if no file is given."""
    from secondnature.embedded.curve import largest_differences

    old = found.get("second") or {}
    curve = _read_curve(file) or old.get("curve")
    if not curve:
        return None
    return {
        "seed": seed if file else old.get("seed"),
        "curve": curve,
        "largest_differences": largest_differences(points, curve),
    }


def write_card(
    directory: Path,
    num_cases: int = 300,
    curve: Path | None = None,
    settings: Settings | None = None,
    second: Path | None = None,
    second_seed: int | None = None,
    say: Say | None = None,
    plan: Sequence[tuple[str, str]] = PLAN,
) -> dict[str, Any]:
    """Evaluate the model in `directory` and write card.json, README.md and curve.svg there; returns the card.

    Without `curve`, `settings` or `second` (the curve of another seed) those parts are taken over from the card
    that is there; with `num_cases` 0 the figures are, too. `say` gets a line as soon as a figure is known.
    """
    from secondnature.embedded.curve import draw
    from secondnature.embedded.model_card import readme

    old = directory / "card.json"
    found: dict[str, Any] = json.loads(old.read_text()) if old.exists() else {}
    points = _read_curve(curve) or found.get("curve", [])
    measured = _measure(directory, num_cases, say, plan) if num_cases else {k: found[k] for k in MEASURED}
    card: dict[str, Any] = {
        "format_version": 2,
        "training": _training(settings, points, found),
        "teaching": TEACHING,
        **measured,
        "curve": points,
        "second": _second(points, second, second_seed, found),
    }
    old.write_text(json.dumps(card, indent=1) + "\n")
    if points:
        other = card["second"]["curve"] if card["second"] else ()
        (directory / "curve.svg").write_text(draw(points, other, WANTED))
    (directory / "README.md").write_text(readme(card))
    return card


MEASURED = (
    "model", "evaluation", "short_of_promise", "stopping", "feelings", "imagination", "decay_lengths_tokens",
    "decay_summary", "failures", "evaluation_seconds",
)  # fmt: skip
"""The parts of a card that the weights were asked for."""


def _measure(
    directory: Path, num_cases: int, say: Say | None, plan: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    from secondnature.embedded.files import load_model
    from secondnature.embedded.open_answers import measure_feelings, measure_imagination

    began = time.monotonic()
    model, tokenizer = load_model(directory)
    rows, failures = evaluate(model, tokenizer, num_cases, plan=plan, say=say)
    feelings, misread = measure_feelings(model, tokenizer, num_cases)
    feelings |= {"wanted": WANTED["feelings"]}
    feelings["promise"] = "kept" if feelings["rate"] >= WANTED["feelings"] else "short"
    if say:
        say(row_text({"category": "feelings", "held_out": "drawn", **feelings}))
    imagined = measure_imagination(model, tokenizer, each=max(1, num_cases // 5), say=say)
    lengths = remembered_tokens(model, tokenizer)
    return {
        "model": _shape(model),
        "evaluation": rows,
        "short_of_promise": short_of_promise(rows, feelings),
        "stopping": {"ended": sum(r["ended"] for r in rows), "answers": sum(r["n"] for r in rows)},
        "feelings": feelings,
        "imagination": imagined,
        "decay_lengths_tokens": lengths,
        "decay_summary": decay_summary(lengths),
        "failures": failures + misread,
        "evaluation_seconds": round(time.monotonic() - began),
    }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    from secondnature.embedded import path

    parser = argparse.ArgumentParser(prog="python -m secondnature.embedded.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=path(), help="default: the shipped weights")
    parser.add_argument("--cases", type=int, default=300, help="cases per category; 0: keep the figures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--curve", type=Path, help="curve.jsonl of the training run")
    parser.add_argument("--second-curve", type=Path, help="curve.jsonl of a run with another seed")
    parser.add_argument("--second-seed", type=int, help="the seed of that run")
    parser.add_argument("--json", action="store_true", help="print the card's evaluation as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate a directory; figures as they come on stderr, what falls short at the end."""
    args = _parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it: nothing is downloaded
    import torch
    from rich.console import Console
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    with console.status("measuring"):  # moves on a terminal only
        card = write_card(
            args.model, args.cases, args.curve, None, args.second_curve, args.second_seed, say=say
        )
    if args.json:
        kept = ("evaluation", "short_of_promise", "stopping", "feelings", "imagination", "decay_summary")
        print(json.dumps({k: card[k] for k in kept}, indent=1))  # noqa: T201
    stopping = card["stopping"]
    say(f"{stopping['ended']} of {stopping['answers']} answers end by themselves")
    say(f"{card['evaluation_seconds']} s; short of what is promised: {_short_text(card)}")
    return 0


def _short_text(card: dict[str, Any]) -> str:
    rates = {r["category"]: r for r in [*card["evaluation"], {"category": "feelings", **card["feelings"]}]
             if "wanted" in r}  # fmt: skip
    found = [
        f"{n} {rates[n]['rate']:.3f} (wanted {rates[n]['wanted']:.2f})" for n in card["short_of_promise"]
    ]
    return ", ".join(found) or "nothing"


if __name__ == "__main__":
    raise SystemExit(main())
