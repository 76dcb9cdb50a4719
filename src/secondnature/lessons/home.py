"""The home: one directory that holds everything a server must not lose, owned by one server at a time.

    <home>/
      home.json        which model this home belongs to, and the home's form (home.json.1: as it was in form 1)
      key              the key of the routes that change state (owner-only)
      correction_key   the key that may only talk and correct (owner-only)
      settings.json    what was in force when the server started, keys masked
      ledger.jsonl     corrections
      exports.jsonl    what left the home
      lessons/         one directory per lesson: the log
      model/current    the working copy (after the first checkpoint)
      lock, server.json   who is serving now

The lock is an `flock`: it goes with its process, however that ends. Under it, and before anything is served, a home
of a newer form is refused, what crashes left is removed, and an older form is migrated (`bind`).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from secondnature import storage
from secondnature.config import MIN_KEY_CHARACTERS, Settings
from secondnature.errors import BadCheckpoint, ConfigError, DamagedFile, HomeInUse
from secondnature.lessons.leftovers import clean_home, clean_private_directories
from secondnature.records.migrations import form, migrate, newest

LOG = logging.getLogger(__name__)


class Home:
    """An opened and locked home. Close it to let another server in."""

    def __init__(self, path: Path) -> None:
        self.path = storage.make_dir(path.expanduser().absolute())
        with storage.storage_errors(self.path):
            self.path.chmod(0o700)
        self._lock = take_lock(self.path)
        try:
            self._open()
        except BaseException:
            self._lock.close()
            raise

    def _open(self) -> None:
        self._known()  # nothing is touched in a home that a newer version wrote
        with storage.storage_errors(self.path):
            removed = clean_home(self.path) + clean_private_directories()
        if removed:
            LOG.info("%s: removed %d files or directories that a crash had left", self.path, removed)
        self.lessons = storage.make_dir(self.path / "lessons")
        self.model_root = storage.make_dir(self.path / "model")
        self.ledger_path = self.path / "ledger.jsonl"

    def close(self) -> None:
        """Give the home back."""
        try:
            (self.path / "server.json").unlink(missing_ok=True)
        except (
            OSError
        ) as e:  # nobody is misled: it names a process that is gone, and the next start removes it
            LOG.warning("%s: %s", self.path / "server.json", e)
        finally:
            self._lock.close()

    def announce(self, url: str) -> None:
        """Tell other programs of this user where the server is."""
        storage.write_text(self.path / "server.json", json.dumps({"pid": os.getpid(), "url": url}) + "\n")

    def key(self, given: str | None, name: str = "key") -> str:
        """The key of the admin routes: the given one, else the home's own, made at first use.

        Args:
            name: of the file. `correction_key`: the key that opens corrections and completions only.

        Raises:
            ConfigError: the file's key is too short to be one.
        """
        if given:
            return given
        path = self.path / name
        with storage.storage_errors(path):
            if not path.is_file():
                storage.write_text(path, secrets.token_urlsafe(32) + "\n")
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

    def base_version(self) -> str | None:
        """The version of the model's own weights, as the home knows it; None: it is new, or cannot be read."""
        try:
            found = json.loads((self.path / "home.json").read_text()).get("base_version")
        except (OSError, ValueError, AttributeError):
            return None
        return found if isinstance(found, str) else None

    def check(self, model_dir: Path, fingerprint: str, base_version: str, engine: str = "local") -> None:
        """See whether the home may be this model's; nothing is written. A home without lessons belongs to nobody.

        Raises:
            BadCheckpoint: the home's lessons were made on another model, or the model's files have changed.
            DamagedFile: home.json cannot be read.
        """
        known = self._known()
        if known is not None and self._is_used():
            self._check(known, _binding(model_dir, fingerprint, base_version, engine))

    def bind(self, model_dir: Path, fingerprint: str, base_version: str, engine: str = "local") -> None:
        """Tie the home to its model: the last step of a start, when nothing can refuse the model any more.

        Raises:
            BadCheckpoint, DamagedFile: as `check`.
            StorageError: home.json cannot be written in the present form.
        """
        self.check(model_dir, fingerprint, base_version, engine)
        mine = _binding(model_dir, fingerprint, base_version, engine)
        known = self._known()
        if known is None:
            self._write({**mine, "format": newest("home")})
            return
        self._migrate(known)
        if not self._is_used():
            known = {**known, **mine}
        elif not _is_present(known):  # of a time when it hung on the library's version
            known = {**known, "fingerprint": fingerprint}
        if known != self._known():
            self._write(known)

    def _is_used(self) -> bool:
        """Whether anything here was made of a model's weights: a lesson, whatever became of it, or a checkpoint."""
        with storage.storage_errors(self.lessons):
            lessons = any(not entry.name.startswith(".") for entry in self.lessons.iterdir())
            return lessons or (self.model_root / "current").is_symlink()

    def _known(self) -> dict[str, Any] | None:
        """home.json in the present form; None: the home is new. Raises TooNew, DamagedFile."""
        path = self.path / "home.json"
        raw = self._raw(path)
        return None if raw is None else migrate("home", raw, str(path))

    def _raw(self, path: Path) -> Any:
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as e:
            raise DamagedFile(f"{path}: {e}", "restore it from a backup, or use another --home") from None

    def _write(self, known: dict[str, Any]) -> None:
        storage.write_text(self.path / "home.json", json.dumps(known, indent=2) + "\n")

    def _migrate(self, known: dict[str, Any]) -> None:
        """Write an older home's home.json in the present form; the old one stays as home.json.N.

        An end in between leaves the old form in force, and the next start does it again.
        """
        path = self.path / "home.json"
        raw = self._raw(path)
        found = form("home", raw, str(path))
        if found < newest("home"):
            storage.write_bytes(path.with_name(f"home.json.{found}"), path.read_bytes())
            self._write(known)
            LOG.info("%s: migrated from format %d to %d", self.path, found, newest("home"))

    def _check(self, known: dict[str, Any], mine: dict[str, str]) -> None:
        """Whether a known home is of this model and engine. Raises BadCheckpoint."""
        model_dir, fingerprint = mine["model"], mine["fingerprint"]
        base_version, engine = mine["base_version"], mine["engine"]
        made_by = known.get("engine", "local")
        alike = known.get("fingerprint") == fingerprint or not _is_present(known)
        same_model = alike and known.get("model") == model_dir
        if same_model and made_by != engine and known.get("base_version") != base_version:
            raise BadCheckpoint(
                f"{self.path}: its lessons are of the {made_by} engine, which holds this model in other dtypes "
                f"than the {engine} engine does",
                f"serve it with --engine {made_by}; or `secondnature checkpoint` there, and serve "
                f"{self.model_root}/current with another --home",
            )
        for key, what in (("fingerprint", "architecture"), ("base_version", "weights")):
            if known.get(key) != mine[key] and not (key == "fingerprint" and alike):
                raise BadCheckpoint(
                    f"{self.path} belongs to {known.get('model')}: its {what} ({str(known.get(key))[:19]}) are not "
                    f"those of {model_dir} ({mine[key][:19]})",
                    "serve that model, or give this one another --home",
                )


def _binding(model_dir: Path, fingerprint: str, base_version: str, engine: str) -> dict[str, str]:
    mine = {"model": str(model_dir), "fingerprint": fingerprint, "base_version": base_version}
    return {**mine, "engine": engine}


def _is_present(known: Mapping[str, Any]) -> bool:
    """Whether a fingerprint is of the present kind. Those of before hung on the version of transformers, so what
    they tied a home to is its weights' version alone."""
    return str(known.get("fingerprint")).startswith("f2-")


def take_lock(home: Path) -> IO[str]:
    """The lock of a home; it is given back when the file is closed. Raises HomeInUse, StorageError."""
    path = home / "lock"
    with storage.storage_errors(path):
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        who = running_server(home)
        raise HomeInUse(
            f"{home} is in use by another server" + (f" (process {who['pid']}, {who['url']})" if who else ""),
            "stop that one, use it with --url, or give this one another --home",
        ) from None
    return file


def running_server(home: Path) -> dict[str, str] | None:
    """{pid, url} of the server that owns a home, or None."""
    try:
        found = json.loads((home / "server.json").read_text())
        os.kill(int(found["pid"]), 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {"pid": str(found["pid"]), "url": str(found["url"])}
