"""The experiment that a test file is about: `test_experiments_NAME.py` gets `experiments/NAME.py`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def experiment(request: pytest.FixtureRequest) -> ModuleType:
    name = request.path.stem.removeprefix("test_experiments_")
    folder = Path(__file__).parents[2] / "experiments"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # one experiment may use what another has
    place = folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_experiment", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
