"""The parts of `gpu_battery.sh` that are no stage: our entry points for vLLM to find, and the results put together.

    python benchmarks/gpu_battery.py entry-points FOLDER     # a distribution that is nothing but entry points
    python benchmarks/gpu_battery.py gather OUT              # benchmarks/gpu.json and the table of docs/gpu.md

Needs nothing but Python. A rehearsal on a null GPU is gathered into OUT only: its numbers mean nothing.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STAGES = ("facts", "eager", "graphs", "flash", "step27b", "step2b")
BEGIN, END = "<!-- table: the battery -->\n", "<!-- end -->"


def entry_points(folder: Path) -> None:
    """What an installed secondnature tells vLLM: which plug-ins there are."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    about = folder / f"secondnature-{project['version']}.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: secondnature\nVersion: {project['version']}\n"
    )
    lines: list[str] = []
    for group, found in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {where}" for name, where in found.items())]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")


def gather(out: Path) -> dict[str, Any]:
    """What each stage found, by its name; a stage that did not end is not there."""
    return {n: json.loads((out / f"{n}.json").read_text()) for n in STAGES if (out / f"{n}.json").is_file()}


def table(found: Mapping[str, Any]) -> str:
    """The figures that the issue of a GPU turns on, as a table in Markdown."""
    rows: list[tuple[str, object]] = []
    facts = found.get("facts", {})
    if facts:
        rows.append(("card, torch", f"{facts['card']}, {facts['torch']}"))
        rows.append(("a context of another process", f"{facts['memory of its context (MiB)']} MiB"))
    for name, title in (("eager", "eager"), ("graphs", "CUDA graphs"), ("flash", "FlashAttention 3")):
        one = found.get(name)
        if not one:
            continue
        alone, beside = one["a token, nobody training"], one["a token, while training"]
        rows += [
            (f"{title}: what must hold and does not", ", ".join(one["broken"]) or "nothing"),
            (f"{title}: a step", f"{one['a step (s)']} s"),
            (f"{title}: a token alone, p50 / p99", f"{alone['p50_ms']} / {alone['p99_ms']} ms"),
            (f"{title}: a token while training, p50 / p99", f"{beside['p50_ms']} / {beside['p99_ms']} ms"),
            (f"{title}: the undo", f"{one['undo (s)']} s"),
        ]
    for name, title in (("step27b", "27B"), ("step2b", "2B")):
        for step in found.get(name, {}).get("steps", []):
            what = f"{title}, {step['answers']} answers"
            rows.append((f"{what}: a step", f"{step['step_seconds']:.2f} s"))
            rows.append((f"{what}: of the card's limit", f"{100 * step['of_limit']:.0f} %"))
            rows.append((f"{what}: peak", f"{(step['peak_bytes'] or 0) / 1e9:.1f} GB"))
    return "".join(f"| {a} | {b} |\n" for a, b in [("what", "found"), ("---", "---"), *rows])


def main(words: list[str]) -> int:
    """The command."""
    if len(words) != 2 or words[0] not in ("entry-points", "gather"):
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(words[1])
    if words[0] == "entry-points":
        entry_points(folder)
        return 0
    found = gather(folder)
    print(table(found))
    rehearsed = any(one.get("null") for one in found.values())
    target = folder / "battery.json" if rehearsed else ROOT / "benchmarks" / "gpu.json"
    if not found:
        print("no stage has left a result", file=sys.stderr)
        return 1
    target.write_text(json.dumps(found, indent=1) + "\n")
    page = ROOT / "docs" / "gpu.md"
    text = page.read_text()
    if not rehearsed and BEGIN in text:
        before, rest = text.split(BEGIN, 1)
        page.write_text(before + BEGIN + table(found) + END + rest.split(END, 1)[1])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
