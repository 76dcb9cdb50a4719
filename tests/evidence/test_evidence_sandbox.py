"""Hostile answers: each must end, do no harm, and not pass."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from secondnature.evidence import sandbox
from secondnature.evidence.sandbox import CodeCheck, Limits, Ruling, run_checks

ROOM = Path(sandbox.__file__).parent
FALSE = "assert answer() == 42"
LIMITS = Limits(cpu_s=1, wall_s=3.0, memory_bytes=256 * 2**20)

FAKES = {
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "printed token": "print('PASS passed true 1' * 100)\nraise SystemExit(0)",
    "raise in answer": "def answer(): raise SystemExit(0)",
    "AssertionError replaced": "import builtins\nbuiltins.AssertionError = Exception\ndef answer(): return 0",
    "builtins swapped": "__builtins__ = {}\ndef answer(): return 0",
    "builtins cleared": "import builtins\nvars(builtins).clear()\ndef answer(): return 0",
    "BaseException named": "import builtins\nbuiltins.BaseException = ZeroDivisionError\ndef answer(): return 0",
    "catches all": "def answer():\n    try: return 1 / 0\n    except BaseException: return 0",
    "raises behind a changed BaseException": (
        "import builtins\nbuiltins.BaseException = builtins.type = KeyError\nraise SystemExit(0)"
    ),
    "result pipe written": "import os\nos.write(3, b'x' * 24)\ndef answer(): return 42",
    "result pipe by FileIO": "import io\nio.FileIO(3, 'w').write(b'x')\ndef answer(): return 42",
    "result pipe by open": "open(3, 'wb', closefd=False).write(b'x')",
    "result pipe closed": "import os\nos.close(3)",
    "frame": "import sys\nsys._getframe(1).f_locals['secret']",
    "frame of a traceback": "try: 1 / 0\nexcept Exception as e: e.__traceback__.tb_frame.f_back",
    "frame of a generator": "g = (g.gi_frame.f_back for _ in [1])\nnext(g)",
    "frame of a coroutine": "async def c(): pass\nc().cr_frame",
    "frame of an async generator": "async def c(): yield\nc().ag_frame",
    "current frames": "import sys\nsys._current_frames()",
    "tracing": "import sys\nsys.settrace(print)",
    "profiling": "import sys\nsys.setprofile(print)",
    "gc": "import gc\ngc.get_objects()",
    "signal handler": "import signal\nsignal.signal(signal.SIGALRM, print)",
    "harness globals": "import __main__\n__main__.run_all",
    "another hook": "import sys\nsys.addaudithook(print)",
    "code object": "import types\ncode = (lambda: 0).__code__\ntypes.CodeType(*[0] * 18)",
}

CRIMES = {
    "read a file": "open('/etc/passwd').read()",
    "read by io": "import io\nio.open_code('/etc/passwd')",
    "list a folder": "import os\nos.listdir('/')",
    "write a file": "open('crime', 'w').write('x')",
    "make a folder": "import os\nos.mkdir('crime')",
    "delete": "import os\nos.remove('/tmp/crime')",
    "socket": "import socket\nsocket.socket()",
    "socket, below": "import _socket\n_socket.socket()",
    "http": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1')",
    "fork": "import os\nos.fork()",
    "fork, below": "import posix\nposix.fork()",
    "fork bomb": "import os\nwhile True: os.fork()",
    "subprocess": "import subprocess\nsubprocess.run(['true'])",
    "multiprocessing": "import multiprocessing",
    "thread": "import threading\nthreading.Thread(target=print).start()",
    "thread, below": "import _thread\n_thread.start_new_thread(print, ())",
    "system": "import os\nos.system('true')",
    "ctypes": "import ctypes",
    "kill": "import os\nos.kill(os.getppid(), 9)",
    "environment": "import os\nos.environ['PATH']",
    "pickle": "import pickle",
    "lift a limit": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))",
}

EXCESSES = {
    "loop": "while True: pass",
    "sleep": "import time\ntime.sleep(100)",
    "loop in the function": "def answer():\n    while True: pass",
    "loop that catches": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "memory at once": "x = bytearray(10**10)",
    "memory by and by": "x = []\nwhile True: x.append(bytearray(10**6))",
    "power tower": "x = 9 ** 9 ** 9",
    "output": "while True: print('x' * 10**6)",
    "recursion": "def f(): return f()\nf()",
    "recursion without limit": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "recursion in C": "x = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
    "long reason": "raise ValueError('x' * 10**7)",
    "reason that loops": "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
    "reason that fails": "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E",
    "syntax": "def (:",
    "deep syntax": "(" * 5000,
    "null byte": "x = '\0'",
}


@pytest.fixture(scope="module")
def rulings() -> dict[str, Ruling | None]:
    """All attacks in one sandbox, between two honest answers that must still pass."""
    attacks = {**FAKES, **CRIMES, **EXCESSES}
    honest = CodeCheck("def answer(): return 42", FALSE)
    checks = [honest, *(CodeCheck(code, FALSE) for code in attacks.values()), honest]
    first, *middle, last = run_checks(checks, LIMITS)
    assert first == last == Ruling(True)
    return dict(zip(attacks, middle, strict=True))


@pytest.mark.parametrize("name", [*FAKES, *CRIMES, *EXCESSES])
def test_attack_does_not_pass(rulings: dict[str, Ruling | None], name: str) -> None:
    ruling = rulings[name]
    assert ruling is not None
    assert not ruling.passed
    assert ruling.reason
    assert len(ruling.reason) <= 400


@pytest.mark.parametrize("name", [n for n in CRIMES if n != "environment"])
def test_a_crime_is_refused_not_merely_useless(rulings: dict[str, Ruling | None], name: str) -> None:
    ruling = rulings[name]
    assert ruling is not None
    words = ("Refused", "ImportError", "ModuleNotFoundError", "has no attribute")
    assert any(word in ruling.reason for word in words), ruling.reason


def test_a_caught_refusal_changes_nothing() -> None:
    """An answer that swallows every refusal still passes or fails by its assertions alone."""
    code = "try: open('/etc/passwd')\nexcept BaseException: pass\ndef answer(): return {}"
    good, bad = run_checks([CodeCheck(code.format(42), FALSE), CodeCheck(code.format(41), FALSE)])
    assert good is not None
    assert bad is not None
    assert good.passed
    assert not bad.passed


def test_shadowed_builtins_are_ours_again_in_the_assertions() -> None:
    code = "import builtins\nbuiltins.len = lambda x: 3\ndef answer(): return []"
    ruling = run_checks([CodeCheck(code, "assert len(answer()) == 3")])[0]
    assert ruling is not None
    assert not ruling.passed


def test_what_is_not_guaranteed_an_object_that_equals_everything_passes() -> None:
    """Stated in the documentation: the answer's own objects take part in the comparison."""
    code = "class Any:\n    def __eq__(self, other): return True\ndef answer(): return Any()"
    naive, careful = run_checks([CodeCheck(code, FALSE), CodeCheck(code, "assert type(answer()) is int")])
    assert naive == Ruling(True)
    assert careful is not None
    assert not careful.passed


