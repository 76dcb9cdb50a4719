"""CPU seconds and the most private memory: of this process, or of the processes that it started (RssAnon)."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import Any, Self

__all__ = ["Cost", "Watched"]

LOOK_S = 0.05
_TICKS = os.sysconf("SC_CLK_TCK")


class _Looking:
    """Looks again and again, in a thread, while it is open."""

    def __enter__(self) -> Self:
        self._open = True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while self._open:
            self.look()
            time.sleep(LOOK_S)

    def __exit__(self, *_: object) -> None:
        self.look()
        self._open = False
        self._thread.join()

    def look(self) -> None:
        """Take note."""
        raise NotImplementedError


class Cost(_Looking):
    """Of this process."""

    def __init__(self) -> None:
        self._bytes, self._begun, self._last = 0, time.process_time(), 0.0

    def look(self) -> None:
        self._bytes = max(self._bytes, _anonymous("self"))
        self._last = time.process_time()

    def found(self) -> dict[str, Any]:
        """What it was."""
        return {"cpu_s": round(self._last - self._begun, 1), "peak_bytes": self._bytes}


class Watched(_Looking):
    """Of a server that this process started, and of its trainer."""

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}
        self._cpu: dict[str, tuple[float, float]] = {}

    def look(self) -> None:
        (server,) = _children(os.getpid(), "secondnature") or (None,)
        (trainer,) = (server and _children(server, "train.worker")) or (None,)
        for name, pid in (("server", server), ("trainer", trainer)):
            if pid is not None:
                try:
                    now, held = _cpu_s(pid), _anonymous(str(pid))
                except OSError:
                    continue
                self._bytes[name] = max(self._bytes.get(name, 0), held)
                self._cpu[name] = (self._cpu.get(name, (now, now))[0], now)

    def found(self) -> dict[str, Any]:
        """What it was, by process."""
        return {
            name: {"cpu_s": round(last - first, 1), "peak_bytes": self._bytes[name]}
            for name, (first, last) in self._cpu.items()
        }


def _anonymous(pid: str) -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(found[1]) * 1024 if found else 0


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _children(pid: int, named: str) -> list[int]:
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        every = [
            int(x) for t in Path(f"/proc/{pid}/task").iterdir() for x in (t / "children").read_text().split()
        ]
        found = sorted({*map(int, found), *every})
        return [p for p in found if named in Path(f"/proc/{p}/cmdline").read_text()][:1]
    except OSError:
        return []
