"""Law 6: nothing is unpickled, every route that changes state or reveals corrections needs the key."""

from __future__ import annotations

import ast
from pathlib import Path

import httpx2
import pytest
from tiny_server import KEY, Running

import secondnature
from secondnature.config import Settings
from secondnature.web.guards import INFERENCE_PATHS, OPEN_PATHS, needs

SOURCE = Path(secondnature.__file__).parent
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {
    "torch.load",
    "numpy.load",
    "np.load",
    "yaml.load",
    "eval",
    "exec",
    "recv_pyobj",
    "send_pyobj",
    "pd.read_pickle",
}
RUNS_CODE = {"evidence/sandbox/zygote.py", "embedded/answers.py"}
"""Where text is run on purpose: answers in the sandbox's child; the training text's own functions."""


def _offences(path: Path) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name.split(".")[0] for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
        found += [f"{path.name}:{node.lineno} import {n}" for n in names if n in MODULES]  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS or called.rpartition(".")[2] in ("recv_pyobj", "send_pyobj"):
                found.append(f"{path.name}:{node.lineno} {called}")
            for keyword in node.keywords:
                risky = (keyword.arg, ast.unparse(keyword.value))
                if risky in (("trust_remote_code", "True"), ("allow_pickle", "True"), ("shell", "True")):
                    found.append(f"{path.name}:{node.lineno} {risky[0]}=True")
    return found


def test_no_source_file_unpickles_or_runs_text() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 50
    offences = {
        str(f.relative_to(SOURCE)): found
        for f in files
        if (found := _offences(f)) and str(f.relative_to(SOURCE)) not in RUNS_CODE
    }
    assert offences == {}


TALKING = INFERENCE_PATHS | {"/v1/models", "/v1/models/{model_id}"}


def test_every_other_route_needs_the_key(server: Running) -> None:
    """All paths of the document; a path that is not listed as open must refuse, whatever the method."""
    document = httpx2.get(f"{server.url}/openapi.json", trust_env=False).json()
    aliases = ["/train", "/train/status", "/checkpoint"]
    asked = [(m, p) for p, methods in document["paths"].items() for m in methods]
    asked += [(m, p) for p in aliases for m in ("get", "post")]
    closed = [(m, p) for m, p in asked if p not in OPEN_PATHS | TALKING]
    assert len(closed) >= 14
    for method, path in closed:
        for key in (None, "wrong", KEY[:-1], KEY + "x"):
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            url = server.url + path.replace("{", "").replace("}", "")
            reply = httpx2.request(method, url, headers=headers, json={}, trust_env=False)
            error = reply.json()["error"]
            assert (reply.status_code, error["type"]) == (401, "Unauthorized"), (method, path, key)
            assert error["hint"]
    assert {"/health", "/v1/health", "/metrics", "/openapi.json"} == OPEN_PATHS
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses"} == INFERENCE_PATHS


CORRECTS = {
    ("post", "/v1/feedback"),
    ("post", "/v1/corrections"),
    ("post", "/v1/chat/completions/{completion_id}"),
    ("delete", "/v1/corrections/{correction_id}"),
}


def test_a_key_opens_what_its_scope_says_and_no_more(server: Running) -> None:
    """Every route of the document has its scope; the key for corrections opens those of `CORRECTS` only."""
    document = httpx2.get(f"{server.url}/openapi.json", trust_env=False).json()
    asked = [(m, p) for p, methods in document["paths"].items() for m in methods]
    found = {(m, p): needs(m.upper(), p) for m, p in asked}
    assert {x for x, scope in found.items() if scope == "correct"} == CORRECTS
    assert {p for (_, p), scope in found.items() if scope in (None, "talk")} == OPEN_PATHS - {
        "/openapi.json"
    } | TALKING
    headers = {"authorization": f"Bearer {server.parts.teaching.correction_key}"}
    for (method, path), scope in found.items():
        url = server.url + path.replace("{", "").replace("}", "")
        reply = httpx2.request(method, url, headers=headers, json={}, trust_env=False)
        assert (reply.status_code == 403) == (scope == "teach"), (method, path)


def test_loopback_is_the_default_and_the_host_is_checked(server: Running) -> None:
    assert Settings().host == "127.0.0.1"
    reply = httpx2.get(f"{server.url}/health", headers={"host": "evil.example"}, trust_env=False)
    assert reply.status_code == 400
    assert "localhost" in reply.json()["error"]["hint"]


def test_state_is_owner_only(server: Running) -> None:
    home = server.parts.home.path
    open_to_others = [
        str(p) for p in [home, *home.rglob("*")] if p.lstat().st_mode & 0o077 and not p.is_symlink()
    ]
    assert open_to_others == []
    directory = server.parts.runner.trainer._directory  # pyright: ignore[reportPrivateUsage]
    assert directory is not None
    assert directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("text", ["import pickle", "torch.load(f)", "eval(x)", "f(trust_remote_code=True)"])
def test_the_scan_finds_what_it_looks_for(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(text + "\n")
    assert _offences(file)
