"""What every command's grammar shares: the options that name a server, and how a command ends (process D)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from secondnature.cli import INTERRUPTED, Finished
from secondnature.errors import SecondnatureError, Unreachable

if TYPE_CHECKING:
    from secondnature.cli.connect import Where

__all__ = ["HomeOption", "JsonOption", "ModelOption", "ProbesOption", "UrlOption", "command"]

P = ParamSpec("P")
HomeOption = Annotated[Path | None, typer.Option("--home", help="Where lessons, corrections and key lie.")]
UrlOption = Annotated[str | None, typer.Option("--url", help="A server that runs already.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="A Hugging Face checkpoint's directory, a .gguf file, `embedded`, or `smollm2`."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
ProbesOption = Annotated[Path | None, typer.Option("--probes", help="JSONL of held-out checks.")]


def command(run: Callable[P, int]) -> Callable[P, None]:
    """A command whose exit code is ours, and in which ctrl-C is no traceback."""

    @functools.wraps(run)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        from pydantic import ValidationError

        try:
            code = run(*args, **kwargs)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except SecondnatureError as e:  # what to do is said as it can be typed
            e.hint = _where(kwargs).complete(e.hint)
            raise
        except ValidationError as e:  # our own input is checked where it is read: this is an answer
            raise Unreachable(
                f"the server's answer is not a {e.title} of this version",
                "are client and server the same version?",
            ) from e
        raise Finished(code)

    return wrapped


def _where(options: Mapping[str, object]) -> Where:
    from secondnature.cli.connect import Where

    home, url = options.get("home"), options.get("url")
    return Where(home if isinstance(home, Path) else None, url if isinstance(url, str) else None)
