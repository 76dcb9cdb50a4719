"""One self-contained HTML file and its JSON from one or more run directories (process D: cli, client).

The page asks nothing of the network (its content security policy forbids it), needs no script, and shows nothing
that is not in the directories. The same run gives the same bytes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from secondnature.errors import BadInput, StorageError
from secondnature.records.visible import visible
from secondnature.report import svg
from secondnature.report.run import ReportData, Run, read_run
from secondnature.report.view import view
from secondnature.report.words import MARKS

_HERE = Path(__file__).parent


def write(lesson_dir: Path, out: Path, options: Sequence[str] = ()) -> Path:
    """Write the report of one lesson to `out` (an .html file) and its data beside it as JSON; returns `out`.

    `options`: of the commands that it proposes, which lead them to the server (`--home`, `--url`).

    Raises:
        BadInput: `out` is no .html file.
        NotFound, BadRecord, TooLarge: the run directory cannot be read (see `read_run`).
        StorageError: the files cannot be written.
    """
    return write_many([lesson_dir], out, options)


def write_many(lesson_dirs: Sequence[Path], out: Path, options: Sequence[str] = ()) -> Path:
    """Write one report over several lessons, a summary first; else like `write`."""
    if out.suffix.lower() not in {".html", ".htm"}:
        raise BadInput(f"{out}: expected a name that ends in .html", "the data is written beside it as .json")
    if not lesson_dirs:
        raise BadInput(
            "no lesson was given; expected at least one directory", "see `secondnature lessons log`"
        )
    runs = [read_run(directory) for directory in lesson_dirs]
    _replace(out.with_suffix(".json"), ReportData(runs=runs).model_dump_json(indent=1) + "\n")
    _replace(out, render(runs, options))
    return out


def render(runs: Sequence[Run], options: Sequence[str] = ()) -> str:
    """The page over `runs` as HTML."""
    page = _template().render(
        views=[view(run, options) for run in runs],
        css=Markup((_HERE / "report.css").read_text("utf-8")),  # noqa: S704
        heat_levels=range(1, svg.HEAT_LEVELS + 1),
        marks=MARKS,
    )
    return visible(page)


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as e:
        raise StorageError(f"{path}: {e.strerror or e}", "free space, or choose another place") from None
