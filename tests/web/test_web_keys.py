"""A key is long, comes from nowhere else than its owner, and no key at all is never the right one."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from tiny_server import KEY, Running

from secondnature import config
from secondnature.config import FROM_ANY_FOLDER, Settings
from secondnature.errors import ConfigError
from secondnature.lessons.home import Home
from secondnature.web.guards import Guards, Keys, same_key

SHORT = "fifteen-letters"


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own configuration and data, and the folder that a command is called in, are new and empty."""
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", ["api_key", "correction_key", "inference_key"])
@pytest.mark.parametrize("key", ["", " " * 20, SHORT])
def test_a_short_key_is_refused_and_not_shown(name: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"`{name}`.*expected 16 or more") as refused:
        config.load(environ={f"SECONDNATURE_{name.upper()}": key})
    assert SHORT not in str(refused.value)
    assert config.load(environ={f"SECONDNATURE_{name.upper()}": SHORT + "x"})


@pytest.mark.parametrize("content", ["", "\n", SHORT + "\n"])
def test_a_homes_key_that_is_none_ends_the_start(tmp_path: Path, content: str) -> None:
    home = Home(tmp_path / "home")
    (home.path / "key").write_text(content)
    with pytest.raises(ConfigError, match=r"home/key: a key of \d+ characters; expected 16"):
        home.key(None)
    (home.path / "key").unlink()
    assert len(home.key(None)) >= 16
    home.close()


def test_no_key_is_never_right() -> None:
    assert same_key(b"a-key", b"a-key")
    assert not same_key(b"", b"")
    assert not same_key(b"a", b"")
    assert not same_key(b"", b"a")


@pytest.mark.parametrize("name", sorted(Settings.model_fields.keys() - FROM_ANY_FOLDER))
def test_a_folder_does_not_say_where_keys_are_read_or_sent(nowhere: Path, name: str) -> None:
    value = "https://a.example" if name == "allowed_origins" else KEY
    line = f'{name} = "{value}"\n'
    (nowhere / config.FILE_NAME).write_text(line)
    with pytest.raises(
        ConfigError, match=rf"folder/secondnature.toml: `{name}` is not taken from the folder"
    ):
        config.load(environ={})
    (nowhere / config.FILE_NAME).unlink()
    config.user_file().parent.mkdir(parents=True)
    config.user_file().write_text(line)
    found = getattr(config.load(environ={}), name)
    read = found.get_secret_value() if isinstance(found, SecretStr) else found
    assert (read[0] if isinstance(read, tuple) else str(read)) == value


def test_the_keys_are_among_what_a_folder_may_not_set() -> None:
    assert {
        "home",
        "host",
        "api_key",
        "correction_key",
        "inference_key",
        "allowed_origins",
    } == Settings.model_fields.keys() - FROM_ANY_FOLDER


def test_the_order_of_the_sources(nowhere: Path, tmp_path: Path) -> None:
    """Setting by setting: user's file < home's < folder's < environment < flags."""
    home = tmp_path / "home"
    for folder in (home, config.user_file().parent):
        folder.mkdir(parents=True)
    files = (config.user_file(), home / config.FILE_NAME, nowhere / config.FILE_NAME)
    names = ["port", "max_rows", "max_queue", "max_jobs", "engine_threads"]
    for i, path in enumerate(files, start=1):
        lines = [f"{name} = {i}\n" for name in names[i - 1 :]]
        path.write_text("".join(lines) + (f'home = "{home}"\n' if i == 1 else ""))
    found = config.load({"engine_threads": 9}, environ={"SECONDNATURE_MAX_JOBS": "8"})
    values = [getattr(found, name) for name in names]
    assert (found.home, values) == (home, [1, 2, 3, 8, 9])
    (home / config.FILE_NAME).write_text('home = "elsewhere"\n')
    with pytest.raises(ConfigError, match="a home names no home"):
        config.load(environ={})


def test_the_settings_in_force_lie_in_the_home(shared_server: Running) -> None:
    path = shared_server.parts.home.path / "settings.json"
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["model"] == shared_server.parts.settings.model
    assert found.keys() == Settings.model_fields.keys()
    assert KEY not in path.read_text()
    assert set(found["api_key"]) == {"*"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_models_card_is_as_open_as_the_list() -> None:
    """And what is not there is 404 whoever asks, without opening what is."""
    passed: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["path"])

    guards = Guards(
        app,
        keys=Keys(talk=SHORT + "x", correct=KEY + "c", teach=KEY),
        hosts=None,
        max_body_bytes=1024,
        requests_per_minute=1000,
        has_route=lambda path: path != "/v1/nothing",
    )

    def status(path: str, key: str) -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request", "body": b""}

        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        scope = {"type": "http", "method": "GET", "path": path, "headers": headers, "client": ("x", 1)}
        asyncio.run(guards(scope, receive, send))
        return sent[0]["status"] if sent else 200

    for path in ("/v1/models", "/v1/models/embedded", "/v1/chat/completions"):
        assert [status(path, key) for key in ("", "wrong", SHORT + "x", KEY)] == [401, 401, 200, 200], path
    assert [status("/v1/lessons", key) for key in ("", SHORT + "x", KEY)] == [401, 403, 200]
    assert [status("/v1/nothing", key) for key in ("", "wrong", KEY)] == [404] * 3
