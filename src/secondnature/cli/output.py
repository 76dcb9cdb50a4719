"""Where the commands print (process D).

Results go to stdout, progress and errors to stderr. With `--json` stdout holds one JSON document and nothing else;
everything for people moves to stderr. Texts of models and users are never markup, and never reach a terminal as
control sequences: all that is printed goes through one console that makes them visible.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from secondnature.records.visible import visible, visible_json

PIPE_WIDTH = 110
"""Columns where there is no terminal to ask."""


class Output:
    """The two streams of one command."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.err = _console(stderr=True)
        self._people = self.err if as_json else _console(stderr=False)

    def say(self, thing: RenderableType, *, style: str | None = None, end: str = "\n") -> None:
        """A result for people: text is not wrapped, so that paths and commands can be copied."""
        self._people.print(thing, style=style, end=end, soft_wrap=isinstance(thing, str))

    def note(self, text: str, *, style: str | None = None, end: str = "\n") -> None:
        """How things go, and what is asked: always on stderr."""
        self.err.print(text, style=style, end=end, soft_wrap=True)

    def result(self, value: BaseModel | dict[str, Any]) -> None:
        """The result for machines; nothing without `--json`."""
        if self.as_json:
            plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
            write_json(plain)


def write_json(value: Any) -> None:
    """One JSON document on stdout, on one line."""
    sys.stdout.write(visible_json(json.dumps(value, ensure_ascii=False)) + "\n")
    sys.stdout.flush()


class _VisibleConsole(Console):
    """Prints nothing that steers the terminal, but for what rich itself puts there (styles, cursor of a bar)."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def _console(*, stderr: bool) -> Console:
    console = _VisibleConsole(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console
