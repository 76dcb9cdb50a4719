"""Nothing is sent to a server on another machine unless `--url` names it: no key, no correction, no question."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from secondnature.cli import connect
from secondnature.cli.connect import Where, open_server
from secondnature.cli.output import Output
from secondnature.config import Settings
from secondnature.errors import ConfigError, Unauthorized

ELSEWHERE = "http://192.0.2.7:8321"
"""An address that the standard keeps for documents: nobody has it."""


class Asked(Exception):
    """The far side was about to be asked."""


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Every (URL, key) that a client was made for."""
    found: list[tuple[str, str | None]] = []

    def client(url: str, key: str | None = None, **_: Any) -> Any:
        found.append((url, key))
        raise Asked

    monkeypatch.setattr(connect, "Client", client)
    monkeypatch.setenv("SECONDNATURE_API_KEY", "the-key-of-the-environment")
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    found_in = tmp_path / "cloned"
    (found_in / "h").mkdir(parents=True)
    (found_in / "h" / "server.json").write_text(json.dumps({"pid": os.getpid(), "url": ELSEWHERE}))
    monkeypatch.chdir(found_in)
    return found


def test_a_homes_file_does_not_lead_to_another_machine(asked: list[tuple[str, str | None]]) -> None:
    with (
        pytest.raises(Unauthorized, match=r"names http://192.0.2.7:8321.*nothing was sent.*--url"),
        open_server(Where(home=Path("h")), Output()),
    ):
        pass
    assert asked == []


def test_a_folders_file_does_not_lead_to_a_home(asked: list[tuple[str, str | None]]) -> None:
    Path("secondnature.toml").write_text('home = "h"\n')
    with (
        pytest.raises(ConfigError, match="`home` is not taken from the folder"),
        open_server(Where(), Output()),
    ):
        pass
    assert asked == []


def test_by_hand_it_may(asked: list[tuple[str, str | None]]) -> None:
    with pytest.raises(Asked), open_server(Where(url=ELSEWHERE), Output()):
        pass
    assert asked == [(ELSEWHERE, "the-key-of-the-environment")]


def test_the_homes_own_key_stays_even_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECONDNATURE_API_KEY")
    (Path("h") / "key").write_text("the-key-of-the-home")
    assert connect._key(Settings(), Path("h"), ELSEWHERE) is None  # pyright: ignore[reportPrivateUsage]
    assert connect._key(Settings(), Path("h"), "http://127.0.0.1:1") == "the-key-of-the-home"  # pyright: ignore[reportPrivateUsage]
