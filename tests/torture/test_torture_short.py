"""The short version of `make torture`: what it found before, and a seeded sample of all that can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SEED, SAMPLE = 11, 40


@pytest.mark.slow
def test_no_failing_call_wedges_it_or_loses_anything() -> None:
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--short"]
    here = Path(__file__).parent.parent
    paths = [str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*command, "--workers", "2", "--sample", str(SAMPLE), "--seed", str(SEED)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "0 acknowledged losses, 0 dead runners" in done.stdout
