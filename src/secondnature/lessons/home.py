"""The home: one directory that holds everything a server must not lose, owned by one server at a time.

    <home>/
      home.json        which model this home belongs to
      key              the key of the routes that change state (owner-only)
      settings.json    what was in force when the server started, keys masked
      ledger.jsonl     corrections
      lessons/         one directory per lesson: the log
      model/current    the working copy (after the first checkpoint)
      lock, server.json   who is serving now

The lock is an `flock`: it goes with its process, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from pathlib import Path
from typing import IO

from secondnature import storage
from secondnature.config import MIN_KEY_CHARACTERS, Settings
from secondnature.errors import BadCheckpoint, ConfigError, HomeInUse


class Home:
    """An opened and locked home. Close it to let another server in."""

    def __init__(self, path: Path) -> None:
        self.path = storage.make_dir(path.expanduser().absolute())
        with storage.storage_errors(self.path):
            self.path.chmod(0o700)
        self._lock = self._take_lock()
        self.lessons = storage.make_dir(self.path / "lessons")
        self.model_root = storage.make_dir(self.path / "model")
        self.ledger_path = self.path / "ledger.jsonl"

    def _take_lock(self) -> IO[str]:
        path = self.path / "lock"
        with storage.storage_errors(path):
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            who = running_server(self.path)
            raise HomeInUse(
                f"{self.path} is in use by another server"
                + (f" (process {who['pid']}, {who['url']})" if who else ""),
                "stop that one, use it with --url, or give this one another --home",
            ) from None
        return file

    def close(self) -> None:
        """Give the home back."""
        (self.path / "server.json").unlink(missing_ok=True)
        self._lock.close()

    def announce(self, url: str) -> None:
        """Tell other programs of this user where the server is."""
        storage.write_text(self.path / "server.json", json.dumps({"pid": os.getpid(), "url": url}) + "\n")

    def key(self, given: str | None) -> str:
        """The key of the admin routes: the given one, else the home's own, made at first use.

        Raises:
            ConfigError: the file's key is too short to be one.
        """
        if given:
            return given
        path = self.path / "key"
        if not path.is_file():
            storage.write_text(path, secrets.token_urlsafe(32) + "\n")
        with storage.storage_errors(path):
            key = path.read_text().strip()
        if len(key) < MIN_KEY_CHARACTERS:
            raise ConfigError(
                f"{path}: a key of {len(key)} characters; expected {MIN_KEY_CHARACTERS} or more",
                "delete the file, and the next start makes a new one",
            )
        return key

    def note_settings(self, settings: Settings) -> None:
        """Write down what is in force, keys masked."""
        storage.write_text(self.path / "settings.json", json.dumps(settings.public(), indent=2) + "\n")

    def bind(self, model_dir: Path, fingerprint: str, base_version: str, engine: str = "local") -> None:
        """Tie a new home to its model; check that an old one still belongs to it.

        Raises:
            BadCheckpoint: the home's lessons were made on another model, or the model's files have changed.
        """
        path = self.path / "home.json"
        mine = {"model": str(model_dir), "fingerprint": fingerprint, "base_version": base_version}
        mine["engine"] = engine
        if not path.is_file():
            storage.write_text(path, json.dumps(mine, indent=2) + "\n")
            return
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError) as e:
            raise BadCheckpoint(f"{path}: {e}", "restore it from a backup, or use another --home") from None
        made_by = known.get("engine", "local")
        same_model = known.get("fingerprint") == fingerprint and known.get("model") == str(model_dir)
        if same_model and made_by != engine and known.get("base_version") != base_version:
            raise BadCheckpoint(
                f"{self.path}: its lessons are of the {made_by} engine, which holds this model in other dtypes "
                f"than the {engine} engine does",
                f"serve it with --engine {made_by}; or `secondnature checkpoint` there, and serve "
                f"{self.model_root}/current with another --home",
            )
        for key, what in (("fingerprint", "architecture"), ("base_version", "weights")):
            if known.get(key) != mine[key]:
                raise BadCheckpoint(
                    f"{self.path} belongs to {known.get('model')}: its {what} ({str(known.get(key))[:17]}) are not "
                    f"those of {model_dir} ({mine[key][:17]})",
                    "serve that model, or give this one another --home",
                )


def running_server(home: Path) -> dict[str, str] | None:
    """{pid, url} of the server that owns a home, or None."""
    try:
        found = json.loads((home / "server.json").read_text())
        os.kill(int(found["pid"]), 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {"pid": str(found["pid"]), "url": str(found["url"])}
