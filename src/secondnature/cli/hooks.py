"""`secondnature hooks`: ended sessions of coding agents come in as candidates (process D).

`install` shows what it would change in the agent's own configuration, asks, and writes; `run` is what the agent
calls.
"""

from __future__ import annotations

import difflib
import shutil
import sys

from secondnature import storage
from secondnature.cli.connect import Where
from secondnature.cli.importing import Chosen, import_files
from secondnature.cli.output import Output
from secondnature.errors import BadInput
from secondnature.importers import Options
from secondnature.importers.hooks import log_of, plan_change

__all__ = ["install", "run"]


def install(agent: str, where: Where, out: Output, *, remove: bool, yes: bool) -> int:
    """Put the hook into the agent's configuration, or take it out.

    Raises:
        BadRecord, BadInput: the configuration is not to be understood, or nobody agreed; nothing was changed.
        StorageError: the disk refused.
    """
    found = shutil.which("secondnature")
    command = [found] if found else [sys.executable, "-m", "secondnature.cli"]
    command += ["hooks", "run", agent, *where.flags()]
    change = plan_change(agent, command, remove=remove)
    changed = change.after != change.before
    if changed:
        before, after = change.before.splitlines(), change.after.splitlines()
        for line in difflib.unified_diff(before, after, str(change.path), str(change.path), lineterm="", n=2):
            out.say(line)
        if not yes:
            if not (sys.stdin.isatty() and out.err.is_terminal):
                raise BadInput(
                    "nothing was changed: there is no terminal on which to ask", "--yes says yes beforehand"
                )
            out.note("write this? [y/N] ", end="")
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                raise BadInput("nothing was changed: the answer was no")
        with storage.storage_errors(change.path):
            change.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = change.path.stat().st_mode & 0o777 if change.path.exists() else 0o600
        storage.write_text(change.path, change.after)
        with storage.storage_errors(change.path):
            change.path.chmod(mode)
    done = "removed from" if remove else "installed in"
    out.say(f"{done} {change.path}" if changed else f"{change.path}: nothing to change")
    out.result({"agent": agent, "path": str(change.path), "changed": changed})
    return 0


def run(agent: str, payload: str | None, where: Where, out: Output) -> int:
    """Import the log of the session that an agent's hook tells of; what a server does not get now is not lost: the
    agent keeps its logs, and `secondnature import` reads them later.

    Raises:
        BadInput: the payload names no log.
        Unreachable: no server runs.
    """
    path = log_of(agent, payload if payload is not None else sys.stdin.read(1_000_000))
    chosen = Chosen(Options(), form=agent, yes=True, skip_bad=True, start="never")
    return import_files([path], chosen, where, out)
