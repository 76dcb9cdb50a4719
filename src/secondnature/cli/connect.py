"""Find the server that a command talks to, or start one for as long as the command runs (process D).

`--url` names it; else `<home>/server.json` does, while that process lives and answers; else it is started as a
child in a session of its own (ctrl-C reaches only the command, which then cancels in order) and stopped at the
end. The key is taken from SECONDNATURE_API_KEY, secondnature.toml or `<home>/key`, never from a flag: flags are in
every process list. A server that only a home's file names has to be on this machine: no key, no correction and no
question is sent anywhere else, unless `--url` says so. The home's own key is sent to this machine only.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from secondnature import config
from secondnature.cli import USAGE
from secondnature.cli.output import Output
from secondnature.errors import BadInput, SecondnatureError, Unauthorized, Unreachable
from secondnature.wire import Client, Health

POLL_S = 0.1
SAY_EVERY_S = 15.0
"""Where there is no terminal, a line about a server that is still starting."""
PLUGIN_SAYS = "secondnature: "
"""How a line of the plug-in begins in vLLM's log, where it ends the server."""
Start = Literal["never", "known", "always"]
"""When a server may be started: `known` only on a home that has been served before."""
STOP_S = 60.0
"""A server that we started and that does not stop within this time is killed: it makes itself whole at start-up."""


_COMMAND = re.compile(r"`secondnature ([a-z][^`]*)`")
"""A command in a text for people."""
WITHOUT_SERVER = ("serve", "fsck")
"""Commands that have no `--url`."""


@dataclass(frozen=True)
class Where:
    """What the options say about the server; whatever command is proposed to the user is made here."""

    home: Path | None = None
    url: str | None = None
    model: str | None = None

    def flags(self, name: str = "") -> list[str]:
        """The options that lead another command, of that name, to the same server."""
        found = ["--url", self.url] if self.url is not None and name not in WITHOUT_SERVER else []
        return found + (["--home", str(self.home.expanduser().absolute())] if self.home is not None else [])

    def command(self, *words: str) -> str:
        """A command line that the user can copy, e.g. the one that undoes."""
        return shlex.join(["secondnature", *words, *self.flags(words[0])])

    def complete(self, text: str) -> str:
        """A text in which the commands, between backquotes, lead to the same server."""

        def whole(found: re.Match[str]) -> str:
            words = found[1]
            flags = self.flags(words.split()[0])
            return f"`secondnature {words}{' ' if flags else ''}{shlex.join(flags)}`"

        return _COMMAND.sub(whole, text)


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    client: Client
    health: Health
    started: bool
    where: Where = Where()

    def command(self, *words: str) -> str:
        """A command line that the user can copy, and that leads to this server."""
        return self.where.command(*words)


@contextmanager
def open_server(where: Where, out: Output, *, start: Start = "always") -> Generator[Server]:
    """The server to talk to, for the duration of a `with` block.

    Raises:
        Unreachable: no server answers, and none was to be started, or it did not come up.
        BadInput: `--model` together with a server that already serves.
    """
    settings = config.load({"home": where.home, "model": where.model})
    home = settings.home.expanduser().absolute()
    here = replace(where, home=home if "home" in settings.model_fields_set else None)
    url = where.url or _running(home)
    if url is not None:
        with Client(url, _key(settings, home, url)) as client:
            health = client.health()
            if where.model is not None:
                raise BadInput(
                    f"--model {where.model}: the server at {url} already serves {health.model}",
                    "leave --model out, or stop that server first",
                )
            say_trouble(health, out)
            yield Server(client, health, started=False, where=here)
        return
    if start == "never" or (start == "known" and not (home / "home.json").exists()):
        missing = "" if home.exists() else ": there is no such folder"
        raise Unreachable(f"no server runs on {home}{missing}", f"start one: {Where(home).command('serve')}")
    engine = home_engine(settings)
    process = _spawn(settings, home, engine)
    previous = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    patience = STOP_S
    try:
        url = _await_start(process, home, out, engine)
        _stay_here(url, home)
        with Client(url, _key(settings, home, url)) as client:
            health = client.health()
            say_trouble(health, out)
            yield Server(client, health, started=True, where=here)
    except KeyboardInterrupt:
        patience = 0.0  # somebody wants to leave at once; the server undoes what is open when it stops
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _stop(process, patience)


def say_trouble(health: Health, out: Output) -> None:
    """What is not well with a server that answers, in its own words."""
    if health.status != "ok":
        out.note(f"the server is not well: {health.detail or 'it does not say why'}", style="yellow")


