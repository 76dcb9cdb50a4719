"""What a stage of the battery of a GPU found: printed line by line, and what should hold and does not."""

from __future__ import annotations

from typing import Any


class Findings:
    """By name; `broken` are those that should hold and do not."""

    def __init__(self, kind: str) -> None:
        """`kind`: the word that each printed line begins with."""
        self.values: dict[str, Any] = {}
        self.broken: list[str] = []
        self._kind = kind

    def note(self, name: str, value: Any, holds: bool = True) -> None:
        """Keep and print one of them."""
        self.values[name] = value
        if not holds:
            self.broken.append(name)
        print(f"{self._kind} {name}: {value}{'' if holds else '  <- must not be'}", flush=True)
