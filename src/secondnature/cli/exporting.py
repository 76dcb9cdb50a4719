"""`secondnature export`, `lessons recall`: what leaves the home, and which of it holds a lesson (process D).

The server writes, on its own machine, from what its disk holds; here a path is made whole, the form is found by how
it ends, and progress is shown.
"""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from secondnature.cli.connect import Where, open_server
from secondnature.cli.output import Output
from secondnature.cli.progress import waiting
from secondnature.errors import BadInput, SecondnatureError
from secondnature.records import Export, ExportForm
from secondnature.wire import Client, ExportRequest, PhaseProgress

SUFFIXES: dict[str, ExportForm] = {".lesson": "lesson", ".gguf": "gguf"}
"""How the path of a form ends; a folder is a checkpoint."""


def export(request: ExportRequest, where: Where, out: Output) -> int:
    """Have the server write it, and say what it holds.

    Raises:
        SecondnatureError: what the server said; nothing is left then.
    """
    with (
        open_server(where, out, start="known") as server,
        waiting(out, "exporting", lambda: _written(server.client)),
    ):
        found = server.client.export(request)
    out.say(f"{found.path}: {found.nbytes / 1e6:,.1f} MB, weights {found.weights_version}")
    out.say(f"lessons in it: {', '.join(found.lessons) or 'none'}")
    out.result(found)
    return 0


def request(lesson: str | None, out_path: Path, form: ExportForm | None) -> ExportRequest:
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
    return ExportRequest(form=chosen, path=str(out_path.expanduser().absolute()), lesson=lesson)


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
