"""The benchmarks run, at toy size on the tiny model that talks, and the committed page is made from its results."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # on a busy machine
ROOT = Path(__file__).parents[2]
RUN = [sys.executable, str(ROOT / "benchmarks" / "run.py")]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *options], capture_output=True, text=True, timeout=560, check=False)


def numbers(found: Any) -> Iterator[float]:
    """Every number in it."""
    if isinstance(found, dict):
        for value in found.values():
            yield from numbers(value)
    elif isinstance(found, list):
        for value in found:
            yield from numbers(value)
    elif isinstance(found, int | float):
        yield float(found)


@pytest.fixture(scope="module")
def results(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    done = run("--quick", "--model", str(talker), "--output", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "benchmarks.md").read_text().count("\n## ") == 11
    return json.loads((folder / "results.json").read_text())


def test_every_benchmark_gives_finite_figures_and_its_circumstances(results: dict[str, Any]) -> None:
    assert set(results) == {
        *("serving", "engine", "step", "rounding", "undo", "memory"),
        *("training", "optimizer", "growth", "projections", "flatness"),
    }
    for name, entry in results.items():
        assert all(map(math.isfinite, numbers(entry))), name
        assert {"date", "commit", "others_cpu", "machine", "model"} <= set(entry)
        assert {"cpu", "cores", "flags", "versions"} <= set(entry["machine"])


def test_no_request_fails_and_every_answer_is_stamped(results: dict[str, Any]) -> None:
    found = results["serving"]["measured"]
    assert found["requests"] > 20
    assert found["failed"] == 0
    assert found["stamped"] == found["requests"]
    assert 0 < found["changed"] <= found["on_trial"] < found["requests"]
    for key in ("p50", "p99", "longest", "tokens_per_s"):
        assert {"median", "low", "high", "n"} == set(found["phases"]["ratio"][key])


def test_what_does_not_depend_on_the_machine(results: dict[str, Any]) -> None:
    for row in results["engine"]["measured"]["rows"]:
        assert row["same_tokens_as_fp32"] >= 0.9 * row["tokens"]  # the engine computes what generate computes
    for row in results["step"]["measured"]["rows"]:
        assert 0 < row["gradient_cosine"] <= 1 + 1e-6
    longest = results["step"]["measured"]["rows"][-1]
    assert longest["context"] >= 4 * longest["answer"]
    assert longest["memory_ratio"]["whole"] < 1
    for row in results["rounding"]["measured"]["rows"]:
        assert row["stochastic_all"]["kept"] > row["nearest_all"]["kept"] >= 0
    costs = results["rounding"]["measured"]["costs"]
    assert costs["state_bytes"]["adamw_fused_fp32"] == pytest.approx(4 * costs["model_bytes"], rel=0.01)
    for row in results["undo"]["measured"]["rows"]:
        assert 0 < row["share_of_model"] < 1
        assert 0 < row["changed_elements"] < 1


def test_a_steps_limit_memory_and_state(results: dict[str, Any]) -> None:
    training = results["training"]["measured"]
    for row in training["rows"]:
        assert row["share_of_limit"]["median"] > 0.2
        assert row["memory_ratio"]["plain"] < 1
    optimizer = results["optimizer"]["measured"]
    assert optimizer["state_bytes"]["adamw_fused"]["moments"] == 8 * optimizer["parameters"]
    for row in optimizer["rows"]:
        assert row["state_over_bound"] <= (1.01 if row["rank"] > 1 else 1.04)  # 16 bytes beside small moments
    growth = results["growth"]["measured"]
    assert [row["context"] for row in growth["context"]["rows"]] == [64, 128]
    assert len(growth["model"]["rows"]) == 2


def test_peers_are_in_the_figures_where_they_are_installed(results: dict[str, Any]) -> None:
    pytest.importorskip("trl", reason="TRL is not installed here; `make test-peers` makes its environment")
    for row in results["training"]["measured"]["rows"]:
        assert row["over_ours"]["trl_adamw"]["median"] > 0
    assert results["optimizer"]["measured"]["rows"][0]["factored_over_public"]["median"] > 0


def test_the_arena_is_mapped_twice_and_counted_once(results: dict[str, Any]) -> None:
    large = results["memory"]["measured"]["rows"][-1]
    owner, trainer = large["shared"]["arena"]
    for mapping in (owner, trainer):
        assert mapping["rss"] >= large["weight_bytes"]
    assert owner["pss"] + trainer["pss"] < 1.1 * owner["rss"]


def test_quick_figures_never_reach_the_page() -> None:
    done = run("--quick")
    assert done.returncode == 2
    assert "--output" in done.stderr


def test_the_page_is_made_from_the_results(tmp_path: Path) -> None:
    committed = ROOT / "benchmarks" / "results.json"
    (tmp_path / "results.json").write_bytes(committed.read_bytes())
    assert run("--render", "--output", str(tmp_path)).returncode == 0
    assert (tmp_path / "benchmarks.md").read_text() == (ROOT / "docs" / "benchmarks.md").read_text()
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn >= {"projections.svg", "flatness.svg"}
    for name in drawn:
        assert (tmp_path / "figures" / name).read_text() == (ROOT / "docs" / "figures" / name).read_text()
        ElementTree.parse(tmp_path / "figures" / name)


def test_optimizers_end_at_the_same_loss(results: dict[str, Any]) -> None:
    found = results["flatness"]["measured"]
    for arm in found["arms"].values():
        loss = arm["figures"]["taught_loss"]
        assert loss["median"] == pytest.approx(found["target"]["median"], rel=0.02)
        assert arm["figures"]["distance"]["low"] > 0
