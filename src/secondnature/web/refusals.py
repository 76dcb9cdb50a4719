"""What a refusal says, in OpenAI's shape: message, type, param, code, and our hint (server).

Clients show `message` and nothing else, so the hint stands there, too; programs branch on `code` and `param`. All
fields that are wrong are named at once, and in our words, not in those of the library that checks them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from secondnature.errors import BadInput, NotFound, SecondnatureError
from secondnature.wire import NEUTRAL

__all__ = ["error_body", "invalid", "no_route", "unknown_model"]

MAX_NAMED = 20
"""Wrong fields that are named; of more, how many."""
_FIELD = re.compile(r"[A-Za-z_]\w*")
_SHOULD = re.compile(r"^[A-Z]\w+ should (?:be|have) ")
"""How pydantic begins."""
_BRANCHES = frozenset(
    {"body", "query", "path", "str", "int", "float", "bool", "list", "dict", "none", "tuple"}
)
"""What stands in a place of pydantic's beside names of fields: where it looked, and the branches of a union."""
_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
HINT = "docs/reference/routes.md and /openapi.json say what is accepted"
INSTEAD = {
    "/v1/engines": "/v1/models",
    "/v1/messages": "/v1/chat/completions",
    "/api/chat": "/v1/chat/completions",
    "/api/generate": "/v1/completions",
    "/api/tags": "/v1/models",
}
"""Routes of other servers, and what does their work here."""


def error_body(error: SecondnatureError) -> dict[str, Any]:
    """The body of every error answer."""
    return {"error": {**error.to_wire(), "message": str(error), "param": error.param, "code": error.code}}


def invalid(problems: Sequence[Any], content_type: str) -> BadInput:
    """The error of a body that is not what a route takes; `problems` are pydantic's.

    Args:
        content_type: the request's; a body that is not sent as JSON is not read as JSON.
    """
    found: dict[str, tuple[str, str]] = {}
    for problem in problems:
        field = _field(problem["loc"])
        if not field and "json" not in content_type and problem["type"] != "json_invalid":
            what = (
                f"the header `Content-Type` is {content_type[:100]!r}"
                if content_type
                else "no `Content-Type`"
            )
            return BadInput(f"{what}; expected application/json", "send that header with the body")
        found.setdefault(field, _what(field, problem))
    sentences = [sentence for sentence, _ in found.values()]
    more = f" (and {len(sentences) - MAX_NAMED} more)" if len(sentences) > MAX_NAMED else ""
    first = next(iter(found))
    error = BadInput("; ".join(sentences[:MAX_NAMED]) + more, HINT)
    return error.about(first or None, found[first][1])


def _field(place: Sequence[Any]) -> str:
    """The path of a field, without the names that pydantic gives to what it looks through."""
    named = [str(p) for p in place if isinstance(p, int) or (_FIELD.fullmatch(str(p)) and p not in _BRANCHES)]
    return ".".join(named) if place and place[-1] != "[key]" else ".".join(named[:-1])


def _what(field: str, problem: dict[str, Any]) -> tuple[str, str]:
    """(What is wrong with a field, its code)."""
    kind = str(problem["type"])
    code = _CODES.get(kind, "invalid_value")
    if kind == "json_invalid":
        return "the body is not JSON", code
    if kind == "extra_forbidden":
        if field not in NEUTRAL:
            return f"unknown field `{field}`", code
        neutral = " or ".join(_shown(x) for x in NEUTRAL[field])
        return f"`{field}` is not supported here; expected it left out, or {neutral}", "unsupported_parameter"
    words = _SHOULD.sub("expected ", str(problem["msg"]).removeprefix("Value error, "))
    words = words.replace(" after validation", "")
    if isinstance(problem.get("input"), str):
        words = words.replace(" items", " characters")
    words = "is missing" if kind == "missing" else words
    value = problem.get("input")
    shown = f" (found {_shown(value)})" if isinstance(value, bool | int | float) else ""
    return f"{field}: {words}{shown}" if field else f"the body: {words}{shown}", code


def _shown(value: Any) -> str:
    """A value as JSON writes it, short."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) > 2**200:
        return "a number of very many digits"
    return repr(value).replace("'", '"')[:40]


def no_route(path: str, has: Collection[str]) -> NotFound:
    """The error of a path that no route has; `has` are those that clients of OpenAI's would want."""
    shown = path[:200]
    with_version = "/v1" + path
    near = INSTEAD.get(path) or (with_version if with_version in has else None)
    use = f"use {near}" if near in has else f"it has {', '.join(sorted(has))} and what /openapi.json lists"
    return NotFound(f"this server has no {shown}; {use}", "see /openapi.json").about(None, "no_such_route")


def unknown_model(name: str, served: str) -> NotFound:
    """The error of a request for a model that is not served."""
    error = NotFound(f"The model `{name[:200]}` does not exist.", f"this server serves `{served}`")
    return error.about("model", "model_not_found")
