"""Fixtures that several rooms share: the tiny model that talks, and one server around it for the whole session.

Started on first use only: the light rooms' tests import neither torch nor the server. Whoever uses the shared
server leaves the weights as found: no test keeps a lesson without taking it back.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tiny_server import Running


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the model that talks."""
    from tiny_server import make_talker

    return make_talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="session")
def shared_server(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    """The server of the session."""
    from tiny_server import running

    with running(tmp_path_factory.mktemp("home"), talker, max_jobs=2) as server:
        yield server


@pytest.fixture
def server(shared_server: Running) -> Generator[Running]:
    """The server of the session, with its weights as they were found: before the test, and checked after it."""
    before = shared_server.state()
    yield shared_server
    for job in (
        x.job for x in shared_server.client.lessons().lessons if x.state in ("queued", "running", "on_trial")
    ):
        shared_server.client.cancel(job)
    assert shared_server.client.health().status == "ok", shared_server.client.health().detail
    assert shared_server.state() == before, "the test left the weights changed"
