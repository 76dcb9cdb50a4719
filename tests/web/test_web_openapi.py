"""The committed OpenAPI document is what the server answers."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel
from tiny_server import Running

from secondnature import records, wire
from secondnature.web import openapi

COMMITTED = Path(__file__).resolve().parents[2] / "docs" / "reference" / "openapi.json"


def test_the_committed_document_is_current() -> None:
    assert COMMITTED.read_text(encoding="utf-8") == openapi.text(), (
        "run: python -m secondnature.web.openapi > docs/reference/openapi.json"
    )


def test_it_is_what_a_server_answers(server: Running) -> None:
    assert json.loads(openapi.text()) == server.client.request("GET", "/openapi.json")


def test_a_field_that_may_be_none_may_be_left_out() -> None:
    """Answers leave out what is None; the client must be able to read them."""
    for module in (wire, records):
        for model in vars(module).values():
            if isinstance(model, type) and issubclass(model, BaseModel):
                for name, field in model.model_fields.items():
                    nullable = type(None) in getattr(field.annotation, "__args__", ())
                    assert not (nullable and field.is_required()), f"{model.__name__}.{name}"


def test_every_operation_says_what_it_does_and_how_it_fails() -> None:
    for path, methods in openapi.document()["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], (method, path)
            assert operation.get("description"), (method, path)
            if path not in ("/health", "/metrics"):
                assert {"400", "401", "429", "503"} <= set(operation["responses"]), (method, path)
