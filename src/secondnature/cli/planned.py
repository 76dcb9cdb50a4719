"""A dry run on the terminal: end of the context, what is taught, what is rejected, and what one might not expect
(process D). What is taught stands in brackets that no text can hide: spaces and line ends at its borders are seen.
"""

from __future__ import annotations

import json
from typing import Any

from secondnature.cli.output import Output
from secondnature.evidence.lint import Finding
from secondnature.records import Reaches
from secondnature.report.words import reaches

__all__ = ["show"]

MAX_ON_TERMINAL = 3
SAID = ("shown", "notes", "lint", "guards", "retention", "could_show")
"""Of a plan, what is said in words."""


def show(plan: dict[str, Any], out: Output) -> None:
    """Print what `POST /v1/train` with `dry_run` answered."""
    examples: list[dict[str, Any]] = plan.get("shown", [])
    for example in examples[:MAX_ON_TERMINAL]:
        out.say(f"{example['example']}", style="bold")
        out.say(f"  end of context  {_quoted(example['end_of_context'])}")
        if example["taught"]:
            out.say(
                f"  taught          {_quoted(example['taught'])}  ({example['num_taught_tokens']} tokens)"
            )
        if example["rejected"] is not None:
            out.say(f"  rejected        {_quoted(example['rejected'])}")
        for note in example["notes"]:
            out.say(f"  note            {note}", style="yellow")
    left = int(plan.get("num_examples", len(examples))) - min(len(examples), MAX_ON_TERMINAL)
    if left > 0:
        out.say(f"and {left:,} more (--json shows {len(examples)})")
    notes: dict[str, int] = plan.get("notes", {})
    for note, count in notes.items():
        out.say(f"{count:,} of them: {note}", style="yellow")
    for finding in plan.get("lint", []):
        out.say(f"lint: {Finding(**finding)}", style="yellow")
    if plan.get("num_skipped"):
        out.say(f"{plan['num_skipped']:,} corrections are skipped: this objective learns nothing from them")
    for pack in plan.get("guards", []):
        left = f", {pack['left_out']} left out (taught, or too long)" if pack["left_out"] else ""
        out.say(f"guarded by pack:{pack['pack']}: {pack['num']} probes of {pack['covers']}{left}")
    again: dict[str, dict[str, int]] = plan.get("retention", {})
    for name, number in again.get("sets", {}).items():
        out.say(f"asked again: {number} probes of {name}")
    for reason, number in again.get("left_out", {}).items():
        out.say(f"not asked again: {number} ({reason})")
    if plan.get("could_show"):
        out.say("what these probes could show", style="bold")
        for line in reaches(Reaches.model_validate(plan["could_show"])):
            out.say(f"  {line}")
    settings = {k: v for k, v in plan.items() if k not in SAID}
    out.say(json.dumps(settings, indent=2, ensure_ascii=False))
    out.say("nothing was trained")


def _quoted(text: str) -> str:
    return "⟦" + text.replace("\n", "\\n") + "⟧"
