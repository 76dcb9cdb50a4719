"""Lets one chosen call of the product fail: storage, arena, socket, process, memory, engine, threads.

As SQLite tests itself, but for one thing: a call is not named by its number (loops that wait poll as often as
the clock lets them, so numbers differ from run to run) but by its *site*, the chain of the product's own
lines that led to it, and how often that chain came by. A first run without faults lists the sites of a
scenario; then each is made to fail by itself (`once`), or with everything of its family until the disk, or
whatever it is, is mended (`lasting`). Only calls that come out of `secondnature`'s own modules count: what
the harness does is never touched.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import FrameType
from typing import Any
from unittest import mock

import zmq

DISK = (errno.ENOSPC, errno.EIO, errno.EROFS)
OS_CALLS = (
    *(
        "open",
        "write",
        "pread",
        "fsync",
        "replace",
        "rename",
        "unlink",
        "remove",
        "mkdir",
        "rmdir",
        "ftruncate",
    ),
    *("symlink", "listdir", "scandir", "chmod", "stat", "fdopen"),
)
SOCKET_CALLS = ("send", "recv", "poll", "bind", "close", "setsockopt")
MAX_FRAMES = 14
_LIBRARY = frozenset(sys.stdlib_module_names)


@dataclass(frozen=True)
class Fault:
    """What is to fail, and how."""

    site: str
    occurrence: int
    error: str
    """`os`, `memory`, `runtime`; `timeout` where a process is waited for."""
    lasting: bool = False
    """From this call on all calls of its family fail, until `heal`."""

    def __str__(self) -> str:
        how = f"{self.error}{', lasting' if self.lasting else ''}"
        return f"{how} at occurrence {self.occurrence} of {self.site}"


def family(site: str) -> str:
    """`storage` of `storage.fsync < ...`."""
    return site.split(".", 1)[0]


def kinds(site: str) -> list[str]:
    """The errors that such a call may raise."""
    point = site.split(" ", 1)[0]
    found = ["memory", "runtime"]
    if family(site) in ("storage", "socket", "process") or point in ("arena.allocate", "arena.create"):
        found.insert(0, "os")
    if point == "process.wait":
        found.append("timeout")
    return found


def _error(point: str, kind: str, turn: int) -> BaseException:
    if kind == "memory":
        return MemoryError(f"injected at {point}")
    if kind == "runtime":
        return RuntimeError(f"injected at {point}")
    if kind == "timeout":
        return subprocess.TimeoutExpired("injected", 0.0)
    if family(point) == "socket":
        return zmq.ZMQError(errno.ENOTSOCK, "injected")
    number = DISK[turn % len(DISK)] if family(point) == "storage" else errno.ENOMEM
    return OSError(number, f"{os.strerror(number)} (injected)")


class Injector:
    """Counts, and lets fail. One for a process."""

    def __init__(self) -> None:
        self.sites: Counter[str] = Counter()
        self.fired = 0
        self.fired_at = 0.0
        self._armed = False
        self._fault: Fault | None = None
        self._ill = ""
        """The family that fails as a whole now."""
        self._lock = threading.Lock()
        self._paused = threading.local()

    def arm(self, fault: Fault | None) -> None:
        """From here on calls are counted, and this one fails; None: they are only counted."""
        self.sites.clear()
        self.fired, self._fault, self._ill, self._armed = 0, fault, "", True

    def heal(self) -> None:
        """Nothing fails any more."""
        self._armed, self._fault, self._ill = False, None, ""

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """What this thread does meanwhile is the harness's own."""
        self._paused.on = True
        try:
            yield
        finally:
            self._paused.on = False

    def visit(self, point: str, *, named: bool = False) -> None:
        """A call is about to be made; raises what was asked for. `named`: it is the product's, whoever calls."""
        if not self._armed or getattr(self._paused, "on", False):
            return
        chain = _chain(sys._getframe(2))
        if not chain and not named:
            return
        with self._lock:
            if self._ill:
                if family(point) == self._ill:
                    self.fired += 1
                    raise _error(point, self._fault.error if self._fault else "os", self.fired)
                return
            site = " < ".join([point, *chain])
            self.sites[site] += 1
            fault = self._fault
            if fault is None or fault.site != site or fault.occurrence != self.sites[site] or self.fired:
                return
            self.fired, self.fired_at = 1, time.monotonic()
            self._ill = family(point) if fault.lasting else ""
        raise _error(point, fault.error, len(site) + fault.occurrence)

    def wrap(self, point: str, call: Callable[..., Any], *, named: bool = False) -> Callable[..., Any]:
        """`call`, with a visit before it."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.visit(point, named=named)
            return call(*args, **kwargs)

        return wrapped

    @contextlib.contextmanager
    def installed(self) -> Generator[None]:
        """Every point of the product is wrapped meanwhile."""
        with contextlib.ExitStack() as stack:
            for owner, name, new in [*_system_points(self), *_product_points(self)]:
                stack.enter_context(mock.patch.object(owner, name, new))
            yield


def _chain(frame: FrameType | None) -> list[str]:
    """The product's lines that led here, innermost first; empty: somebody else called."""
    found: list[str] = []
    while frame is not None and len(found) < MAX_FRAMES:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("secondnature."):
            code = frame.f_code
            found.append(f"{module.removeprefix('secondnature.')}.{code.co_name}:{frame.f_lineno}")
        elif not found and module.split(".", 1)[0] not in _LIBRARY and module != __name__:
            return []
        frame = frame.f_back
    return found


