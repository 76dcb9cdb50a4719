"""The example on a real model: its files are what makes them, and the README's table is what was measured."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pages import ROOT

from secondnature.cli.sources import LearnFlags, read_sources
from secondnature.evidence.lint import lint
from secondnature.records import Correction

EXAMPLES = ROOT / "examples"
FIGURES = ROOT / "docs" / "experiments" / "demo-real.json"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data() -> ModuleType:
    return load(EXAMPLES / "directions" / "make.py")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "demo", raising=False)
    return load(EXAMPLES / "demo_real.py")


def test_the_files_are_what_makes_them(data: ModuleType, tmp_path: Path) -> None:
    data.write(tmp_path)
    written = sorted(tmp_path.iterdir())
    assert [p.name for p in written] == [
        "corrections.jsonl",
        "development.jsonl",
        "probes.jsonl",
        "replay_prompts.jsonl",
    ]
    for path in written:
        assert path.read_text() == (EXAMPLES / "directions" / path.name).read_text(), path.name


def test_nothing_of_a_probe_was_taught_or_looked_at(data: ModuleType) -> None:
    taught = [data.corrections(seed) for seed in range(3)]
    asked = {p["seed"] for p in data.probes()}
    looked = {p["seed"] for p in data.development()}
    things = {kind.split(": ")[1] for kind in asked | looked}
    assert not asked & looked
    for six in taught:
        assert len(six) == 6
        for row in six:
            assert not any(row["prompt"].endswith(f" for {thing}.") for thing in things), row["prompt"]
    assert len({row["prompt"] for six in taught for row in six}) == 18
    rows = data.probes()
    right, other = ([p for p in rows if (p.get("side") == "other") == side] for side in (False, True))
    assert (len(right), len({p["seed"] for p in right}), len(other)) == (66, 66, 132)


def test_a_check_takes_the_answer_that_is_taught_and_no_other(data: ModuleType) -> None:
    probe, question = data.probes()[0], data.probes()[-1]
    x, y = re.fullmatch(r"Use (.*) for (.*)\.", probe["prompt"]).groups()  # pyright: ignore[reportOptionalMemberAccess]
    for said, taken in (
        (data.wanted(x, y), True),
        (f"Sure, I will use {x} for {y}.", True),
        (f"I'll use {x}.", False),
        (f"To use {x} for {y}, you need a brush.", False),
        ("I'm sorry for your loss.", False),
    ):
        assert bool(re.search(probe["check"]["matches"], said)) == taken, said
        assert bool(re.search(question["check"]["not_matches"], said)) == said.startswith(("I'll", "Sure"))


@pytest.mark.parametrize(
    ("name", "guards"), [("directions", ["facts", "arithmetic", "instructions"]), ("drilled", ["arithmetic"])]
)
def test_the_folders_can_be_learned_from(name: str, guards: list[str]) -> None:
    sources = read_sources(EXAMPLES / name, LearnFlags())
    request = sources.request(LearnFlags())
    assert request.guards == guards
    assert len(request.probes) == 198
    assert sources.corrections is not None
    assert not [f for f in sources.findings() if f.kind in ("contradiction", "repeated", "near copy")]


def test_bare_answers_are_what_the_lint_names(data: ModuleType) -> None:
    bare = [Correction.model_validate(row) for row in data.corrections(0, bare=True)]
    assert "bare answers" in {f.kind for f in lint(bare)}
    assert "bare answers" not in {
        f.kind for f in lint([Correction.model_validate(r) for r in data.corrections(0)])
    }


def test_the_readmes_table_is_what_was_measured(shown: ModuleType) -> None:
    rows = re.findall(
        r"^\|.*<!-- measured:(?:real|drilled)_\w+ -->.*$", (ROOT / "README.md").read_text(), re.M
    )
    if not FIGURES.exists():
        assert not rows, "no figure without its measurement"
        pytest.skip("not yet measured: `python examples/demo_real.py --json docs/experiments/demo-real.json`")
    found: dict[str, Any] = json.loads(FIGURES.read_text())
    assert rows == shown.table(found)
    assert [(r["lesson"], r["verdict"]) for r in found["lessons"]] == [
        ("drilled", "undone"),
        ("directions", "kept"),
    ]


def test_a_perplexity_is_of_windows_that_all_versions_have_read(shown: ModuleType) -> None:
    class Far:
        """The far side of the wire: one version at a time, every token of a window as likely as another."""

        def __init__(self) -> None:
            self.version, self.changed, self.logp = "a", False, -1.0

        def chat(self, *_: Any, **__: Any) -> dict[str, Any]:
            return {"trial": False, "choices": [{"message": {"content": "Hello."}}]}

        def health(self) -> Any:
            return type("Health", (), {"weights_version": self.version})

        def complete(self, _: str, **__: Any) -> dict[str, Any]:
            logps = [None, self.logp, self.logp]
            return {
                "weights_version": self.version,
                "weights_span": {"changed": self.changed},
                "choices": [{"logprobs": {"token_logprobs": logps}}],
            }

    far = Far()
    reader = shown.Reader(far)
    for far.version, far.logp, times in (("a", -1.0, 4), ("writing", -9.0, 1), ("b", -2.0, 3)):
        for _ in range(times):
            reader.ask()
    assert {v: sorted(found) for v, found in reader.read.items()} == {"a": [0, 1, 2], "b": [0, 1]}
    reader.read["a"][2] = (-100.0, 2)
    assert reader.perplexity("a", ["a", "b"]) == pytest.approx(2.718281828)
    assert reader.perplexity("b", ["a", "b"]) == pytest.approx(7.389056099)
    assert reader.perplexity("a", ["a", "never"]) is None
    far.changed = True
    far.version = "c"
    reader.ask()
    reader.ask()
    assert "c" not in reader.read, "a window during which the weights changed says nothing of any"