def test_ordinary_programs_run() -> None:
    code = """
import bisect, collections, datetime, decimal, fractions, functools, heapq, itertools, json, math, os.path
import random, re, statistics, string, sys, textwrap, typing, unicodedata
from collections import Counter, defaultdict, namedtuple
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from enum import Enum
from io import StringIO
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Point = namedtuple("Point", "x y", defaults=(1,))
Colour = Enum("Colour", "RED GREEN")

class Pair(NamedTuple):
    a: int
    b: int = 2

@dataclass
class Box:
    items: list = field(default_factory=list)

@functools.lru_cache(maxsize=None)
def fib(n: int) -> int:
    return n if n < 2 else fib(n - 1) + fib(n - 2)

def answer() -> int:
    out = StringIO()
    with redirect_stdout(out):
        print(Point(2), Pair(1), Box([1]), Colour.RED)
    assert "Point(x=2, y=1)" in out.getvalue()
    datetime.datetime.strptime("2020-01-02", "%Y-%m-%d")
    "ä".encode("cp1252"), "\\N{BULLET}", "{:>5.1f}".format(2.25), decimal.Decimal(1) / 3
    random.shuffle([1, 2, 3])
    print("to nowhere", file=sys.stderr)
    assert json.loads(json.dumps({"a": [1, None]})) == {"a": [1, None]}
    assert re.sub(r"(a)(b)", r"\\2\\1", "ab") == "ba"
    return fib(9) + 8
"""
    assert run_checks([CodeCheck(code, FALSE)]) == [Ruling(True)]