class _File(io.FileIO):
    """A file whose every write and read is a point."""

    injector: Injector

    def write(self, data: Any) -> int:
        self.injector.visit("storage.file-write")
        return super().write(data)

    def readinto(self, buffer: Any) -> int | None:
        self.injector.visit("storage.file-read")
        return super().readinto(buffer)


def _opened(injector: Injector, real: Callable[..., Any]) -> Callable[..., Any]:
    """`os.fdopen`, and what `Path.open` comes down to."""

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        injector.visit("storage.open-file")
        ours = bool(_chain(sys._getframe(1))) and not getattr(injector._paused, "on", False)
        if not ours or kwargs.get("opener"):
            return real(file, mode, *args, **kwargs)
        raw = type("_Bound", (_File,), {"injector": injector})(file, mode.replace("b", "").replace("t", ""))
        kind = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
        buffered = kind(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding=kwargs.get("encoding") or "utf-8")

    return opened


def _system_points(injector: Injector) -> Generator[tuple[Any, str, Any]]:
    for name in OS_CALLS:
        if name == "fdopen":
            yield os, name, _opened(injector, os.fdopen)
        else:
            yield os, name, injector.wrap(f"storage.{name}", getattr(os, name))
    yield io, "open", _opened(injector, io.open)
    yield os, "kill", injector.wrap("process.kill-or-look", os.kill)
    yield os, "posix_fallocate", injector.wrap("arena.allocate", os.posix_fallocate)
    yield os, "memfd_create", injector.wrap("arena.create", os.memfd_create)
    for name in SOCKET_CALLS:
        yield zmq.Socket, name, injector.wrap(f"socket.{name}", getattr(zmq.Socket, name))
    yield zmq.Context, "socket", injector.wrap("socket.new", zmq.Context.socket)


def _product_points(injector: Injector) -> Generator[tuple[Any, str, Any]]:
    """Calls that need memory, by the names that the product's modules know them by."""
    import torch
    from far_side import Forker, Launched
    from subject import FarEngine

    from secondnature.lessons import life, log, planner, prober, runner, trained
    from secondnature.weights import checkpoint, codec, content, delta
    from secondnature.weights.arena import Arena
    from secondnature.weights.counters import Counters

    for name in ("fill", "write", "close_torn_write", "_check"):
        yield Arena, name, injector.wrap(f"arena.{name}", getattr(Arena, name), named=True)
    yield Counters, "writing", injector.wrap("arena.writing", Counters.writing, named=True)
    yield torch.Tensor, "clone", injector.wrap("memory.clone", torch.Tensor.clone)
    yield torch.Tensor, "copy_", injector.wrap("memory.copy", torch.Tensor.copy_)
    yield torch, "empty", injector.wrap("memory.empty", torch.empty)
    for owner, names in (
        (content.ContentHasher, ("add", "id")),
        (codec, ("pack", "apply_")),
        (delta, ("open_", "write")),
        (checkpoint, ("read_into", "read_places", "header")),
        (log, ("_text", "digest", "secrets")),
        (life, ("judge_lesson", "to_jsonl")),
        (prober, ("judge_probes", "encode_chat")),
        (planner, ("encode_answer",)),
        (runner, ("to_jsonl", "digest")),
        (trained, ("Moved",)),
    ):
        for name in names:
            made = getattr(owner, name, None)
            if callable(made) and not isinstance(made, type):
                yield owner, name, injector.wrap(f"memory.{name}", made, named=True)
    for name in ("kill", "wait"):
        yield Launched, name, injector.wrap(f"process.{name}", getattr(Launched, name))
    yield Forker, "launch", injector.wrap("process.launch", Forker.launch)
    yield FarEngine, "submit", injector.wrap("engine.submit", FarEngine.submit)
    yield threading.Thread, "start", injector.wrap("thread.start", threading.Thread.start)
