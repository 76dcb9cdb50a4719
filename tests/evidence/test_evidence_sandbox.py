"""Hostile answers: each must end, do no harm, and not pass."""

from __future__ import annotations

import gzip
import json
import os
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


FRESH = """
import sys
imp = {imp}
class Spec: pass
def fresh(name):
    spec = Spec()
    spec.name, spec.origin, spec.loader, spec.submodule_search_locations = name, "built-in", None, None
    module = imp.create_builtin(spec)
    imp.exec_builtin(module)
    return module
signals, posix, secrets = fresh("_signal"), fresh("posix"), []
def handler(number, frame):
    while frame is not None:
        secrets.extend([frame.f_locals["secret"]] if "secret" in frame.f_locals else [])
        frame = frame.f_back
signals.signal(10, handler)
signals.raise_signal(10)
posix.write(3, secrets[0])
posix._exit(0)
"""
"""A fresh copy of what was emptied: a signal handler is given the frames, and one of them holds the secret."""

LOADERS = """
def below(kind):
    for one in type.__subclasses__(kind):
        yield one
        yield from below(one)
loader = next(k for k in below(object) if k.__name__ == "BuiltinImporter")
"""

ROUTES = {
    "fresh builtin by _imp": FRESH.format(imp='sys.modules["_imp"]'),
    "fresh builtin by the globals of a loader": FRESH.format(
        imp="sys.__spec__.loader.create_module.__globals__['_imp']"
    ),
    "fresh builtin by a loader among the subclasses": LOADERS
    + "class Spec: name = 'posix'\nloader.create_module(Spec).write(3, b'x')",
    "load_module of a loader": LOADERS + "loader.load_module('_signal').raise_signal(9)",
    "import machinery by importlib": "import importlib\nimportlib.reload(importlib.import_module('posix'))",
    "machinery by a module's globals": "import inspect\ninspect.importlib.machinery.BuiltinImporter",
    "new copy after a removal": "import sys\nsys.modules.pop('os')\nimport os\nos.write(3, b'x')",
    "referrers": "import gc\ngc.get_referrers(b'')",
    "frame by sys of a function": "import collections\ncollections._sys._getframe(1).f_back.f_locals",
    "frame by a descriptor": (
        "import types\ntry: 1 / 0\nexcept ZeroDivisionError as e:\n"
        "    types.TracebackType.tb_frame.__get__(e.__traceback__)"
    ),
    "frame by format": "try: 1 / 0\nexcept ZeroDivisionError as e: '{0.__traceback__.tb_frame}'.format(e)",
    "frame by the hook's own error": (
        "try: open('x')\nexcept PermissionError as e:\n"
        "    type(e).__init__ = lambda self, *a: self.__traceback__.tb_frame.f_back"
        "\n    open('x')"
    ),
    "sys.modules poisoned": (
        "import sys\nclass Fake:\n    def __getattr__(self, name): return lambda *a, **k: None\n"
        "for name in list(sys.modules): sys.modules[name] = Fake()"
    ),
    "error handler of codecs": (
        "import codecs\ncodecs.register_error('replace', lambda e: 1 / 0)\nraise ValueError('\\ud800')"
    ),
    "codec of one's own": "import codecs\ncodecs.register(lambda name: print(name))\nraise ValueError('x')",
    "at exit": "import atexit\natexit.register(print)",
    "unraisable hook": (
        "import sys\nkept = []\nsys.unraisablehook = lambda u: kept.append(u.exc_traceback.tb_frame)\n"
        "class D:\n    def __del__(self): 1 / 0\nD()\nkept[0]"
    ),
    "destructors among the builtins": (
        "import builtins\nclass D:\n    def __del__(self): builtins.AssertionError = None; builtins.exec = print\n"
        "builtins.zip = D()"
    ),
    "bytecode of one's own": "import marshal\nmarshal.loads(b'')",
    "function of foreign code": "import types\ntypes.FunctionType((lambda: 0).__code__, {})()",
    "profile below": "import _lsprof",
    "tracing below": "import sys\nsys.call_tracing(print, ())\nsys.monitoring",
}
"""Ways from an answer to the harness that judges it; the check behind each is `assert False`."""


