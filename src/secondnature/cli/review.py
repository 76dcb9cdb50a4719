"""`secondnature review`: candidates in quarantine, kept, dropped or edited by a person (process D).

A candidate lies in the ledger and is not taught. Each decision is sent when it is made, so that one can stop at
any time and go on later. Without a terminal: `--keep` and `--drop` with ids.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import termios
import tty
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from secondnature.cli.connect import Where, open_server
from secondnature.cli.importing import show_record
from secondnature.cli.output import Output
from secondnature.errors import BadInput, BadRecord, NotFound
from secondnature.records import Correction, describe, parse_json
from secondnature.wire import Client

__all__ = ["review"]

EDITABLE = ("prompt", "said", "chosen", "rejected", "feedback", "rating", "behaviour")
KEYS = "k keep   d drop   e edit and keep   s later   q stop"
ALL = "all"


def review(keep: list[str], drop: list[str], where: Where, out: Output) -> int:
    """Decide on the candidates: those that are named, or each in turn on a terminal.

    Raises:
        NotFound: there is no candidate of that id.
        BadInput: the same one is to be kept and dropped.
    """
    with open_server(where, out, start="known") as server:
        waiting = {str(c.id): c for c in server.client.corrections() if c.state == "candidate"}
        if keep or drop:
            kept, dropped = _named(keep, waiting), _named(drop, waiting)
            both = sorted({str(c.id) for c in kept} & {str(c.id) for c in dropped})
            if both:
                raise BadInput(f"{both[0]} is to be kept and to be dropped", "name it once")
            _keep(server.client, kept)
            for correction in dropped:
                _drop(server.client, correction)
            left = len(waiting) - len(kept) - len(dropped)
        elif out.as_json or not (sys.stdin.isatty() and out.err.is_terminal):
            out.result({"candidates": [_plain(c) for c in waiting.values()]})
            for correction in waiting.values():
                out.say(f"\n{correction.id}", style="bold")
                show_record(correction, out)
            if waiting:
                out.note(f"decide: {server.command('review', '--keep', 'ID', '--drop', 'ID')}")
            out.say(f"{len(waiting):,} candidates")
            return 0
        else:
            kept, dropped, left = _each(server.client, list(waiting.values()), out, _key)
    out.say(f"{len(kept):,} kept, {len(dropped):,} dropped, {left:,} left")
    out.result({"kept": [str(c.id) for c in kept], "dropped": [str(c.id) for c in dropped], "left": left})
    return 0


def _plain(correction: Correction) -> dict[str, Any]:
    return correction.model_dump(mode="json", exclude_none=True)


def _named(ids: list[str], waiting: dict[str, Correction]) -> list[Correction]:
    if ALL in ids:
        return list(waiting.values())
    for identifier in ids:
        if identifier not in waiting:
            raise NotFound(f"no candidate {identifier!r}", "`secondnature review --json` has their ids")
    return [waiting[i] for i in dict.fromkeys(ids)]


def _keep(client: Client, corrections: list[Correction]) -> None:
    """What a person has looked at is a correction."""
    for i in range(0, len(corrections), 1000):
        client.import_corrections([c.model_copy(update={"state": None}) for c in corrections[i : i + 1000]])


def _drop(client: Client, correction: Correction) -> None:
    client.delete_correction(str(correction.id))


def _each(
    client: Client, candidates: list[Correction], out: Output, ask: Callable[[Output], str]
) -> tuple[list[Correction], list[Correction], int]:
    """One after another: (kept, dropped, how many are left)."""
    kept, dropped = list[Correction](), list[Correction]()
    for number, candidate in enumerate(candidates, start=1):
        out.say(f"\n{number:,} of {len(candidates):,}: {candidate.id}", style="bold")
        show_record(candidate, out, shown_turns=6, whole=True)
        while True:
            out.note(f"{KEYS} ", end="", style="dim")
            key = ask(out)
            out.note(key)
            if key == "k":
                _keep(client, [candidate])
                kept.append(candidate)
            elif key == "d":
                _drop(client, candidate)
                dropped.append(candidate)
            elif key == "e":
                edited = _edit(candidate, out)
                if edited is None:
                    continue
                _keep(client, [edited])
                kept.append(edited)
            elif key == "q":
                return kept, dropped, len(candidates) - len(kept) - len(dropped)
            elif key != "s":
                continue
            break
    return kept, dropped, len(candidates) - len(kept) - len(dropped)


def _key(out: Output) -> str:
    """One key of the terminal, without enter; the end of the input is q."""
    del out
    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)
    try:
        tty.setcbreak(file, termios.TCSADRAIN)  # a key that was pressed before counts too
        read = os.read(file, 1)
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)
    return read.decode(errors="replace").lower() or "q"


def _edit(candidate: Correction, out: Output) -> Correction | None:
    """The candidate as $EDITOR left it; None: it was left as it is, or is no correction any more."""
    command = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi")
    shown = {k: v for k, v in _plain(candidate).items() if k in EDITABLE}
    for key in ("said", "chosen", "rejected"):
        shown[key] = shown[key][0]["content"] if key in shown else None
    shown.setdefault("feedback", None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "candidate.json"
        path.write_text(json.dumps(shown, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        before = path.read_bytes()
        try:
            code = subprocess.run([*command, str(path)], check=False).returncode
        except OSError as e:
            out.note(f"{command[0]}: {e.strerror}; set EDITOR", style="yellow")
            return None
        data = path.read_bytes()
    if code or data == before:
        out.note(
            "nothing was changed" if not code else f"{command[0]} ended with {code}; nothing was changed"
        )
        return None
    try:
        found = parse_json(data, where="what was edited")
        kept = {k: v for k, v in _plain(candidate).items() if k not in (*EDITABLE, "state")}
        return Correction.model_validate({**kept, **(found if isinstance(found, dict) else {})})
    except ValidationError as e:
        out.note(f"that is no correction: {describe(e)}", style="yellow")
    except BadRecord as e:
        out.note(str(e), style="yellow")
    return None
