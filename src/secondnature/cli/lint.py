"""`secondnature lint`: what may be wrong with the files of a lesson (process D).

Reading them needs neither a server nor a model. Where a server runs, its model is asked too: the form of the wanted
answers beside its own (a dry run of the lesson, which writes nothing).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secondnature.cli import FAILED
from secondnature.cli.connect import Where, open_server
from secondnature.cli.learn import tell
from secondnature.cli.output import Output
from secondnature.cli.sources import LearnFlags, Sources, read_sources
from secondnature.errors import Unreachable
from secondnature.evidence.lint import Finding
from secondnature.wire import TrainRequest

__all__ = ["lint"]

MAX_SENT = 200
"""Corrections that are sent to be asked; it asks some of them."""


def lint(source: Path, probes: Path | None, where: Where, out: Output) -> int:
    """Read a lesson's files and say what may be wrong; the exit code: 0 nothing, 1 something.

    Raises:
        BadRecord, TooLarge: a file that cannot be read.
        SecondnatureError: what the server said; Unreachable: `--url` names one that does not answer.
    """
    sources = read_sources(source, LearnFlags(probes=probes))
    findings, asked = sources.findings(), _of_the_model(sources, where, out)
    if asked is not None:  # its own form decides, and not what is common
        findings = [f for f in findings if f.kind != "bare answers"] + asked
    tell(findings, out)
    num, num_probes = len(sources.corrections or []), len(sources.probes)
    word = "nothing" if not findings else f"{len(findings)} thing{'s'[: len(findings) != 1]}"
    out.say(f"{num:,} corrections, {num_probes:,} probes: {word} to look at")
    out.result({"findings": [vars(f) for f in findings]})
    return FAILED if findings else 0


def _of_the_model(sources: Sources, where: Where, out: Output) -> list[Finding] | None:
    """What a model that is served says of the form; None: no server runs, or no answer is written."""
    written = [c for c in sources.corrections or [] if c.chosen is not None]
    sent = (
        [written[i * len(written) // MAX_SENT] for i in range(MAX_SENT)]
        if len(written) > MAX_SENT
        else written
    )
    if not sent:
        return None
    request: dict[str, Any] = {
        "corrections": sent,
        "objective": "sft",
        "dry_run": True,
        "replay": {"share": 0.0},
    }
    try:
        with open_server(where, out, start="never") as server:
            plan = server.client.train(TrainRequest.model_validate(request)).plan or {}
    except Unreachable:
        if where.url is not None:
            raise
        out.note("no server runs, so the model's own form was not asked")
        return None
    return [Finding(**f) for f in plan.get("lint", [])]
