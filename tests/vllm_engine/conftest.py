"""Servers of real vLLM (CPU build), put up once and shared. Without vLLM everything here is skipped.

`make test-vllm` runs these in an environment of their own. vLLM's warnings are its own business: in this folder,
and only here, they are no errors.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from vllm_core import MODELS, Core, started
from vllm_server import Server, environment

HERE = Path(__file__).parent


class Missing(pytest.Module):
    """A file of tests where vLLM is not installed."""

    def collect(self) -> NoReturn:
        pytest.skip(
            "vLLM is not installed here; it is where `make test-vllm` runs these", allow_module_level=True
        )


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip whole files, in one line."""
    if importlib.util.find_spec("vllm") is None and HERE in module_path.parents:
        return Missing.from_parent(parent, path=module_path)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM may warn."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session", autouse=True)
def vllm_environment() -> Generator[None]:
    """What vLLM reads when it is imported, in this process too."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment(before))
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def starting(
    request: pytest.FixtureRequest, vllm_environment: None, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Server | None]:
    """The shared server, if a test wants it: it starts while others run. With a key of vLLM's own."""
    if not any("shared_server" in getattr(item, "fixturenames", ()) for item in request.session.items):
        yield None
        return
    server = Server(tmp_path_factory.mktemp("shared") / "home", "--api-key", "theirs")
    yield server
    server.__exit__()


@pytest.fixture(scope="session")
def shared_server(starting: Server | None) -> Server:
    """The embedded model, eager."""
    assert starting is not None
    return starting.wait().ready()


@pytest.fixture
def server(shared_server: Server) -> Generator[Server]:
    """The server of the session; the test leaves its weights as they were, to the byte."""
    before = shared_server.weights()
    yield shared_server
    for lesson in shared_server.client.lessons().lessons:
        if lesson.state in ("queued", "running", "on_trial"):
            shared_server.client.cancel(lesson.job)
    assert shared_server.client.health().status == "ok", shared_server.client.health().detail
    assert shared_server.weights() == before, "the test left the weights changed"


@pytest.fixture(scope="session", params=MODELS)
def engine(
    request: pytest.FixtureRequest, vllm_environment: None, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Core]:
    """vLLM's engine in this process: a hybrid, then a dense model."""
    with started(MODELS[request.param], tmp_path_factory.mktemp("core")) as found:
        yield found


@pytest.fixture
def core(engine: Core) -> Generator[Core]:
    """That engine with its own weights and an empty cache, before and after."""
    engine.forget()
    yield engine
    if any(not torch.equal(tensor, engine.original[name]) for name, tensor in engine.arena.tensors.items()):
        engine.undo()
    engine.forget()
