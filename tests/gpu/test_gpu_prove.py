"""`benchmarks/gpu_prove.py` to its end: one copy of the weights, eager and with CUDA graphs."""

from __future__ import annotations

import json

import pytest
from null_gpu import NullGpu


@pytest.mark.parametrize("options", [[], ["--graphs"]])
def test_what_does_not_need_numbers_holds(null_gpu: NullGpu, options: list[str]) -> None:
    out = null_gpu.folder / "proved.json"
    done = null_gpu.run(
        *("python3", "benchmarks/gpu_prove.py", "--steps", "2", "--json", str(out), *options),
        timeout_s=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    found = json.loads(out.read_text())
    assert found["broken"] == []
    assert found["null"]
    assert found["wiring"]["aliased"] == found["wiring"]["tensors"] == 84
    assert found["prefix cache"] == "salted"
    assert found["trainer"]["zero_copy"]
    assert found["writes after each step"] == [[1, 1], [2, 2]]
    assert found["a killed writer leaves the epoch odd"] == [4, 3]
