"""Large bodies are read beside the event loop: parsed and checked in a lane of their own (server).

A thread alone is no help: the C parser of `json` holds the interpreter's lock until it is done, six seconds for
16 MB of `[[],[],...]`. So large bodies are read by the same parser's twin in Python, which lets the others in
between two values, and lists of numbers, of which there may be millions, in pieces by the C parser. Texts are read
in C by both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from json import decoder, scanner
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from secondnature.web.lanes import Lane

__all__ = ["LARGE_BYTES", "parse", "reading"]

LARGE_BYTES = 100_000
"""A body from this size on is read in the lane; a smaller one takes the loop some milliseconds at most."""
MAX_WAITING = 128
_NUMBERS = re.compile(r"[ \t\r\n]*(?:-?[0-9]+[ \t\r\n]*,[ \t\r\n]*){100,5000}(?=[-0-9])")
"""A piece of a list of numbers, before another one."""


def _array(given: tuple[str, int], scan_once: Callable[[str, int], tuple[Any, int]]) -> tuple[list[Any], int]:
    """A list, read from behind its bracket, and where it ends. Raises ValueError, RecursionError."""
    text, at = given
    values: list[Any] = []
    while numbers := _NUMBERS.match(text, at):
        values += json.loads(f"[{numbers[0].strip()[:-1]}]")
        at = numbers.end()
    rest, end = _PARSER.JSONArray((text, at), scan_once)
    return values + rest if values else rest, end


_PARSER: Any = decoder
_SCANNER: Any = scanner
_DECODER: Any = json.JSONDecoder()
_DECODER.parse_array = _array
_DECODER.scan_once = _SCANNER.py_make_scanner(_DECODER)


def parse(body: bytes) -> Any:
    """As `json.loads`, without keeping other threads from their work for long. Raises ValueError."""
    try:
        return _DECODER.decode(body.decode(json.detect_encoding(body), "surrogatepass"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def reading() -> type[APIRoute]:
    """The class of routes that read large bodies in one lane, all together."""
    lane = Lane("secondnature-read", threads=1, max_waiting=MAX_WAITING)

    class Reading(APIRoute):
        """A route whose large bodies are there, parsed and checked, before FastAPI looks at them."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            """FastAPI's, with the body read before it."""
            handle = super().get_route_handler()

            async def read(request: Request) -> Response:
                body = await request.body() if self.body_field is not None else b""
                if len(body) >= LARGE_BYTES and "json" in request.headers.get("content-type", ""):
                    request._json = await lane.run(lambda: self._read(body))  # pyright: ignore[reportPrivateUsage]
                return await handle(request)

            return read

        def _read(self, body: bytes) -> Any:
            """The body as what the route takes. Raises RequestValidationError."""
            assert self.body_field is not None
            try:
                value = parse(body)
            except ValueError as e:
                error = {"type": "json_invalid", "loc": ("body",), "msg": str(e)[:200], "input": {}}
                raise RequestValidationError([error]) from None
            found, errors = self.body_field.validate(value, {}, loc=("body",))
            if errors:
                raise RequestValidationError(errors)
            return found

    return Reading
