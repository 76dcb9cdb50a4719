"""The grammar of `secondnature lessons`: nothing else, imports inside the commands (process D)."""

from __future__ import annotations

from typing import Annotated

import typer

from secondnature.cli.grammar import HomeOption, JsonOption, UrlOption, command

__all__ = ["lessons_app"]

lessons_app = typer.Typer(
    help="The log: what was taught, with what evidence; keep it or undo it.", no_args_is_help=True
)
LessonArgument = Annotated[str, typer.Argument(metavar="ID", help="As in `lessons log`: 0001-listening.")]


@lessons_app.command()
@command
def log(home: HomeOption = None, url: UrlOption = None, as_json: JsonOption = False) -> int:
    """Every lesson, oldest first."""
    from secondnature.cli import lessons
    from secondnature.cli.connect import Where
    from secondnature.cli.output import Output

    return lessons.log(Where(home, url), Output(as_json=as_json))


@lessons_app.command()
@command
def show(
    lesson: LessonArgument, home: HomeOption = None, url: UrlOption = None, as_json: JsonOption = False
) -> int:
    """One lesson with its evidence."""
    from secondnature.cli import lessons
    from secondnature.cli.connect import Where
    from secondnature.cli.output import Output

    return lessons.show(lesson, Where(home, url), Output(as_json=as_json))


@lessons_app.command()
@command
def keep(
    lesson: LessonArgument, home: HomeOption = None, url: UrlOption = None, as_json: JsonOption = False
) -> int:
    """Keep a lesson that is on trial."""
    from secondnature.cli import lessons
    from secondnature.cli.connect import Where
    from secondnature.cli.output import Output

    return lessons.keep(lesson, Where(home, url), Output(as_json=as_json))


@lessons_app.command()
@command
def revert(
    lesson: LessonArgument, home: HomeOption = None, url: UrlOption = None, as_json: JsonOption = False
) -> int:
    """Undo a lesson to the byte."""
    from secondnature.cli import lessons
    from secondnature.cli.connect import Where
    from secondnature.cli.output import Output

    return lessons.revert(lesson, Where(home, url), Output(as_json=as_json))


@lessons_app.command()
@command
def recall(
    lesson: LessonArgument, home: HomeOption = None, url: UrlOption = None, as_json: JsonOption = False
) -> int:
    """List the exports that hold a lesson; 1 where it was taken back and one of them is still there."""
    from secondnature.cli import exporting
    from secondnature.cli.connect import Where
    from secondnature.cli.output import Output

    return exporting.recall(lesson, Where(home, url), Output(as_json=as_json))


@lessons_app.command()
@command
def prune(
    keep_states: Annotated[
        int | None,
        typer.Option("--keep-states", min=0, help="Undone with the optimizer's state. Default: a setting."),
    ] = None,
    keep_deltas: Annotated[
        int | None, typer.Option("--keep-deltas", min=0, help="Undone at all. Default: every lesson.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> int:
    """Remove what no undo within reach needs."""
    from secondnature.cli import lessons
    from secondnature.cli.connect import Where
    from secondnature.cli.output import Output
    from secondnature.wire import PruneRequest

    request = PruneRequest(keep_states=keep_states, keep_deltas=keep_deltas, dry_run=dry_run)
    return lessons.prune(request, Where(home, url), Output(as_json=as_json))
