"""Every law has a mutant, and every mutant still applies (that each turns the tests red: `make mutants`)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def _runner() -> Any:
    spec = importlib.util.spec_from_file_location("mutants_run", ROOT / "tests" / "mutants" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_all_mutants_apply_and_every_law_has_one(tmp_path: Path) -> None:
    runner = _runner()
    found = runner.mutants()
    assert {m.name.split("_")[1] for m in found} == set("123456789")
    runner.copy_tree(tmp_path)
    assert [m.name for m in found if not runner.applies(m, tmp_path)] == []
    for mutant in found:
        assert (ROOT / mutant.tests[0]).is_file(), mutant
        assert mutant.breaks
