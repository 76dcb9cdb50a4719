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


def describe_errors(problems: Sequence[Any]) -> str:
    """The first of pydantic's problems in one line: where, what, how many more."""
    first: dict[str, Any] = problems[0]
    where = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        what = f"unknown field `{where}`"
    else:
        what = str(first["msg"]).removeprefix("Value error, ")
        what = f"{where}: {what}" if where else what
        if isinstance(first.get("input"), bool | int | float):
            what += f" (found {first['input']!r})"[:80]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return what + more


def describe(error: ValidationError) -> str:
    """`describe_errors` of a validation error."""
    return describe_errors(error.errors(include_url=False, include_input=False, include_context=False))


def parse_json(data: bytes | str, *, where: str, expected: str = "", mend: str = "mend the file") -> Any:
    """One JSON text that a person or a disk gave; a number that is not finite (NaN, Infinity) reads as null.

    Raises:
        BadRecord: not UTF-8, not JSON, nested too deeply, or a whole number of more digits than Python reads.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        return json.loads(text, parse_constant=lambda _: None)
    except UnicodeDecodeError as e:
        raise BadRecord(
            f"{where}: not UTF-8 text (byte {e.start}){expected}", "is it a binary file?"
        ) from None
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
            raise BadRecord(f"{where}: {describe(e)}", "see docs/reference/files.md for the fields") from None
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
