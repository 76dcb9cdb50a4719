"""torchvision's stand-ins: what only imports it works, what uses it fails, who asks hears that it is not there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

PROGRAM = """
from secondnature.engines.vllm.torchvision_stub import stand_in
assert stand_in()
assert not stand_in(), "a second time it is there already"
import torchvision.transforms.v2.functional as tvF
from torchvision.transforms import InterpolationMode
kind: type = int | InterpolationMode.BILINEAR
from transformers.utils import is_torchvision_available
assert not is_torchvision_available()
try:
    tvF.resize(1)
except ImportError as e:
    assert "torchvision.transforms.v2.functional.resize was called" in str(e), e
else:
    raise SystemExit("resizing worked")
try:
    import torchvisionary
except ModuleNotFoundError:
    print("done")
"""


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_importing_works_and_using_fails() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
