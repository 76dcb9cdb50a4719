"""`secondnature lint`: what may be wrong with the files of a lesson, without a server or a model (process D)."""

from __future__ import annotations

from pathlib import Path

from secondnature.cli import FAILED
from secondnature.cli.learn import tell
from secondnature.cli.output import Output
from secondnature.cli.sources import LearnFlags, read_sources

__all__ = ["lint"]


def lint(source: Path, probes: Path | None, out: Output) -> int:
    """Read a lesson's files and say what may be wrong; the exit code: 0 nothing, 1 something.

    Raises:
        BadRecord, TooLarge: a file that cannot be read.
    """
    sources = read_sources(source, LearnFlags(probes=probes))
    findings = sources.findings()
    tell(findings, out)
    num, asked = len(sources.corrections or []), len(sources.probes)
    word = "nothing" if not findings else f"{len(findings)} thing{'s'[: len(findings) != 1]}"
    out.say(f"{num:,} corrections, {asked:,} probes: {word} to look at")
    out.result({"findings": [vars(f) for f in findings]})
    return FAILED if findings else 0
