"""Real torch and vLLM (CUDA build) in real processes on a null GPU; without the kit everything here is skipped.

A null GPU is a fake CUDA runtime: memory, copies and CUDA IPC between processes are real, kernels do nothing. So
what is shown here is wiring, counters, processes, IPC, and bytes that copies wrote; a number that a kernel should
have computed means nothing. `make test-null-gpu KIT=FOLDER` runs these; FOLDER has `on-null`, which runs a command
in the Python of a GPU machine.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from null_gpu import NullGpu

HERE = Path(__file__).parent
KIT = os.environ.get("NULL_GPU_KIT", "")


class Missing(pytest.Module):
    """A file of tests without the kit."""

    def collect(self) -> NoReturn:
        pytest.skip("no null GPU here: `make test-null-gpu KIT=FOLDER` runs these", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip whole files, in one line."""
    if HERE in module_path.parents and not (Path(KIT) / "on-null").is_file():
        return Missing.from_parent(parent, path=module_path)
    return None


@pytest.fixture
def null_gpu(tmp_path: Path) -> NullGpu:
    return NullGpu(Path(KIT).absolute(), tmp_path)
