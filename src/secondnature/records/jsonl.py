"""Files of one record per line: read whole or refused, with the file, the line and the mend (any process).

Everything is read before anything is used (plan, validate, apply).
"""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from secondnature.errors import BadRecord, TooLarge
from secondnature.records.base import Record

MAX_LINE_BYTES = 1_000_000
"""A longer line in a JSONL file is refused: no correction is a megabyte."""
MAX_FILE_BYTES = 100_000_000
R = TypeVar("R", bound=BaseModel)


_WORDS = {
    "missing": "is missing",
    "list_type": "expected a list",
    "string_type": "expected text",
    "bool_type": "expected true or false",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "dict_type": "expected an object",
    "model_type": "expected an object",
    "string_pattern_mismatch": "expected small letters, digits, `.`, `_` and `-`, a letter or a digit first",
}
"""What is wrong, by the type of pydantic's problem, where its own words are Python's."""
_MESSAGES = frozenset({"prompt", "said", "chosen", "rejected"})
MAX_FIELDS_NAMED = 4


def describe_errors(problems: Sequence[Any], *, of_messages: bool = False) -> str:
    """The first of pydantic's problems in one line: where, what, how many more; fields that are unknown by name.

    Args:
        of_messages: the record was given as `messages`, of which `prompt` was made.
    """
    unknown = [_place(p["loc"], of_messages) for p in problems if p["type"] == "extra_forbidden"]
    others: list[dict[str, Any]] = [p for p in problems if p["type"] != "extra_forbidden"]
    found: list[str] = []
    if others:
        first = others[0]
        where = _place(first["loc"], of_messages)
        what = str(first["msg"]).removeprefix("Value error, ").replace("Input should be", "expected")
        what = _WORDS.get(first["type"], what)
        if first["type"] == "list_type" and first["loc"] and first["loc"][-1] in _MESSAGES:
            what = "expected text, or a list of messages"
        missing = first["type"] == "missing"
        found.append(f"`{where}` {what}" if missing else f"{where}: {what}" if where else what)
        if isinstance(first.get("input"), bool | int | float):
            found[0] += f" (found {first['input']!r})"[:80]
    if unknown:
        fields = ", ".join(f"`{name}`" for name in unknown[:MAX_FIELDS_NAMED])
        more = f" and {len(unknown) - MAX_FIELDS_NAMED} more" if len(unknown) > MAX_FIELDS_NAMED else ""
        found.append(f"unknown field{'s'[: len(unknown) != 1]} {fields}{more}")
    left = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
    return "; ".join(found) + left


def _place(loc: Sequence[Any], of_messages: bool) -> str:
    """The path of a field, as whoever wrote the record knows it."""
    path = [str(p) for p in loc]
    if of_messages and len(path) > 1 and path[0] == "prompt":
        return f"messages[{path[1]}]" + "".join(f".{p}" for p in path[2:])
    if of_messages and len(path) > 1 and path[0] in ("chosen", "said"):
        return "messages[-1]" + "".join(f".{p}" for p in path[2:])
    return ".".join(path)


def describe(error: ValidationError, given: Any = None) -> str:
    """`describe_errors` of a validation error; `given`: what was validated."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    return describe_errors(problems, of_messages=isinstance(given, dict) and "messages" in given)


class FieldTwice(ValueError):
    """A JSON object has a field twice, of which one would be lost."""


def each_field_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON (an `object_pairs_hook`). Raises FieldTwice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FieldTwice(f"the field `{twice[:40]}` stands there twice")
    return found


def parse_json(data: bytes | str, *, where: str, expected: str = "", mend: str = "mend the file") -> Any:
    """One JSON text that a person or a disk gave; a number that is not finite (NaN, Infinity) reads as null.

    Raises:
        BadRecord: not UTF-8, not JSON, a field twice, nested too deeply, or a whole number of more digits than
            Python reads.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        return json.loads(text, parse_constant=lambda _: None, object_pairs_hook=each_field_once)
    except UnicodeDecodeError as e:
        raise BadRecord(
            f"{where}: not UTF-8 text (byte {e.start}){expected}", "is it a binary file?"
        ) from None
    except FieldTwice as e:
        raise BadRecord(f"{where}: {e}", "leave one of them") from None
    except json.JSONDecodeError as e:
        line = f", line {e.lineno}" if e.lineno > 1 else ""
        raise BadRecord(f"{where}{line}, column {e.colno}: not JSON ({e.msg}){expected}", mend) from None
    except RecursionError:
        raise BadRecord(f"{where}: nested too deeply{expected}", mend) from None
    except ValueError:  # int() of a text that is too long
        digits = f"{sys.get_int_max_str_digits():,}"
        raise BadRecord(f"{where}: a whole number of more than {digits} digits{expected}", mend) from None


def parse_jsonl(data: bytes, kind: type[R], *, source: str, own: bool = False) -> list[R]:
    """All records of a JSONL text, or an error that names the line; nothing is half read.

    Args:
        own: of our own home: unknown fields are a newer version's, and kept (`Record.from_disk`).

    Raises:
        BadRecord: not UTF-8, not JSON, an unknown field, a wrong value, or no record at all.
        TooLarge: a line over `MAX_LINE_BYTES`.
    """
    expected = f"expected one {kind.__name__.lower()} per line, as JSON"
    extra = "allow" if own else None
    records: list[R] = []
    data = data.removeprefix(codecs.BOM_UTF8)  # what Excel and PowerShell write
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise TooLarge(
                f"{where}: {len(line):,} bytes; at most {MAX_LINE_BYTES:,} are read", "split or shorten it"
            )
        value = parse_json(line, where=where, expected=f"; {expected}", mend="mend the line")
        try:
            records.append(kind.model_validate(value, extra=extra))
        except ValidationError as e:
            raise BadRecord(
                f"{where}: {describe(e, value)}", "see docs/reference/files.md for the fields"
            ) from None
    if not records:
        raise BadRecord(f"{source}: no records found; {expected}", "is it the right file?")
    return records


def line_numbers(path: Path) -> list[int]:
    """The numbers (from 1 on) of the lines of a JSONL file that hold a record, in the order of `read_jsonl`."""
    return [i for i, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()]


def read_jsonl(path: Path, kind: type[R], *, own: bool = False) -> list[R]:
    """All records of a JSONL file (see `parse_jsonl`).

    Raises:
        BadRecord: the file is missing, unreadable or has a broken line.
        TooLarge: the file is over `MAX_FILE_BYTES`.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise TooLarge(f"{path}: {size:,} bytes; at most {MAX_FILE_BYTES:,} are read", "split the file")
        data = path.read_bytes()
    except OSError as e:
        raise BadRecord(f"{path}: {e.strerror or e}", "check the path") from None
    return parse_jsonl(data, kind, source=str(path), own=own)


def to_jsonl(records: Sequence[Record]) -> str:
    """Records as JSONL, fields that are None left out, unknown ones of newer versions kept."""
    return "".join(r.to_disk(exclude_none=True) + "\n" for r in records)
