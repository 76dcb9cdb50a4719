"""The grammar of `secondnature hooks`: nothing else, imports inside the commands (process D)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from secondnature.cli.grammar import HomeOption, JsonOption, UrlOption, command

__all__ = ["hooks_app"]

hooks_app = typer.Typer(help="Sessions of coding agents come in as candidates.", no_args_is_help=True)


class Agent(StrEnum):
    """A coding agent whose sessions are logged."""

    claude_code = "claude-code"
    codex = "codex"


@hooks_app.command()
@command
def install(
    agent: Annotated[Agent, typer.Argument(help="Whose configuration.")],
    remove: Annotated[bool, typer.Option("--remove", help="Take the hook out again.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> int:
    """Let a coding agent hand over each session that has ended: shows the change, and asks."""
    from secondnature.cli import hooks
    from secondnature.cli.connect import Where
    from secondnature.cli.output import Output

    return hooks.install(agent.value, Where(home, url), Output(as_json=as_json), remove=remove, yes=yes)


@hooks_app.command()
@command
def run(
    agent: Annotated[Agent, typer.Argument(help="Who calls.")],
    payload: Annotated[
        str | None, typer.Argument(metavar="[JSON]", help="What the agent tells. Default: from stdin.")
    ] = None,
    home: HomeOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> int:
    """What the agent calls: imports the session's log as candidates."""
    from secondnature.cli import hooks
    from secondnature.cli.connect import Where
    from secondnature.cli.output import Output

    return hooks.run(agent.value, payload, Where(home, url), Output(as_json=as_json))
