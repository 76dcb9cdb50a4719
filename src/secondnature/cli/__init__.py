"""The command line: thin, and everything it does it does through the routes (process D).

Importing this package, and `secondnature --help`, imports neither torch nor transformers: each command imports what
it needs when it runs. `main` is the one place where an exception becomes a line and an exit code:
0 kept (or done), 1 undone or failed, 2 inconclusive, 64 bad input, 69 nobody answers, 130 ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from secondnature.errors import BadCheckpoint, Busy, HomeInUse, SecondnatureError, Unreachable

__all__ = ["main"]

FAILED, INCONCLUSIVE, USAGE, UNAVAILABLE, INTERRUPTED = 1, 2, 64, 69, 130
"""Exit codes besides 0; 64 and 69 are those of sysexits.h."""


class Finished(Exception):
    """A command has ended with this exit code (keeps ours apart from those of the option parser)."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def exit_code(error: SecondnatureError) -> int:
    """69: nobody answers, or not now; 64: what was asked for is wrong; 1: everything else."""
    if isinstance(error, (Unreachable, Busy, HomeInUse)):
        return UNAVAILABLE
    wrong = error.status in (400, 401, 404, 413) or isinstance(error, BadCheckpoint)
    return USAGE if wrong else FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    from secondnature.cli.app import app

    args = list(sys.argv[1:] if argv is None else argv)
    try:
        app(args, prog_name="secondnature")
    except Finished as e:
        return e.code
    except SystemExit as e:  # the option parser's own: --help, or a usage error
        return USAGE if e.code == 2 else int(e.code or 0)
    except SecondnatureError as e:
        if "--debug" in args:
            raise
        _print_error(e, as_json="--json" in args)
        return exit_code(e)
    return 0


def _print_error(error: SecondnatureError, *, as_json: bool) -> None:
    """One line with the type and the message, one with what to do; for machines the error of the wire on stdout."""
    from secondnature.cli.output import Output, write_json

    if as_json:
        write_json({"error": error.to_wire()})
    out = Output(as_json=as_json)
    out.note(f"{error.type}: {error.message}", style="bold red")
    if error.hint:
        out.note(f"  {error.hint}")
