"""Steps upwards for what older versions left in a home: numbered, per kind of file, pure (any process).

A file says which form it has: a home by `format` in home.json, a record by `schema_version`; none means 1. A step
takes the JSON of form n and gives that of form n + 1. A file that is read goes through all steps from its own form
on, and is written in the present form when it is next written (a home: before it serves). A field only added
needs no step (`Record.from_disk` keeps what it does not know). A step is for what would be misread otherwise, and a
form that is newer than the newest here is refused for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

from secondnature.errors import DamagedFile, TooNew

__all__ = ["STEPS", "Kind", "Step", "form", "migrate", "newest"]

Kind = Literal["home", "lesson", "correction"]
"""Not a certificate: it says how it was made, is checked in that way, and keeps its form."""
Step = Callable[[dict[str, Any]], dict[str, Any]]
NUMBERED_BY: dict[Kind, str] = {
    "home": "format",
    "lesson": "schema_version",
    "correction": "schema_version",
}


def _home_1_to_2(raw: dict[str, Any]) -> dict[str, Any]:
    """The form gets a number; a home that names no engine was made by the local one, the only one of its time."""
    return {"engine": "local", **raw}


def _correction_1_to_2(raw: dict[str, Any]) -> dict[str, Any]:
    """What was said gets a field of its own. A thumbs-down that was imported with one answer had it as `chosen`: it
    is what was said. (Of praise, whose answer was called `rejected`, the record itself takes care.)"""
    rating = raw.get("rating")
    rated_down = isinstance(rating, int) and rating < 0
    if rated_down and raw.get("chosen") and not raw.get("rejected") and not raw.get("completion_id"):
        return {**raw, "said": raw["chosen"], "chosen": None}
    return raw


STEPS: dict[tuple[Kind, int], Step] = {("home", 1): _home_1_to_2, ("correction", 1): _correction_1_to_2}
"""(kind, the form that the step starts from)."""


def newest(kind: Kind, steps: Mapping[tuple[Kind, int], Step] = STEPS) -> int:
    """The form that this version writes."""
    return 1 + sum(k == kind for k, _ in steps)


def form(kind: Kind, raw: Any, source: str) -> int:
    """The form that a file has. Raises DamagedFile."""
    if not isinstance(raw, dict):
        raise DamagedFile(f"{source}: not a JSON object", "restore it from a backup")
    number = cast("dict[str, Any]", raw).get(NUMBERED_BY[kind], 1)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise DamagedFile(
            f"{source}: `{NUMBERED_BY[kind]}` is {str(number)[:40]!r}; expected a number from 1 on",
            "restore it from a backup",
        )
    return number


def migrate(
    kind: Kind, raw: Any, source: str, steps: Mapping[tuple[Kind, int], Step] = STEPS
) -> dict[str, Any]:
    """The JSON of a file in the present form; `raw` is left as it is.

    Args:
        source: what errors call it: a path, or a path and a line.

    Raises:
        TooNew: a newer version wrote it.
        DamagedFile: no object, or its number is none.
    """
    found, known = form(kind, raw, source), newest(kind, steps)
    if found > known:
        raise TooNew(
            f"{source}: {NUMBERED_BY[kind]} {found}; this version of secondnature reads up to {known}",
            f"upgrade to a version that reads {NUMBERED_BY[kind]} {found}",
        )
    present = dict(cast("dict[str, Any]", raw))
    for number in range(found, known):
        present = {**steps[kind, number](present), NUMBERED_BY[kind]: number + 1}
    return present
