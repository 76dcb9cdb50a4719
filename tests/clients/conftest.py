"""A real server process for real clients (`make test-clients`): the embedded model, its template shows tools.

The clients live in an environment of their own, where secondnature is not installed: what is tested is what goes
over the wire. The server runs in `.venv`. With SECONDNATURE_REALDATA `models/SmolLM2-135M-Instruct` is asked too.
Nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEY = "the-key-of-the-tests"
SHOWS_TOOLS = "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }} {% endfor %}"
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OPENAI_API_KEY": KEY, "DO_NOT_TRACK": "1"}


def _models() -> dict[str, Path | None]:
    data = os.environ.get("SECONDNATURE_REALDATA")
    real = Path(data) / "models" / "SmolLM2-135M-Instruct" if data else None
    return {
        "embedded": ROOT / "src" / "secondnature" / "embedded" / "weights",
        "smollm2": real if real is not None and (real / "config.json").is_file() else None,
    }


@pytest.fixture(scope="session", params=_models())
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a model whose template shows tools."""
    found = _models()[request.param]
    if found is None:
        pytest.skip("SECONDNATURE_REALDATA has no models/SmolLM2-135M-Instruct")
    copy = tmp_path_factory.mktemp("model") / request.param
    shutil.copytree(found, copy)
    template = copy / "chat_template.jinja"
    own = template.read_text().replace(
        "['system', 'user', 'assistant']", "['system', 'user', 'assistant', 'tool']"
    )
    template.write_text(SHOWS_TOOLS + own)
    return copy


@pytest.fixture(scope="session")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of its server, with `/v1`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    python = ROOT / ".venv" / "bin" / "python"
    if not python.exists():
        pytest.skip("the server's environment is not there: make test-clients makes it")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SECONDNATURE_")} | {
        "SECONDNATURE_HOME": str(home),
        "SECONDNATURE_MODEL": str(model),
        "SECONDNATURE_PORT": str(port),
        "SECONDNATURE_API_KEY": KEY,
        "SECONDNATURE_REQUESTS_PER_MINUTE": "1000000",
        "OMP_NUM_THREADS": "1",
    }
    log = (home.parent / f"{home.name}.log").open("w+")
    server = subprocess.Popen(
        [str(python), "-m", "secondnature.serve.local"], env=environment, cwd=home, stderr=log
    )
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, log.name)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)
        log.close()


def _wait(address: str, server: subprocess.Popen[bytes], log: str, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert server.poll() is None, Path(log).read_text()
        try:
            with urllib.request.urlopen(address):
                return
        except urllib.error.HTTPError:  # it starts its trainer
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server did not start")