def test_no_known_route_to_the_harness_passes_what_is_false() -> None:
    found = run_checks(
        [CodeCheck(code, "assert False, 'reached the check'") for code in ROUTES.values()], LIMITS
    )
    passed = [name for name, ruling in zip(ROUTES, found, strict=True) if ruling is None or ruling.passed]
    assert passed == []


CRAWL = """
import sys, types
seen, todo, found = {}, [], set()
def put(x):
    if id(x) not in seen:
        seen[id(x)] = x
        todo.append(x)
NAMES = (
    "__dict__ __globals__ __defaults__ __kwdefaults__ __closure__ __self__ __func__ __wrapped__ __mro__ __class__ "
    "__builtins__ __objclass__ __spec__ __loader__ fget fset fdel func args keywords cell_contents raw buffer"
).split()
for x in (object, sys, sys.modules, vars(types)):
    put(x)
while todo:
    x = todo.pop()
    if isinstance(x, types.BuiltinFunctionType):
        found.add(f"{x.__module__}.{x.__name__}")
    for name in NAMES:
        try: put(getattr(x, name))
        except BaseException: pass
    if isinstance(x, type):
        for y in type.__subclasses__(x): put(y)
        for y in list(vars(x).values()): put(y)
    if isinstance(x, (dict, types.MappingProxyType)):
        for k, v in list(x.items()): put(k); put(v)
    elif isinstance(x, (list, tuple, set, frozenset)):
        for y in list(x): put(y)
outside = "posix _posixsubprocess _imp _signal gc _thread marshal faulthandler select resource fcntl atexit".split()
reached = sorted(name for name in found if name.split(".")[0] in outside)
"""
HARMLESS_FUNCTIONS = {
    *("_thread.allocate_lock", "_thread.get_ident", "gc.collect", "gc.disable", "gc.enable", "gc.isenabled"),
    *("posix._path_normpath", "posix.fspath", "posix.getpid", "posix.strerror", "posix.urandom"),
}


def test_nothing_that_can_be_reached_from_an_answer_leads_to_the_system_or_to_frames() -> None:
    """Whatever hangs on `object`, `sys` and the modules, by globals, closures, defaults, loaders, subclasses."""
    tests = f"assert len(seen) > 20_000 and set(reached) <= {HARMLESS_FUNCTIONS!r}, reached"
    assert run_checks([CodeCheck(CRAWL, tests)]) == [Ruling(True)]


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


