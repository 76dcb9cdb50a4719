"""Law 8: one path. The command line reaches weights, log and ledger through the routes only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from tiny_server import Running

import secondnature

CLI = Path(secondnature.__file__).parent / "cli"
BEHIND_THE_DOOR = ("serve", "web", "lessons", "engines", "train", "weights", "model")
ALLOWED = {
    "app.py": {"secondnature.serve.local"},
    "exporting.py": {"secondnature.serve.adapter"},
    "fsck.py": {"secondnature.serve.fsck"},
    "vllm.py": {"secondnature.serve.place"},
}
"""`secondnature serve` is the server's process, or becomes it; `fsck` reads a home that no server can open, and
holds its lock; `export --check` asks an adapter its probes on a copy of the model, beside the server."""


def _imports(text: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {module} | {f"{module}.{a.name}" for a in node.names if module == "secondnature"}
    return found


def behind(text: str) -> set[str]:
    """The modules of rooms behind the door that a text imports."""
    rooms = tuple(f"secondnature.{room}" for room in BEHIND_THE_DOOR)
    return {m for m in _imports(text) if m in rooms or m.startswith(tuple(f"{r}." for r in rooms))}


def test_the_command_line_imports_no_room_behind_the_door() -> None:
    files = sorted(CLI.glob("*.py"))
    assert len(files) > 5
    found = {f.name: behind(f.read_text(encoding="utf-8")) - ALLOWED.get(f.name, set()) for f in files}
    assert {name: modules for name, modules in found.items() if modules} == {}


@pytest.mark.parametrize(
    "text", ["from secondnature.lessons.log import Log", "import secondnature.weights.arena"]
)
def test_the_scan_finds_what_it_looks_for(text: str) -> None:
    assert behind(text)


def test_every_route_is_in_the_document(server: Running) -> None:
    """But the aliases, which lead to the same functions."""
    app = server.parts.app
    document = {(m.upper(), p) for p, methods in app.openapi()["paths"].items() for m in methods}
    routes = {(m, r.path.replace(":path}", "}")): r for r in _api_routes(app) for m in r.methods or ()}
    aliases = {("POST", "/train"), ("GET", "/train/status"), ("POST", "/checkpoint")}
    assert set(routes) == document | aliases
    for method, path in aliases:
        assert routes[method, path].endpoint is routes[method, f"/v1{path}"].endpoint


def _api_routes(app: object) -> list[APIRoute]:
    """All routes of the application, also of included routers."""
    found: list[APIRoute] = []
    waiting = list(getattr(app, "routes", []))
    while waiting:
        route = waiting.pop()
        if isinstance(route, APIRoute):
            found.append(route)
        inner = getattr(route, "original_router", None) or getattr(route, "router", None)
        waiting += list(getattr(inner, "routes", []))
    return found
