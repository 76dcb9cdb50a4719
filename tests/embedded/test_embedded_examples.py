"""The examples' data: made again byte for byte, valid, and what teaches shares nothing with what measures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from secondnature.embedded.examples import write_examples
from secondnature.records import Correction, Probe

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("listening", "yes_sayer")


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def prompts(file: Path) -> set[str]:
    return {json.dumps(r.get("prompt") or r["messages"][:-1]) for r in rows(file)}


def test_the_committed_files_are_what_the_command_writes(tmp_path: Path) -> None:
    write_examples(tmp_path)
    for name in ("corrections.jsonl", "probes.jsonl"):
        link = EXAMPLES / "yes_sayer" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..", "listening", name)
    for name in NAMES:
        for file in (tmp_path / name).iterdir():
            assert (EXAMPLES / name / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", NAMES)
def test_what_teaches_and_what_measures_share_no_prompt(name: str) -> None:
    files = sorted((EXAMPLES / name).glob("*.jsonl"))
    seen: dict[str, Path] = {}
    for file in files:
        for prompt in prompts(file):
            assert prompt not in seen, f"{file.name} and {seen[prompt].name}: {prompt}"
            seen[prompt] = file


@pytest.mark.parametrize("name", NAMES)
def test_records_are_valid_and_there_are_enough(name: str) -> None:
    probes = [Probe.model_validate(r) for r in rows(EXAMPLES / name / "probes.jsonl")]
    right = [p for p in probes if p.behaviour == "listening" and p.side == "right"]
    assert len(right) >= 80
    assert len({p.cluster for p in right}) >= 24
    for guard in ("push-back", "code", "look-up"):
        assert sum(p.behaviour == guard for p in probes) == 300
    assert sum(p.side == "other" for p in probes) == 120
    for file in ("corrections.jsonl", "replay.jsonl"):
        if (EXAMPLES / name / file).exists():
            assert all(Correction.model_validate(r).chosen for r in rows(EXAMPLES / name / file))


@pytest.mark.parametrize("name", NAMES)
def test_the_wanted_side_of_each_margin_passes_the_check(name: str) -> None:
    for row in rows(EXAMPLES / name / "probes.jsonl"):
        probe = Probe.model_validate(row)
        if probe.margin is not None:
            assert probe.check.matches is not None
            assert re.search(probe.check.matches, probe.margin[0])
            assert not re.search(probe.check.matches, probe.margin[1])


def test_no_pair_of_slots_of_a_probe_is_taught_or_looked_at() -> None:
    wanted = {
        r["margin"][0] for r in rows(EXAMPLES / "listening" / "probes.jsonl") if r.get("side") == "right"
    }
    taught = {r["chosen"][0]["content"] for r in rows(EXAMPLES / "listening" / "corrections.jsonl")}
    looked = {r["check"]["prefers"][0] for r in rows(EXAMPLES / "listening" / "development.jsonl")}
    assert len(taught) == 6
    assert not wanted & (taught | looked)
    assert not taught & looked
