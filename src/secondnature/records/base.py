"""What every record is: immutable, typed, and read in one of two ways (any process).

What people and programs hand over (bodies, files of corrections and probes) is read strictly: `model_validate`, and
an unknown field is an error that names it. What a server finds in its own home may have been written by a newer
version: `from_disk` keeps the fields that this one does not know, and `to_disk` writes them back.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Annotated, Any, Self, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


def _is_unicode(text: str) -> str:
    """JSON can smuggle in half a surrogate pair, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"not valid Unicode (a lone surrogate at character {e.start})") from None
    return text


Unicode = Annotated[str, AfterValidator(_is_unicode)]
Text = Annotated[Unicode, Field(max_length=200_000)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9_.-]*$")]


def utc_now() -> datetime:
    """The present moment, with its zone, in whole milliseconds (what JSON keeps)."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


class Record(BaseModel):
    """Base: unknown fields are errors; instances are values, not state."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def from_disk(cls, raw: Any) -> Self:
        """A record of our own home; fields that only newer versions know are kept, at every depth.

        Raises:
            ValidationError: anything else is wrong with it.
        """
        return cls.model_validate(raw, extra="allow")

    def to_disk(self, *, indent: int | None = None, exclude_none: bool = False) -> str:
        """The record as JSON, with the unknown fields that `from_disk` found (HTTP answers leave them out)."""
        text = self.model_dump_json(indent=indent, exclude_none=exclude_none)
        raw = json.loads(text)
        if not _put_back(self, raw):
            return text
        separators = (",", ":") if indent is None else None
        return json.dumps(raw, ensure_ascii=False, indent=indent, separators=separators)


def _put_back(value: Any, raw: Any) -> bool:
    """Unknown fields of `value`, and of the records in it, into its JSON; whether there were any."""
    found = False
    if isinstance(value, Record):
        for name in type(value).model_fields:
            if name in raw:
                found |= _put_back(getattr(value, name), raw[name])
        extra = value.model_extra or {}
        raw.update(extra)
        found |= bool(extra)
    elif isinstance(value, list | tuple) and isinstance(raw, list):
        for one, its_raw in zip(cast("list[Any]", value), cast("list[Any]", raw), strict=True):
            found |= _put_back(one, its_raw)
    return found


def digest(value: Any) -> str:
    """First 16 hex digits of sha256 over the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