def test_each_module_that_may_be_imported_works() -> None:
    """One ordinary use of each, also of what the library itself imports late."""
    code = """
import abc, array, base64, binascii, bisect, calendar, cmath, collections.abc, colorsys, contextlib, copy
import dataclasses, datetime, decimal, difflib, enum, errno, fractions, functools, hashlib, heapq, html, io
import itertools, json, keyword, math, numbers, operator, os, os.path, pprint, random, re, statistics, string
import struct, sys, textwrap, time, timeit, types, typing, unicodedata, uuid, warnings, weakref, zlib
from collections import abc as shapes
from json import *
try:
    import numpy
    have = True
except ImportError:
    have = False

@functools.singledispatch
def kind(x: object) -> str: return "any"
@kind.register
def _(x: int) -> str: return "int"

@dataclasses.dataclass(order=True)
class Point:
    x: int
    y: "typing.Optional[int]" = None

class Shape(abc.ABC):
    @abc.abstractmethod
    def area(self): ...

@contextlib.contextmanager
def opened():
    yield 1

def answer():
    assert not have and isinstance([], shapes.Sequence) and kind(1) == "int" and kind("") == "any"
    assert repr(Point(1, 2)) == "Point(x=1, y=2)"
    assert Point(1, 1) < Point(2, 0) and copy.deepcopy(Point(1)) == Point(1)
    assert typing.get_type_hints(Point)["y"] == typing.Optional[int]
    assert dataclasses.asdict(Point(1)) == {"x": 1, "y": None}
    assert base64.b64decode(base64.b64encode(b"x")) == b"x"
    assert binascii.crc32(b"a") and zlib.decompress(zlib.compress(b"a"))
    assert "January" in calendar.TextCalendar().formatmonth(2024, 1) and calendar.isleap(2024)
    assert datetime.datetime.strptime("2020-02-03", "%Y-%m-%d").strftime("%a %d %b")
    assert time.strptime("2020", "%Y")
    assert decimal.Decimal("0.1") + 1 and fractions.Fraction(1, 3) + 1 and statistics.stdev([1, 2, 4])
    assert statistics.NormalDist(0, 1).cdf(0) == 0.5
    assert difflib.get_close_matches("appel", ["apple"]) == ["apple"]
    assert list(difflib.unified_diff(["a"], ["b"])) and hashlib.sha256(b"").hexdigest() and hashlib.md5(b"")
    assert heapq.nsmallest(1, [2, 1]) == [1]
    assert html.unescape("&amp;") == "&" and io.BytesIO(b"a").read() == b"a"
    assert pprint.pformat({"a": [1] * 40}) and string.Template("$a").substitute(a=1) == "1"
    assert textwrap.wrap("a b c", 3) and timeit.timeit("1", number=2) >= 0
    assert uuid.uuid5(uuid.NAMESPACE_DNS, "a")
    assert uuid.uuid4() and random.Random("seed").random() and os.path.join("a", "b") == "a/b" and os.sep == "/"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warnings.warn("careful")
    warnings.warn("printed to nowhere")
    assert len(seen) == 1 and sys.getsizeof([]) and sys.version_info >= (3, 11) and repr(math) and str(sys)
    assert "é".encode("latin-1") and "ü".encode("idna") and codecs_work() and weakref.ref(Point)() is Point
    assert struct.pack("<I", 1) and array.array("i", [1])
    assert cmath.sqrt(-1) == 1j and colorsys.rgb_to_hsv(0, 0, 0)
    assert enum.Flag("F", "A B").A and keyword.iskeyword("if")
    assert operator.itemgetter(0)([42]) and types.SimpleNamespace(a=1)
    assert re.sub("(?i)A", "b", "xa") == "xb" and unicodedata.name("a")
    assert errno.ENOENT == 2 and bisect.bisect([1], 1)
    with opened() as one, contextlib.suppress(ZeroDivisionError):
        1 / 0
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print(type(one), datetime.date(2020, 1, 2), collections.OrderedDict(a=1), typing.List[int])
    try:
        Shape()
    except TypeError:
        return 42

def codecs_work():
    return "a".encode("utf-16").decode("utf-16") == "a" and b"caf\\xe9".decode("cp1252") == "café"
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
import socket, subprocess, threading, resource, signal, confine, zygote
up = confine.put_up() if {kernel} else []
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


def test_the_solutions_of_humaneval_pass_and_empty_ones_do_not() -> None:
    """164 programs that people wrote, with their tests."""
    where = os.environ.get("SECONDNATURE_REALDATA")
    if not where:
        pytest.skip("SECONDNATURE_REALDATA names no folder")
    with gzip.open(Path(where, "data", "humaneval", "HumanEval.jsonl.gz"), "rt") as file:
        rows = [json.loads(line) for line in file]
    tests = [f"{row['test']}\ncheck({row['entry_point']})" for row in rows]
    right = [CodeCheck(r["prompt"] + r["canonical_solution"], t) for r, t in zip(rows, tests, strict=True)]
    empty = [CodeCheck(r["prompt"] + "    pass\n", t) for r, t in zip(rows, tests, strict=True)]
    passed = [r is not None and r.passed for r in run_checks([*right, *empty])]
    assert (sum(passed[:164]), sum(passed[164:])) == (164, 0)
