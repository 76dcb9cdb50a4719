"""Settings: defaults < secondnature.toml < SECONDNATURE_* < flags; an unknown key is an error (any process).

The file is looked for in the working directory, then in the home. The resolved settings are written into the
home when a server starts, so that nobody has to guess afterwards which value was in force.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from secondnature.errors import ConfigError

FILE_NAME = "secondnature.toml"
ENV_PREFIX = "SECONDNATURE_"
NOT_SETTINGS = frozenset({"SECONDNATURE_REALDATA"})
"""Variables with our prefix that belong to the tests, not to the settings."""


def _default_home() -> Path:
    return Path(platformdirs.user_data_dir("secondnature"))


class Settings(BaseModel):
    """Everything that can be set, resolved; immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    home: Path = Field(default_factory=_default_home)
    """Where lessons, ledger, working copy and key lie. One server per home."""
    model: str = "embedded"
    """A directory with a Hugging Face checkpoint, or `embedded`."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8321
    """0 asks the system for a free port."""
    api_key: SecretStr | None = None
    """Key for the routes that change state or reveal corrections. None: generated once, kept in the home."""
    inference_key: SecretStr | None = None
    """A key of its own for completions. None: completions are open (to whoever reaches the port)."""
    engine_threads: Annotated[int, Field(ge=1, le=256)] = 1
    train_threads: Annotated[int, Field(ge=1, le=256)] = 1
    share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    """Of the time, while requests are being answered, that the trainer works; then it pauses for the rest."""
    max_rows: Annotated[int, Field(ge=1, le=1024)] = 64
    """Sequences that are decoded at once."""
    max_queue: Annotated[int, Field(ge=1, le=100_000)] = 1024
    """Requests that may wait for a row; one more is answered 429."""
    max_jobs: Annotated[int, Field(ge=1, le=10_000)] = 16
    """Training jobs that may wait."""
    max_body_bytes: Annotated[int, Field(ge=1024, le=2**31)] = 16_000_000
    requests_per_minute: Annotated[int, Field(ge=1, le=10_000_000)] = 6000
    """Per client address, over all routes."""
    trial_lease_s: Annotated[float, Field(gt=0, le=30 * 86400, allow_inf_nan=False)] = 3600.0
    """A lesson on trial that nobody keeps within this time is undone."""
    checkpoint_after_s: Annotated[float, Field(gt=0, le=30 * 86400, allow_inf_nan=False)] = 600.0
    """The working copy is brought up to date this long after the first kept lesson that it lacks."""
    max_chain: Annotated[int, Field(ge=1, le=1000)] = 8
    """Or as soon as it lacks more lessons than these: every undo and every start goes through them."""
    keep_states: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """So many of the newest kept lessons can be taken back with the optimizer's state of then; older states are
    removed, and a lesson after such an undo starts with a fresh one."""

    def public(self) -> dict[str, Any]:
        """The settings as plain values, keys masked: what is written down and shown."""
        return self.model_dump(mode="json")


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in environ.items():
        if name.startswith(ENV_PREFIX) and name not in NOT_SETTINGS:
            found[name.removeprefix(ENV_PREFIX).lower()] = value
    return found


def _from_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: {e}", "mend the file, or move it away") from None


def _refuse_unknown(values: Mapping[str, Any], source: str) -> None:
    for key in values:
        if key not in Settings.model_fields:
            near = difflib.get_close_matches(key, Settings.model_fields, n=1)
            hint = (
                f"did you mean `{near[0]}`?" if near else f"known: {', '.join(sorted(Settings.model_fields))}"
            )
            raise ConfigError(f"{source}: unknown setting `{key}`", hint)


def load(
    flags: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Settings:
    """The resolved settings. `flags` are the values given by hand (None: not given).

    Raises:
        ConfigError: an unknown key, a value that cannot be used, or a broken file; says in which source.
    """
    given = {k: v for k, v in (flags or {}).items() if v is not None}
    env = _from_environment(os.environ if environ is None else environ)
    here = (Path.cwd() if directory is None else directory) / FILE_NAME
    in_file = _from_file(here)
    source = str(here)
    if not in_file:
        home = Path(given.get("home") or env.get("home") or _default_home())
        in_file, source = _from_file(home / FILE_NAME), str(home / FILE_NAME)
    _refuse_unknown(in_file, source)
    _refuse_unknown({f"{k}": v for k, v in env.items()}, "environment (SECONDNATURE_*)")
    _refuse_unknown(given, "flags")
    try:
        return Settings.model_validate({**in_file, **env, **given})
    except ValidationError as e:
        first = e.errors(include_url=False, include_context=False)[0]
        key = str(first["loc"][0]) if first["loc"] else "?"
        where = "flag" if key in given else f"{ENV_PREFIX}{key.upper()}" if key in env else source
        raise ConfigError(
            f"setting `{key}` ({where}): found {first['input']!r}; {first['msg']}",
            "see docs/reference/settings.md",
        ) from None
