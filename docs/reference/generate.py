"""Writes the tables of the reference pages from the code: `python docs/reference/generate.py`.

A page says where a table belongs with `<!-- table: wire.TrainRequest -->` ... `<!-- end -->`; everything between is
replaced. Types, limits and defaults come from the JSON schemas, the words from the docstrings under the fields. A
test compares the pages with what this would write.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import typer.main
from pydantic import BaseModel

from secondnature import config, records, wire
from secondnature.cli import sources
from secondnature.cli.app import app

HERE = Path(__file__).parent
MODULES = {"config": config, "records": records, "wire": wire, "lesson": sources}
BLOCK = re.compile(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """The docstring under each field, of the class and of those above it."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if cls is BaseModel or not issubclass(cls, BaseModel):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                doc = text.value.value if _is_text(text) else ""  # pyright: ignore[reportAttributeAccessIssue]
                found[field.target.id] = " ".join(str(doc).split())
    return found


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def kind(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    if "anyOf" in schema:
        return " or ".join(k for k in map(kind, schema["anyOf"]) if k != "null")
    if "oneOf" in schema:
        return " or ".join(map(kind, schema["oneOf"]))
    if "const" in schema or "enum" in schema:
        return " \\| ".join(f"`{v}`" for v in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return "[" + ", ".join(map(kind, schema["prefixItems"])) + "]"
        return f"list of {kind(schema.get('items', {}))}"
    if schema.get("format") == "date-time":
        return "time"
    names = {"string": "text", "object": "object", "boolean": "true or false"}
    name = names.get(str(schema.get("type")), str(schema.get("type", "any")))
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]:,}" for key, sign in signs.items() if key in schema]
    return f"{name} {', '.join(limits)}" if limits else name


def fields_table(model: type[BaseModel]) -> str:
    """One row per field."""
    schema = model.model_json_schema()
    docs, required = field_docs(model), schema.get("required", [])
    lines = ["| field | type | default | |", "|---|---|---|---|"]
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else _default(model, name, field)
        lines.append(
            f"| `{name}` | {kind(field)} | {default} | {docs.get(name, '').replace('|', chr(92) + '|')} |"
        )
    return "\n".join(lines) + "\n"


def _default(model: type[BaseModel], name: str, field: dict[str, Any]) -> str:
    if "default" not in field:
        return "by the system" if model.model_fields[name].default_factory else ""
    value = field["default"]
    if value is None:
        return ""
    return "its own defaults" if isinstance(value, dict) else f"`{json.dumps(value)}`"


def commands_table() -> str:
    """Every command with its arguments and options."""
    parts: list[str] = []

    def walk(command: Any, path: str) -> None:
        rows = [f"| `{' '.join(p.opts) if _is_option(p) else p.name}` | {p.help} |" for p in command.params]
        parts.append(f"### `{path}`\n\n{inspect.cleandoc(command.help or '')}\n")
        if rows:
            parts.append("\n".join(["| option | |", "|---|---|", *rows]) + "\n")
        for name, sub in getattr(command, "commands", {}).items():
            walk(sub, f"{path} {name}")

    walk(typer.main.get_command(app), "secondnature")
    return "\n" + "\n".join(parts) + "\n"


def _is_option(parameter: Any) -> bool:
    return parameter.param_type_name == "option"


def table(name: str) -> str:
    """The text of one block."""
    if name == "commands":
        return commands_table()
    module, _, cls = name.partition(".")
    return fields_table(getattr(MODULES[module], cls))


def render(page: str) -> str:
    """A page with its tables as the code has them now."""
    return BLOCK.sub(lambda m: m[1] + table(m[2]) + m[3], page)


if __name__ == "__main__":
    for path in sorted(HERE.glob("*.md")):
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
