"""`lessons log|show|keep|revert`, `train` and `checkpoint`: one route each (process D)."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from secondnature.cli.connect import Where, open_server
from secondnature.cli.follow import Interrupted, Interrupts, why_stopped
from secondnature.cli.learn import interrupted, teach
from secondnature.cli.output import Output
from secondnature.cli.progress import waiting
from secondnature.errors import BadRecord, SecondnatureError
from secondnature.records import Lesson, StepMetric, describe, parse_json
from secondnature.wire import Client, PhaseProgress, PruneRequest, TrainRequest


def log(where: Where, out: Output) -> int:
    """Every lesson, oldest first."""
    with open_server(where, out, start="known") as server:
        answer = server.client.lessons()
    table = Table(*("id", "state", "behaviour", "steps", "verdict", "when", "version"), box=None)
    for lesson in answer.lessons:
        state = "taken back" if lesson.reverted_by else lesson.state.replace("_", " ")
        cells = (lesson.id, state, lesson.behaviour or "-", str(lesson.steps))
        when = f"{lesson.created_at.astimezone():%Y-%m-%d %H:%M}"
        table.add_row(*(Text(c) for c in (*cells, lesson.verdict or "-", when, lesson.version or "-")))
    if answer.lessons:
        out.say(table)
    else:
        out.say("no lessons yet")
    out.say(f"weights {answer.weights_version}{', on trial' if answer.trial else ''}")
    out.result(answer)
    return 0


def show(lesson_id: str, where: Where, out: Output) -> int:
    """One lesson: what it taught, how it ended, its evidence."""
    with open_server(where, out, start="known") as server:
        detail = server.client.lesson(lesson_id)
    lesson = detail.lesson
    from secondnature.report.words import drift

    steps = [StepMetric.from_disk(m) for m in detail.metrics if m.get("kind") == "step" and m.get("kl")]
    rows = {
        "lesson": f"{lesson.id} ({lesson.kind})",
        "state": lesson.state.replace("_", " "),
        "why": lesson.error.message if lesson.error else lesson.reason,
        "behaviour": lesson.behaviour,
        "note": lesson.note,
        "corrections": str(len(detail.corrections)),
        "steps": f"{lesson.steps}" + (f", last loss {lesson.loss:.4g}" if lesson.loss is not None else ""),
        "stopped": why_stopped(lesson.stopped_by),
        "moved": drift(steps),
        "weights": f"{lesson.parent or '-'} -> {lesson.version or '-'}",
        "from": _origin(lesson),
        "reverts": lesson.reverts,
        "reverted by": lesson.reverted_by,
        "settings": json.dumps(lesson.settings, ensure_ascii=False) if lesson.settings else None,
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        if value:
            out.say(f"{name:<{width}}  {value}")
    if detail.evidence is not None:
        from secondnature.report.table import before_after_table

        out.say(before_after_table(detail.evidence))
    out.result(detail)
    return 0


def _origin(lesson: Lesson) -> str | None:
    """Where a lesson was taught; None: here."""
    if lesson.imported is None:
        return None
    words = {True: ": its very bytes", False: ": its difference, added to other weights", None: ""}
    return f"{lesson.imported.model_name}, lesson {lesson.imported.lesson}{words[lesson.imported.exact]}"


def keep(lesson_id: str, where: Where, out: Output) -> int:
    """Keep a lesson that is on trial."""
    with open_server(where, out, start="known") as server:
        lesson = server.client.keep(lesson_id)
        out.say(f"{lesson.id} kept; weights {lesson.version or '-'}")
        out.say(f"undo:   {server.command('lessons', 'revert', lesson.id)}")
    out.result(lesson)
    return 0


def revert(lesson_id: str, where: Where, out: Output) -> int:
    """Undo a lesson to the byte."""
    with open_server(where, out, start="known") as server:
        with waiting(out, f"undoing {lesson_id}"):
            lesson = server.client.revert(lesson_id)
        version = server.client.health().weights_version
    entry = f" (entry {lesson.id} of the log)" if lesson.kind == "revert" else ""
    out.say(f"{lesson_id} undone{entry}; weights {version}")
    out.result(lesson)
    return 0


def prune(request: PruneRequest, where: Where, out: Output) -> int:
    """Remove what no undo within reach needs, and say what can still be undone."""
    with open_server(where, out, start="known") as server, waiting(out, "pruning"):
        reply = server.client.prune(request)
    for path in reply.removed:
        out.say(path)
    would = "would be " if reply.dry_run else ""
    files = f"{len(reply.removed):,} file{'s'[: len(reply.removed) != 1]}"
    out.say(f"{files}, {reply.nbytes / 1e6:,.1f} MB, {would}removed")
    num, stated = len(reply.undoable), len(reply.undoable_with_state)
    newest = f", {reply.undoable[0]} first" if reply.undoable else ""
    out.say(f"can be undone: {num:,} lesson{'s'[: num != 1]}{newest}; {stated:,} with the optimizer's state")
    out.result(reply)
    return 0


def checkpoint(where: Where, out: Output) -> int:
    """Bring the working copy up to date now."""
    with (
        open_server(where, out, start="known") as server,
        waiting(out, "writing the working copy", lambda: _written(server.client)),
    ):
        reply = server.client.checkpoint()
    out.say(f"{reply.path}: weights {reply.weights_version}")
    out.result(reply)
    return 0


def _written(client: Client) -> PhaseProgress | None:
    """How far a working copy is that is being written; None where nobody says it."""
    try:
        return client.checkpoint_state().progress
    except SecondnatureError:
        return None


def train(file: Path, where: Where, report: Path | None, out: Output) -> int:
    """Post a body of `POST /v1/train` from a file and follow the job; the exit code is that of `learn`.

    Raises:
        BadRecord: the file is missing, not JSON or not such a body.
    """
    try:
        request = TrainRequest.model_validate(parse_json(file.read_bytes(), where=str(file)))
    except OSError as e:
        raise BadRecord(f"{file}: {e.strerror or e}", "check the path") from None
    except ValidationError as e:
        raise BadRecord(f"{file}: {describe(e)}", "see docs/reference/routes.md, POST /v1/train") from None
    with open_server(where, out, start="never") as server, Interrupts() as interrupts:
        try:
            return teach(server, request, report, out, interrupts)
        except Interrupted as e:
            return interrupted(server, e.status, out)
