"""The optimizer is a normal torch optimizer: importing it changes nothing for the rest of somebody's process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ASK = """
import os, sys
before = dict(os.environ)
import MODULE
assert dict(os.environ) == before, sorted(os.environ.items() ^ before.items())
print([m for m in ("transformers", "huggingface_hub", "secondnature.model.load") if m in sys.modules])
"""


def imported(module: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    script = ASK.replace("MODULE", module)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["secondnature.train.optimizer", "secondnature.train.apollo"])
def test_the_optimizer_imports_no_transformers_and_leaves_the_environment(module: str) -> None:
    assert imported(module) == "[]"


@pytest.mark.parametrize("module", ["secondnature.train.step", "secondnature.model.load"])
def test_no_room_below_the_programs_switches_the_hub_off(module: str) -> None:
    assert "transformers" in imported(module)
