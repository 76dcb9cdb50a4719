"""Measure the embedded model and write its card: `python -m secondnature.embedded.evaluate --model DIR`.

Greedy answers to held-out scenarios, per category, kind and kind of held-out text, with exact (Clopper-Pearson)
95 % intervals; how far the GatedDeltaNet heads remember; the training curve. Writes card.json and README.md into
the model's directory; reads nothing but that directory and the curve.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy.stats import beta

from secondnature.embedded.scenarios import Case, cases

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM

    from secondnature.embedded.train import Settings

PLAN: tuple[tuple[str, str], ...] = (
    ("habit", "combination"),
    ("habit", "template"),
    ("habit", "word"),
    ("accept-with-cue", "combination"),
    ("accept-with-cue", "template"),
    ("accept-with-cue", "word"),
    ("push-back", "combination"),
    ("push-back", "template"),
    ("push-back-with-cue", "combination"),
    ("code", "combination"),
    ("look-up", "combination"),
    ("arithmetic", "combination"),
    ("copy", "combination"),
    ("feeling", "seen"),
    ("self-description", "seen"),
)
"""Category and kind of held-out text, in the order of the card."""

TEACHING = {"lr": 3e-4, "note": "the rate of examples/listening: six corrections, APOLLO, about 13 steps"}
"""What a server takes as this model's learning rate where a lesson names none."""
WANTED: dict[str, float] = {"habit": 0.9, "code": 0.9, "look-up": 0.5}
"""What this first version promises on held-out combinations; the card says where it falls short."""


def interval(passed: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a rate (Clopper and Pearson 1934)."""
    alpha = 1.0 - confidence
    low = 0.0 if passed == 0 else float(beta.ppf(alpha / 2, passed, n - passed + 1))
    high = 1.0 if passed == n else float(beta.ppf(1 - alpha / 2, passed + 1, n - passed))
    return low, high


def figure(passed: list[bool]) -> dict[str, float | int]:
    """Counts, rate and interval of a list of outcomes."""
    low, high = interval(sum(passed), len(passed))
    return {
        "n": len(passed),
        "passed": sum(passed),
        "rate": round(sum(passed) / len(passed), 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }


def evaluate(
    model: Qwen3_5ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    num_cases: int = 300,
    seed: str = "evaluation",
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Every figure of the plan, and the failed answers (at most five of each row)."""
    from secondnature.embedded.answers import greedy, passes

    rows: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    for category, held in PLAN:
        chosen: list[Case] = list(cases(category, num_cases, seed, held=held))
        answers = greedy(model, tokenizer, [c.prompt for c in chosen])
        good = [passes(c, a) for c, a in zip(chosen, answers, strict=True)]
        by_kind: dict[str, list[bool]] = defaultdict(list)
        for case, passed in zip(chosen, good, strict=True):
            by_kind[case.kind].append(passed)
        kinds = {k: figure(v) for k, v in sorted(by_kind.items())}
        rows.append({"category": category, "held_out": held, **figure(good), "kinds": kinds})
        wrong = [(c, a) for c, a, g in zip(chosen, answers, good, strict=True) if not g]
        failures += [
            {
                "category": category,
                "held_out": held,
                "prompt": c.prompt[-1]["content"],
                "answer": a,
                "wanted": c.answer,
            }
            for c, a in wrong[:5]
        ]
    return rows, failures


def remembered_tokens(
    model: Qwen3_5ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> dict[str, list[dict[str, float]]]:
    """Effective decay length of each GatedDeltaNet head in tokens, over 64 held-out prompts."""
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
        for case in cases("accept-with-cue", 64, "decay"):
            ids, _ = encode_document(tokenizer, case.prompt)
            model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return decay_lengths({index: torch.cat(g) for index, g in seen.items()})


def _training(settings: Settings | None, found: dict[str, Any]) -> dict[str, Any]:
    if settings is None:
        return found.get("training", {})
    command = f"python -m secondnature.embedded.build --seed {settings.seed} --tokens {settings.tokens}"
    return {"command": command, "settings": asdict(settings)}


def write_card(
    directory: Path, num_cases: int = 300, curve: Path | None = None, settings: Settings | None = None
) -> dict[str, Any]:
    """Evaluate the model in `directory` and write card.json and README.md there; returns the card.

    Without `curve` and `settings` those parts are taken over from the card that is there.
    """
    from secondnature.embedded.build import load_model
    from secondnature.embedded.model_card import readme

    old = directory / "card.json"
    found: dict[str, Any] = json.loads(old.read_text()) if old.exists() else {}
    model, tokenizer = load_model(directory)
    rows, failures = evaluate(model, tokenizer, num_cases)
    points = [json.loads(x) for x in curve.read_text().splitlines()] if curve else found.get("curve", [])
    config = model.config
    card: dict[str, Any] = {
        "format_version": 1,
        "model": {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "hidden_size": config.hidden_size,
            "layers": list(config.layer_types or []),
            "vocabulary": config.vocab_size,
            "tied_head": config.tie_word_embeddings,
            "dtype": "bfloat16",
        },
        "training": _training(settings, found),
        "teaching": TEACHING,
        "evaluation": rows,
        "short_of_promise": [
            r["category"]
            for r in rows
            if r["held_out"] == "combination" and r["rate"] < WANTED.get(r["category"], 0.0)
        ],
        "decay_lengths_tokens": remembered_tokens(model, tokenizer),
        "curve": points,
        "failures": failures,
    }
    old.write_text(json.dumps(card, indent=1) + "\n")
    (directory / "README.md").write_text(readme(card))
    return card


def main(arguments: list[str] | None = None) -> int:
    """Evaluate a directory (default: the shipped weights)."""
    from secondnature.embedded import path

    parser = argparse.ArgumentParser(prog="python -m secondnature.embedded.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=path())
    parser.add_argument("--cases", type=int, default=300, help="cases per category")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    card = write_card(args.model, args.cases)
    for row in card["evaluation"]:
        span = f"{row['low']:.3f} to {row['high']:.3f}"
        print(f"{row['category']:<20}{row['held_out']:<13}{row['passed']:>4} of {row['n']:<4} {span}")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
