"""`secondnature fsck`: is everything in this home as it was written? (process D; imports torch to replay the chain)

Beside `doctor`, which asks a running server: this reads the files of a home that none holds, and changes nothing.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from rich.text import Text

from secondnature import config
from secondnature.cli import FAILED
from secondnature.cli.output import Output
from secondnature.cli.progress import display
from secondnature.errors import BadInput
from secondnature.wire import PhaseProgress

COLOURS = {"damaged": "red", "note": "yellow"}


def fsck(home: Path | None, out: Output) -> int:
    """Read a home; the exit code: 1 if something is damaged.

    Raises:
        BadInput: there is no such home.
        HomeInUse: a server holds it.
    """
    settings = config.load({"home": home})
    path = settings.home.expanduser().absolute()
    if not path.is_dir():
        raise BadInput(f"{path}: there is no such folder", "name a home with --home")
    with display(out) as shown:
        shown.show("loading", None)
        from secondnature.serve.fsck import check

        def on_progress(phase: str, progress: PhaseProgress | None) -> None:
            shown.show(phase, progress)

        found = check(path, on_progress)
    damaged = [f for f in found.findings if f.level == "damaged"]
    if found.findings:
        table = Table("file", "", "found", "do", box=None)
        for f in found.findings:
            table.add_row(Text(f.file), Text(f.level, style=COLOURS[f.level]), Text(f.found), Text(f.do))
        out.say(table)
    whole = f"{found.num_files:,} files, {found.num_lessons:,} lessons"
    if damaged:
        files = len({f.file for f in damaged})
        out.say(f"{path}: {files} of {whole} damaged; nothing was changed", style="bold red")
    else:
        weights = f", weights {found.weights_version}" if found.weights_version else ""
        out.say(f"{path} is whole: {whole}{weights}")
    out.result({"home": str(path), "ok": not damaged, **asdict(found)})
    return FAILED if damaged else 0
