"""The reference pages say what the code says: tables, examples, routes."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import tomllib
from pathlib import Path

import pytest

from secondnature import records, wire
from secondnature.cli.sources import LessonFile
from secondnature.config import Settings

PAGES = Path(__file__).parents[2] / "docs" / "reference"


@pytest.mark.parametrize("name", ["cli", "files", "routes", "settings"])
def test_a_reference_page_has_the_tables_of_the_code(name: str) -> None:
    spec = importlib.util.spec_from_file_location("generate_reference", PAGES / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    page = (PAGES / f"{name}.md").read_text()
    assert "<!-- table: " in page
    assert generate.render(page) == page, "out of date: run `python docs/reference/generate.py`"


def test_every_record_setting_and_body_has_its_table() -> None:
    pages = "".join((PAGES / f"{name}.md").read_text() for name in ("files", "routes", "settings"))
    bases = (records.Record, wire.Body)
    found = {
        f"{room}.{name}"
        for room, module in (("records", records), ("wire", wire))
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, bases) and cls not in bases and cls.__module__.startswith(f"secondnature.{room}.")
    }
    assert len(found) > 30
    assert [name for name in sorted(found) if f"<!-- table: {name} -->" not in pages] == []
    assert "<!-- table: config.Settings -->" in pages


def test_every_route_of_the_client_is_listed() -> None:
    page = (PAGES / "routes.md").read_text()
    source = inspect.getsource(wire.Client)
    called = [*re.findall(r'request\(\s*"(\w+)", f?"([^"?]+)', source), ("POST", "/v1/chat/completions")]
    assert len(called) >= 12
    for method, path in called:
        shown = re.sub(r"\{\w+\}", "{id}", path).replace("/v1/train/{id}", "/v1/train/{job}")
        assert f"`{method} {shown}`" in page, f"{method} {shown}"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (PAGES / page).read_text(), re.DOTALL)


def test_the_examples_on_the_pages_are_valid() -> None:
    corrections, probes = blocks("files.md", "jsonl")
    assert len(records.parse_jsonl(corrections.encode(), records.Correction, source="files.md")) == 3
    assert len(records.parse_jsonl(probes.encode(), records.Probe, source="files.md")) == 4
    (lesson,) = blocks("files.md", "toml")
    LessonFile.model_validate(tomllib.loads(lesson))
    (settings,) = blocks("settings.md", "toml")
    Settings.model_validate(tomllib.loads(settings))
    (body,) = blocks("routes.md", "json")
    wire.TrainRequest.model_validate(json.loads(body))
