"""Every block of code on the pages is executed, page by page in order, against one real server.

The server runs as users start it, on the embedded model; while that is not built, on the tiny model that the tests
train. SECONDNATURE_MODEL names another. The pages' address and home are replaced by the server's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pages import PAGES, ROOT, blocks, name_of

from secondnature import embedded
from secondnature.records import Correction, Probe
from secondnature.wire import Client

ADDRESS = "http://127.0.0.1:8321"
"""The default, as the pages write it."""
RUN = [
    page for page in PAGES if any(b.language in ("python", "bash") and not b.not_run for b in blocks(page))
]


@dataclass(frozen=True)
class Served:
    """A server that users could have started."""

    client: Client
    environment: dict[str, str]
    url: str


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Served]:
    folder = tmp_path_factory.mktemp("pages")
    if "SECONDNATURE_MODEL" in os.environ:
        model = os.environ["SECONDNATURE_MODEL"]
    elif (embedded.path() / "config.json").exists():
        model = "embedded"
    else:
        model = str(request.getfixturevalue("talker"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SECONDNATURE_")}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "SECONDNATURE_HOME": str(folder / "home"),
        "SECONDNATURE_MODEL": model,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "secondnature.cli", "serve", "--port", "0"]
    announced = folder / "home" / "server.json"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not announced.exists():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)
        url = json.loads(announced.read_text())["url"]
        with Client(url, (folder / "home" / "key").read_text().strip()) as client:
            yield Served(client, environment, url)
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_code_on_a_page_runs(page: Path, served: Served, tmp_path: Path) -> None:
    before = served.client.lessons()
    for block in blocks(page):
        if block.not_run or block.language not in ("python", "bash"):
            continue
        text = block.text.replace(ADDRESS, served.url)
        command = (
            [sys.executable, "-c", text]
            if block.language == "python"
            else ["bash", "-euo", "pipefail", "-c", text]
        )
        done = subprocess.run(
            command,
            env=served.environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
        assert done.stdout, f"it printed nothing:\n{block.text}"
    after = served.client.lessons()
    assert after.weights_version == before.weights_version, "the pages leave the weights as they were"
    if page.name == "README.md":
        assert [x.state for x in after.lessons[len(before.lessons) :]] == ["undone"]
    said = [c.prompt[-1].content for c in served.client.corrections()]
    assert "Paint the door red." in said


def test_the_records_on_the_pages_are_valid() -> None:
    num_corrections = num_probes = 0
    for page in PAGES:
        for block in blocks(page):
            for line in block.text.splitlines() if block.language == "json" else []:
                if "check" in json.loads(line):
                    Probe.model_validate_json(line)
                    num_probes += 1
                else:
                    Correction.model_validate_json(line)
                    num_corrections += 1
    assert num_corrections >= 1
    assert num_probes >= 3


def test_there_is_code_to_run() -> None:
    assert {p.relative_to(ROOT).as_posix() for p in RUN} >= {"README.md", "docs/start-embedded.md"}
