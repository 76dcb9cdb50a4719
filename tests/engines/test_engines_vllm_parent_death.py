"""vLLM's engine core ends when the process that started it is killed; other processes are left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHILD = """
import multiprocessing, time
from secondnature.engines.vllm import parent_death

def run():
    parent_death.install()
    parent_death.install()
    print(multiprocessing.current_process().pid, flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=run, name=NAME).start()
    time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("name", "ends"), [("EngineCore", True), ("EngineCore_DP0", True), ("mine", False)])
def test_the_core_ends_with_its_parent(tmp_path: Path, name: str, ends: bool) -> None:
    script = tmp_path / "starts_a_core.py"
    script.write_text(CHILD.replace("NAME", repr(name)))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            parent.kill()
            parent.wait()
            if ends:
                deadline = time.monotonic() + 60
                while alive(child):
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
            else:
                time.sleep(0.5)
                assert alive(child)
        finally:
            if alive(child):
                os.kill(child, signal.SIGKILL)