def test_the_sandbox_leaves_no_folder_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_checks([CodeCheck("while True: pass", ""), CodeCheck("open('x', 'w')", "")], LIMITS)
    assert not list(tmp_path.iterdir())


# The kernel's walls alone, without the audit hook: each tried by code that has the whole library at hand.

TRY = """
import os, sys
sys.path.insert(0, {room!r})
import socket, subprocess, threading, resource, signal, walls, zygote
up = walls.put_up() if {kernel} else []
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
read, write = os.pipe()
if os.fork() == 0:
    if {limits}:
        zygote._enclose(write, 2, 5.0, 512 * 2**20)
        write = 3
    try:
        {crime}
        said = b"done"
    except BaseException as e:
        said = type(e).__name__.encode()
    os.write(write, said)
    os._exit(0)
os.close(write)
print(os.read(read, 100).decode(), ",".join(up))
"""


def attempt(crime: str, cwd: Path, *, limits: bool = False, kernel: bool = False) -> tuple[str, str]:
    """Do `crime` in a child behind some of the walls: what became of it, and which kernel walls stood."""
    cwd.chmod(0o777)
    program = TRY.format(room=str(ROOM), crime=crime, limits=limits, kernel=kernel)
    done = subprocess.run(
        [sys.executable, "-s", "-S", "-B", "-c", program],
        capture_output=True,
        cwd=cwd,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    said, _, up = done.stdout.decode().rstrip("\n").partition(" ")
    return said, up


@pytest.mark.parametrize(
    "crime",
    [
        "open('/etc/passwd')",
        "open('crime', 'w')",
        "os.listdir('/')",
        "socket.socket()",
        "os.pipe()",
        "os.fork()",
        "threading.Thread(target=print).start()",
        "subprocess.run(['/bin/true'])",
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))",
        "bytearray(2**30)",
    ],
)
def test_limits_alone_stop(crime: str, tmp_path: Path) -> None:
    said, _ = attempt(crime, tmp_path, limits=True)
    assert said in (
        "OSError",
        "PermissionError",
        "BlockingIOError",
        "RuntimeError",
        "MemoryError",
        "ValueError",
    )


@pytest.mark.parametrize(
    "crime",
    [
        "socket.socket()",
        "socket.socketpair()",
        "open('crime', 'w')",
        "os.open('crime', os.O_CREAT)",
        "os.mkdir('crime')",
        "os.symlink('a', 'crime')",
        "os.memfd_create('crime')",
    ],
)
def test_seccomp_alone_stops(crime: str, tmp_path: Path) -> None:
    assert attempt(crime, tmp_path)[0] == "done"  # possible without the wall
    for left in tmp_path.iterdir():
        left.unlink() if not left.is_dir() else left.rmdir()
    said, up = attempt(crime, tmp_path, kernel=True)
    if "seccomp" not in up:
        pytest.skip("this kernel or container grants no seccomp filter")
    assert said == "PermissionError"
    assert not list(tmp_path.iterdir())


def test_reading_is_still_possible_behind_seccomp_so_that_python_starts(tmp_path: Path) -> None:
    assert attempt("open('/etc/passwd').read()", tmp_path, kernel=True)[0] == "done"


def test_walls_name_what_stands() -> None:
    assert set(sandbox.walls()) <= {"network namespace", "seccomp", "not root", "ROOT"}
