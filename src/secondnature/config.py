"""Settings: defaults < files < SECONDNATURE_* < flags; an unknown key is an error (any process).

Files are called `secondnature.toml` and lie in the user's configuration directory, in the home and in the working
directory; the later one wins, setting by setting. Whoever calls a command may stand in a folder that somebody else
wrote: what says where a key is read or sent is not taken from there. A server writes the resolved settings into its
home (`settings.json`, keys masked), so that nobody has to guess afterwards which value was in force.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from secondnature.errors import ConfigError

FILE_NAME = "secondnature.toml"
ENV_PREFIX = "SECONDNATURE_"
NOT_SETTINGS = frozenset({"SECONDNATURE_REALDATA"})
"""Variables with our prefix that belong to the tests, not to the settings."""
FROM_ANY_FOLDER = frozenset(
    {
        *(
            "model",
            "port",
            "device",
            "compute_dtype",
            "engine_threads",
            "train_threads",
            "share",
            "max_rows",
            "max_queue",
            "max_jobs",
        ),
        *(
            "max_body_bytes",
            "requests_per_minute",
            "ignore_tools",
            "model_sampling",
            "trial_lease_s",
            "checkpoint_after_s",
            "max_chain",
            "keep_states",
            "in_band",
        ),
    }
)
"""What the file of the working directory may set; the rest says where keys are read or sent."""
MIN_KEY_CHARACTERS = 16
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s,]+")


def _default_home() -> Path:
    return Path(platformdirs.user_data_dir("secondnature"))


class Settings(BaseModel):
    """Everything that can be set, resolved; immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    home: Path = Field(default_factory=_default_home)
    """Where lessons, ledger, working copy and key lie. One server per home."""
    model: str = "embedded"
    """A directory with a Hugging Face checkpoint, a .gguf file, `embedded`, or `smollm2`."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8321
    """0 asks the system for a free port."""
    api_key: SecretStr | None = None
    """Key for the routes that change state or reveal corrections. None: generated once, kept in the home."""
    correction_key: SecretStr | None = None
    """A key for clients: completions, feedback, corrections of their own; it neither teaches nor reads the ledger.
    None: generated once, kept in the home."""
    in_band: bool = False
    """A user's message `/no WHAT I WANTED`, `/why WHAT WAS WRONG` or `/good` is no question but a correction of the
    answer before it, from any client whose key may correct."""
    inference_key: SecretStr | None = None
    """A key of its own for completions. None: completions are open (to whoever reaches the port)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the local engine and its trainer compute. `cuda`: one GPU, the first of CUDA_VISIBLE_DEVICES."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the local engine computes answers in. `auto`: float32 on CPUs, bfloat16 on a GPU. On CPUs that have
    instructions for it, bfloat16 is faster with many streams; log-probabilities are then near only, and who else
    asks at the same moment may flip a near tie. Lessons are trained as before."""
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
    model_sampling: bool = True
    """Requests that do not say are sampled as the model's `generation_config.json` says: temperature, top_p, top_k,
    min_p, repetition_penalty. False: with temperature 1 and nothing else, whatever the model."""
    allowed_origins: tuple[str, ...] = ()
    """Origins (`https://host:port`, commas between them, or `*`) whose web pages may ask. Default: no page may."""
    max_body_bytes: Annotated[int, Field(ge=1024, le=2**31)] = 16_000_000
    requests_per_minute: Annotated[int, Field(ge=1, le=10_000_000)] = 6000
    """Per client address, over all routes."""
    ignore_tools: bool = True
    """Answer chats with `tools` that the model's chat template does not show, without showing them; the header
    `x-tools-ignored` says how many. False: such a request is refused, with what to turn off."""
    trial_lease_s: Annotated[float, Field(gt=0, le=30 * 86400, allow_inf_nan=False)] = 3600.0
    """A lesson on trial that nobody keeps within this time is undone."""
    checkpoint_after_s: Annotated[float, Field(gt=0, le=30 * 86400, allow_inf_nan=False)] = 600.0
    """The working copy is brought up to date this long after the first kept lesson that it lacks."""
    max_chain: Annotated[int, Field(ge=1, le=1000)] = 8
    """Or as soon as it lacks more lessons than these: every undo and every start goes through them."""
    keep_states: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """So many of the newest kept lessons can be taken back with the optimizer's state of then; older states are
    removed, and a lesson after such an undo starts with a fresh one."""

    @field_validator("allowed_origins", mode="before")
    @classmethod
    def _are_origins(cls, given: Any) -> Any:
        origins: Any = [x.strip() for x in given.split(",")] if isinstance(given, str) else given
        if not isinstance(origins, list | tuple):
            return given
        found = [str(x).rstrip("/") for x in origins if x != ""]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        wrong = next((x for x in found if x != "*" and not _ORIGIN.fullmatch(x)), None)
        if wrong is not None:
            raise ValueError(
                f"{wrong[:100]!r} is no origin; expected https://host, with a port if it has one, or *"
            )
        return found

    @field_validator("api_key", "correction_key", "inference_key")
    @classmethod
    def _is_long_enough(cls, key: SecretStr | None) -> SecretStr | None:
        found = None if key is None else len(key.get_secret_value().strip())
        if found is not None and found < MIN_KEY_CHARACTERS:
            raise ValueError(f"a key of {found} characters; expected {MIN_KEY_CHARACTERS} or more")
        return key

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


def user_file() -> Path:
    """The file of the user's configuration directory."""
    return Path(platformdirs.user_config_dir("secondnature")) / FILE_NAME


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
    files: list[tuple[str, dict[str, Any]]] = [(str(user_file()), _from_file(user_file()))]
    home = Path(given.get("home") or env.get("home") or files[0][1].get("home") or _default_home())
    here = (Path.cwd() if directory is None else directory) / FILE_NAME
    own = home.expanduser() / FILE_NAME
    files.append((str(own), _from_file(own)))
    if here.absolute() != own.absolute():
        files.append((str(here), _from_file(here)))
        _refuse_foreign(*files[-1])
    if "home" in files[1][1]:
        raise ConfigError(f"{own}: a home names no home", f"set it in {user_file()}, or give --home")
    sources = [*files, (f"environment ({ENV_PREFIX}*)", env), ("flags", given)]
    for source, values in sources:
        _refuse_unknown(values, source)
    try:
        return Settings.model_validate({k: v for _, values in sources for k, v in values.items()})
    except ValidationError as e:
        first = e.errors(include_url=False, include_context=False)[0]
        key = str(first["loc"][0]) if first["loc"] else "?"
        where = next((source for source, values in reversed(files) if key in values), "?")
        where = "flag" if key in given else f"{ENV_PREFIX}{key.upper()}" if key in env else where
        found = "" if key.endswith("_key") else f"found {first['input']!r}; "  # keys are shown to nobody
        raise ConfigError(
            f"setting `{key}` ({where}): {found}{first['msg'].removeprefix('Value error, ')}",
            "see docs/reference/settings.md",
        ) from None


def _refuse_foreign(source: str, values: Mapping[str, Any]) -> None:
    """Raises ConfigError: a folder's file sets what is not taken from any folder."""
    for key in values.keys() & Settings.model_fields.keys() - FROM_ANY_FOLDER:
        raise ConfigError(
            f"{source}: `{key}` is not taken from the folder in which a command is called (it says where keys are "
            "read or sent, and the folder may be somebody else's)",
            f"set it in {user_file()}, in the home's own {FILE_NAME}, in {ENV_PREFIX}{key.upper()} or by an option",
        )