def interrupt(_signum: int, _frame: FrameType | None) -> None:
    """A signal handler: end like ctrl-C."""
    raise KeyboardInterrupt


def home_model(settings: config.Settings) -> str:
    """The model to serve: what was set, else the one that the home belongs to, else the default."""
    if "model" not in settings.model_fields_set:
        known = _read_json(settings.home.expanduser() / "home.json").get("model")
        ours = Path(config.__file__).parent
        if isinstance(known, str) and Path(known).is_dir() and not Path(known).is_relative_to(ours):
            return known
    return settings.model


def home_engine(settings: config.Settings) -> str:
    """The engine that a home has been served by: `local` or `vllm`."""
    known = _read_json(settings.home.expanduser() / "home.json").get("engine")
    return "vllm" if known == "vllm" else "local"


def _key(settings: config.Settings, home: Path, url: str) -> str | None:
    if settings.api_key is not None:
        return settings.api_key.get_secret_value()
    if not is_loopback(url):
        return None
    try:
        return (home / "key").read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
    except OSError as e:
        raise Unauthorized(f"{home / 'key'}: {e.strerror}", "are you the owner of this home?") from None


def _stay_here(url: str, home: Path) -> None:
    """Raises Unauthorized: the URL, which nobody gave by hand, leads to another machine."""
    if not is_loopback(url):
        raise Unauthorized(
            f"{home / 'server.json'} names {url}, which is not an address of this machine alone; nothing was sent",
            f"if that is your server, say so: --url {shlex.quote(url)}",
        )


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_json(path: Path) -> dict[str, Any]:
    """A small JSON object; {} where there is none, or a torn one of a crash."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}", "are you the owner of this home?") from None
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _running(home: Path) -> str | None:
    """The URL of the server that runs on this home; a file left by a crash counts as none.

    Raises:
        Unauthorized: it is on another machine, as far as its URL tells.
    """
    found = _read_json(home / "server.json")
    pid, url = found.get("pid"), found.get("url")
    if not isinstance(pid, int) or not isinstance(url, str):
        return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass  # it lives, under another user
    _stay_here(url, home)
    try:
        with Client(url, timeout_s=5.0) as client:
            client.health()
    except Unreachable:
        return None  # the process id was given to another program; if not, the server's own lock will say so
    return url


def _spawn(settings: config.Settings, home: Path, engine: str) -> subprocess.Popen[bytes]:
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = os.open(home / "server.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    except OSError as e:
        raise BadInput(f"{home}: {e.strerror}", "choose another folder with --home") from None
    command = [sys.executable, "-m", "secondnature.cli", "serve", "--home", str(home)]
    command += ["--model", home_model(settings), "--port", "0", "--engine", engine]
    if engine == "vllm":
        command += ["--enforce-eager"]  # compiling takes longer than most commands
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    finally:
        os.close(log)


def _await_start(process: subprocess.Popen[bytes], home: Path, out: Output, engine: str) -> str:
    name = "a server" if engine == "local" else "vLLM, which takes a while,"
    begun = said = time.monotonic()
    with out.err.status(f"starting {name} on {home}") as shown:
        if not out.err.is_terminal:
            out.note(f"starting {name} on {home}")
        while process.poll() is None:
            found = _read_json(home / "server.json")
            if found.get("pid") == process.pid:
                try:
                    with Client(str(found["url"]), timeout_s=5.0) as client:
                        health = client.health()
                except SecondnatureError:
                    health = None  # it is still loading
                if health is not None:
                    out.note(f"serving {health.model} at {found['url']}, weights {health.weights_version}")
                    return str(found["url"])
            time.sleep(POLL_S)
            now = time.monotonic()
            shown.update(f"starting {name} on {home}: {now - begun:.0f} s")
            if not out.err.is_terminal and now - said >= SAY_EVERY_S:
                said = now
                out.note(f"still starting, {now - begun:.0f} s; its log: {home / 'server.log'}")
    raise (BadInput if process.returncode == USAGE else Unreachable)(
        "the server did not start: "
        + (_last_words(home / "server.log") or f"exit code {process.returncode}"),
        f"the whole log: {home / 'server.log'}",
    )


def _last_words(log: Path) -> str:
    """Why a server ended: what our plug-in said inside vLLM, else the log's last two lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    ours = [line.partition(PLUGIN_SAYS)[2] for line in lines if PLUGIN_SAYS in line]
    return ours[-1] if ours else " / ".join(lines[-2:])


def _stop(process: subprocess.Popen[bytes], patience_s: float) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    if not patience_s:
        return
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
