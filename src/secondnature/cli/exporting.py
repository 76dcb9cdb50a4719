"""`export`, `lessons recall`, `import-lesson`: what leaves the home, and what comes from another (process D).
(process D).

The server writes, on its own machine, from what its disk holds; here a path is made whole, the form is found by how
it ends, and progress is shown.
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table
from rich.text import Text

from secondnature.cli.connect import Where, open_server
from secondnature.cli.follow import Interrupted, Interrupts, follow
from secondnature.cli.learn import check_report_path, conclude, interrupted, write_report
from secondnature.cli.output import Output
from secondnature.cli.progress import display, waiting
from secondnature.errors import BadInput, SecondnatureError
from secondnature.records import Evidence, Export, ExportForm, Probe, read_jsonl
from secondnature.wire import Client, ExportRequest, ImportLessonRequest, PhaseProgress

SUFFIXES: dict[str, ExportForm] = {".lesson": "lesson", ".gguf": "gguf"}
"""How the path of a form ends; a folder is a checkpoint."""


def export(request: ExportRequest, where: Where, out: Output, *, check: bool = False) -> int:
    """Have the server write it, and say what it holds.

    Args:
        check: ask an adapter the probes of its lesson, on a copy of the model.

    Raises:
        SecondnatureError: what the server said; nothing is left then.
    """
    if check and (request.form != "lora" or request.lesson is None):
        raise BadInput("--check asks the adapter of one lesson", "name the lesson, and --as lora")
    with (
        open_server(where, out, start="known") as server,
        waiting(out, "exporting", lambda: _written(server.client)),
    ):
        found = server.client.export(request)
        evidence = server.client.lesson(request.lesson).evidence if check and request.lesson else None
    out.say(f"{found.path}: {found.nbytes / 1e6:,.1f} MB, weights {found.weights_version}")
    out.say(f"lessons in it: {', '.join(found.lessons) or 'none'}")
    if found.form == "lora":
        told = found.details
        out.say(
            f"rank {told['rank']}, {told['tensors']} linear layers; it lacks {told['relative_error']:.1%} (norm) "
            f"of {told['of']}; {told['left_out']} other tensors that changed are not in it"
        )
    checked = _checked(found, evidence, out) if check else None
    out.result({**found.model_dump(mode="json"), **({} if checked is None else {"check": checked})})
    return 0


def _checked(adapter: Export, evidence: Evidence | None, out: Output) -> list[dict[str, object]]:
    """Ask the adapter the probes of its lesson; beside it what the lesson's certificate says of the whole lesson.

    Raises:
        BadInput: the lesson has no probes, or the adapter is on another machine.
    """
    folder = Path(adapter.path)
    probes = read_jsonl(folder / "probes.jsonl", Probe)
    base = Path(json.loads((folder / "secondnature.json").read_text(encoding="utf-8"))["base"])
    with display(out) as shown:
        shown.show("loading", None)
        from secondnature.serve.adapter import passed

        found = passed(base, folder, probes, shown.show)
    whole = {(c.name, c.role == "other"): c for c in evidence.comparisons} if evidence is not None else {}
    rows: list[dict[str, object]] = []
    table = Table("probes", "n", "before", "the lesson", "the adapter", box=None)
    for (name, side), (right, n) in sorted(found.items()):
        c = whole.get((name, side == "other"))
        row: dict[str, object] = {"probes": name, "side": side, "n": n, "adapter": right}
        row |= {"before": c.before, "lesson": c.after} if c is not None else {}
        rows.append(row)
        cells = (name, str(n), str(c.before) if c else "-", str(c.after) if c else "-", str(right))
        table.add_row(*map(Text, cells))
    out.say(table)
    return rows


def request(
    lesson: str | None, out_path: Path, form: ExportForm | None, rank: int | None, dtype: str | None
) -> ExportRequest:
    """The body of `POST /v1/exports`. Raises BadInput: the options do not go together."""
    chosen = form or SUFFIXES.get(out_path.suffix, "checkpoint")
    if chosen == "lesson" and lesson is None:
        raise BadInput(
            "a lesson file holds one lesson, and none is named", "`secondnature lessons log` lists them"
        )
    if chosen in ("checkpoint", "gguf") and lesson is not None:
        raise BadInput(
            f"a {chosen} holds the weights as they are kept, not lesson {lesson} alone",
            "leave the lesson out, or name a file that ends with .lesson",
        )
    if rank is not None and chosen != "lora":
        raise BadInput(f"--rank is of an adapter, and this is a {chosen}", "add --as lora, or leave it out")
    if dtype is not None and chosen != "gguf":
        raise BadInput(f"--dtype is of a GGUF file, and this is a {chosen}", "add --as gguf, or leave it out")
    given = {"lesson": lesson, "rank": rank, "dtype": dtype}
    return ExportRequest.model_validate(
        {
            "form": chosen,
            "path": str(out_path.expanduser().absolute()),
            **{name: value for name, value in given.items() if value is not None},
        }
    )


def recall(lesson_id: str, where: Where, out: Output) -> int:
    """Every export that holds a lesson; the exit code: 1 where it was taken back, and one of them is there."""
    with open_server(where, out, start="known") as server:
        lesson = server.client.lesson(lesson_id).lesson
        found = server.client.exports(lesson.id).exports
    undone = lesson.state != "kept" or lesson.reverted_by is not None
    if found:
        table = Table("form", "path", "when", "weights", "there", box=None)
        for x in found:
            when = f"{x.exported_at.astimezone():%Y-%m-%d %H:%M}"
            cells = (x.form, x.path, when, x.weights_version, "yes" if _is_there(x) else "no")
            table.add_row(*map(Text, cells))
        out.say(table)
    state = f"taken back by {lesson.reverted_by}" if lesson.reverted_by else lesson.state.replace("_", " ")
    exports = f"{len(found)} export{'s'[: len(found) != 1]}"
    out.say(f"{lesson.id} is {state}; {exports} hold{'s' if len(found) == 1 else ''} it")
    out.result({"lesson": lesson.id, "undone": undone, "exports": [x.model_dump(mode="json") for x in found]})
    return int(undone and any(map(_is_there, found)))


def _is_there(export: Export) -> bool:
    try:
        return Path(export.path).exists()
    except OSError:
        return False


def _written(client: Client) -> PhaseProgress | None:
    """How far the export is; None where nobody says it."""
    try:
        return client.exports().progress
    except SecondnatureError:
        return None


def import_lesson(body: ImportLessonRequest, report: Path | None, where: Where, out: Output) -> int:
    """Add a lesson that was taught elsewhere, and follow it; the exit code is that of `learn`.

    Raises:
        SecondnatureError: it is refused (nothing was written), or what the server said.
    """
    if report is not None:
        check_report_path(report)
    with open_server(where, out) as server, Interrupts() as interrupts:
        try:
            with waiting(out, "checking the lesson file"):
                reply = server.client.import_lesson(body)
            status = follow(server.client, reply.job, out, interrupts, judged=False)
            detail = server.client.lesson(status.lesson)
            if report is not None:
                write_report(detail, report, server.where)
            return conclude(server, status, detail, report, out)
        except Interrupted as e:
            return interrupted(server, e.status, out)
