"""A key is long, comes from nowhere else than its owner, and no key at all is never the right one."""

from __future__ import annotations

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
from secondnature.web.guards import same_key

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
    line = f'{name} = "{KEY}"\n'
    (nowhere / config.FILE_NAME).write_text(line)
    with pytest.raises(
        ConfigError, match=rf"folder/secondnature.toml: `{name}` is not taken from the folder"
    ):
        config.load(environ={})
    (nowhere / config.FILE_NAME).unlink()
    config.user_file().parent.mkdir(parents=True)
    config.user_file().write_text(line)
    found = getattr(config.load(environ={}), name)
    assert (found.get_secret_value() if isinstance(found, SecretStr) else str(found)) == KEY


def test_the_keys_are_among_what_a_folder_may_not_set() -> None:
    assert {
        "home",
        "host",
        "api_key",
        "correction_key",
        "inference_key",
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
