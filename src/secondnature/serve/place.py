"""Where the model of the settings lies, and what clients call it; of either engine (process A, before it serves).

`embedded` and `smollm2` are names, everything else is a directory or a .gguf file. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from secondnature.config import Settings
from secondnature.errors import ConfigError
from secondnature.model import gguf
from secondnature.model.files import instead

__all__ = ["NAMES", "model_directory", "model_name"]

NAMES = ("embedded", "smollm2")
"""Models that come as packages."""


def model_directory(settings: Settings) -> Path:
    """Where the model lies; of a .gguf file, what was made of it.

    Raises:
        ConfigError: no model is there.
        BadCheckpoint, UnsupportedModel, StorageError: as `gguf.directory_of`.
    """
    if settings.model == "embedded":  # data, not code: the room itself lies above this one
        directory = Path(str(importlib.resources.files("secondnature") / "embedded" / "weights"))
    elif settings.model == "smollm2":
        return gguf.directory_of(gguf.smollm2())
    else:
        directory = Path(settings.model).expanduser().absolute()
        if directory.suffix.lower() == ".gguf":
            return gguf.directory_of(directory)
    try:
        is_there = (directory / "config.json").is_file()
    except OSError as e:
        raise ConfigError(f"{directory}: {e.strerror or e}", "mend the disk or the permissions") from None
    if not is_there:
        said, hint = settings.model, instead(directory)
        if not directory.exists() and said.count("/") == 1 and not said.startswith((".", "~", "/")):
            hint = f"nothing is downloaded here: `hf download {said} --local-dir DIR` first, then serve DIR"
        raise ConfigError(f"{directory}: no model there (no config.json)", hint)
    return directory


def model_name(settings: Settings, directory: Path) -> str:
    """What clients call the model; a folder in a hub's cache is named after its commit, so its model's name."""
    if settings.model in NAMES:
        return settings.model
    repository = directory.parent.parent.name
    if directory.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return directory.name
