"""Hooks of coding agents: what is put into their own configuration so that ended sessions are imported (client).

Merged into what is there, never over it; what was put there is known again by its command and can be taken out.
A file that cannot be understood, or that has another hook in the only place, is refused and left as it is.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from secondnature.errors import BadInput, BadRecord
from secondnature.importers.turns import as_object

__all__ = ["AGENTS", "Change", "log_of", "plan_change"]

AGENTS = ("claude-code", "codex")
OURS = re.compile(r"\bhooks['\", ]+run['\", ]+(claude-code|codex)\b")
"""How a command of ours is known again."""
NOTE = "# secondnature: sessions that have ended are imported as candidates"


@dataclass(frozen=True)
class Change:
    """A file of an agent's configuration, as it is and as it shall be."""

    path: Path
    before: str
    after: str


def plan_change(
    agent: str, command: list[str], *, remove: bool, environ: Mapping[str, str] = os.environ
) -> Change:
    """What would be written; nothing is.

    Args:
        command: what the agent is to call.

    Raises:
        BadRecord: the file cannot be read or understood.
        BadInput: something else has the only place for a hook.
    """
    home = Path(environ.get("HOME") or Path.home())
    if agent == "claude-code":
        path, make = (
            Path(environ.get("CLAUDE_CONFIG_DIR") or home / ".claude") / "settings.json",
            _claude_code,
        )
    elif agent == "codex":
        path, make = Path(environ.get("CODEX_HOME") or home / ".codex") / "config.toml", _codex
    else:
        raise BadInput(f"no agent {agent[:40]!r}", f"one of: {', '.join(AGENTS)}")
    path = path.resolve()  # where the file is a link, what it leads to is written, and the link stays
    try:
        before = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        before = ""
    except (OSError, UnicodeDecodeError) as e:
        raise BadRecord(f"{path}: {e}", "mend the file first") from None
    maker = cast("Callable[[str, Path, list[str] | None], str]", make)
    return Change(path, before, maker(before, path, None if remove else command))


def _claude_code(before: str, path: Path, command: list[str] | None) -> str:
    """settings.json with our SessionEnd hook, or without."""
    try:
        found: Any = json.loads(before) if before.strip() else {}
    except (ValueError, RecursionError) as e:
        raise BadRecord(f"{path}: not JSON ({e})", "mend the file first") from None
    hooks: Any = as_object(found).get("hooks", {})
    entries: Any = as_object(hooks).get("SessionEnd", [])
    if not (isinstance(found, dict) and isinstance(hooks, dict) and isinstance(entries, list)):
        raise BadRecord(f"{path}: `hooks.SessionEnd` is not as Claude Code writes it", "mend the file first")
    settings, others = as_object(found), list[Any]()
    for entry in cast("list[Any]", entries):
        calls = [c for c in cast("list[Any]", as_object(entry).get("hooks") or []) if not _is_ours(c)]
        if calls or not as_object(entry).get("hooks"):
            others.append({**as_object(entry), "hooks": calls} if as_object(entry).get("hooks") else entry)
    if command is not None:
        others.append({"hooks": [{"type": "command", "command": shlex.join(command), "timeout": 60}]})
    hooks = {**as_object(hooks), "SessionEnd": others}
    if not others:
        del hooks["SessionEnd"]
    after = {**settings, "hooks": hooks}
    if not hooks:
        del after["hooks"]
    if after == found:
        return before
    return json.dumps(after, ensure_ascii=False, indent=2) + "\n"


def _is_ours(call: Any) -> bool:
    return OURS.search(str(as_object(call).get("command", ""))) is not None


def _codex(before: str, path: Path, command: list[str] | None) -> str:
    """config.toml with our `notify`, or without; all other lines stay as they are."""
    try:
        found = tomllib.loads(before)
    except (ValueError, RecursionError) as e:
        raise BadRecord(f"{path}: not TOML ({e})", "mend the file first") from None
    there: Any = found.get("notify")
    calls = " ".join(map(str, cast("list[Any]", there) if isinstance(there, list) else [there]))
    line = f"notify = {json.dumps(command, ensure_ascii=False)}\n"
    if there is None:
        return before if command is None else f"{NOTE}\n{line}{before}"  # before the first table
    if OURS.search(calls) is None:
        if command is None:
            return before
        raise BadInput(
            f"{path}: `notify` calls {there} already, and Codex has one place for it; nothing was changed",
            "let that program call `secondnature hooks run codex` with the same argument",
        )
    lines = before.splitlines(keepends=True)
    at = [i for i, text in enumerate(lines) if re.match(r"\s*notify\s*=", text) and OURS.search(text)]
    if len(at) != 1:
        raise BadRecord(f"{path}: `notify` is not on one line", "take it out by hand")
    start = at[0] - 1 if at[0] and lines[at[0] - 1].strip() == NOTE else at[0]
    new = [] if command is None else [f"{NOTE}\n", line]
    return "".join([*lines[:start], *new, *lines[at[0] + 1 :]])


def log_of(agent: str, payload: str, environ: Mapping[str, str] = os.environ) -> Path:
    """The log of the session of which an agent's hook tells.

    Args:
        payload: the JSON that the agent gave.

    Raises:
        BadInput: it names no session whose log is there.
    """
    try:
        told = as_object(json.loads(payload))
    except (ValueError, RecursionError):
        told = {}
    if agent == "claude-code":
        path = Path(str(told.get("transcript_path") or "/"))
    else:
        home = Path(environ.get("CODEX_HOME") or Path(environ.get("HOME") or Path.home()) / ".codex")
        name = str(told.get("thread-id") or told.get("thread_id") or "")
        found = (
            sorted((home / "sessions").rglob(f"rollout-*{name}.jsonl"))
            if re.fullmatch(r"[\w-]+", name)
            else []
        )
        path = found[-1] if found else Path("/")
    if not path.is_file():
        raise BadInput(f"{agent} named no session whose log is there", "is the hook called by the agent?")
    return path
