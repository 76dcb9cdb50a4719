"""Second stage of the sandbox: a small process that forks one limited child per check (a process of its own).

Run by confine.py; not imported by anything. It reads all jobs from stdin, loads once what answers may import, drops
root, forks (a millisecond instead of an interpreter's start), kills what overstays, and writes all rulings at once.

A child can open nothing (RLIMIT_NOFILE 0: no file, socket or pipe, hence no further import), cannot fork or start a
thread (RLIMIT_NPROC 0), has little memory and CPU, an audit hook that refuses every event that is not known to be
harmless, and of all loaded modules only those that are named here: the rest, the import system too, is emptied.
A pass is a secret written to a pipe after the last assertion. The kernel's limits are guaranteed; that an answer
cannot get at the secret is not: the two share an interpreter, and what is kept here only makes that hard.
"""
# ruff: noqa: SIM905 - lists of words, as words

from __future__ import annotations

import builtins
import gc
import importlib
import json
import os
import random
import re
import resource
import select
import signal
import sys
import time
import types
from dataclasses import dataclass
from typing import Any, NoReturn

IMPORTABLE = """
__future__ abc array base64 binascii bisect calendar cmath collections collections.abc colorsys contextlib copy
dataclasses datetime decimal difflib enum errno fractions functools hashlib heapq html io itertools json keyword
math numbers operator os os.path pprint random re statistics string struct sys textwrap time timeit types typing
unicodedata uuid warnings zlib
""".split()
"""What answers may import: computing, no world. All is loaded before the first fork (`os` is then emptied)."""
LAZY = """
_strptime copyreg reprlib weakref encodings.ascii encodings.latin_1 encodings.cp1252 encodings.idna encodings.utf_16
encodings.utf_32 encodings.utf_8_sig encodings.unicode_escape encodings.raw_unicode_escape encodings.punycode
encodings.hex_codec encodings.rot_13 encodings.base64_codec
""".split()
"""What the library itself imports late."""
NEEDED = """
_abc _annotationlib _ast _bisect _blake2 _codecs _collections _collections_abc _colorize _contextvars _datetime
_decimal _functools _hashlib _heapq _io _json _locale _md5 _opcode _opcode_metadata _operator _py_warnings
_pydatetime _random _sha1 _sha2
_sha256 _sha3 _sha512 _sre _stat _statistics _string _struct _suggestions _tokenize _types _typing _uuid
_warnings _weakref _weakrefset annotationlib ast builtins codecs contextvars dis encodings encodings.aliases
encodings.utf_8 genericpath html.entities inspect json.decoder json.encoder json.scanner linecache locale opcode
posixpath re._casefix re._compiler re._constants re._parser stat stringprep token tokenize typing.io typing.re
""".split()
"""What those stand on. A module on none of the three lists is taken out of a child, its contents deleted."""
KEPT = {
    "_thread": "LockType RLock allocate_lock get_ident",
    "gc": "collect disable enable isenabled",
    "os": "PathLike altsep curdir extsep fspath getpid linesep name pardir path pathsep sep strerror urandom",
    "sys": (
        "__displayhook__ __excepthook__ __stderr__ __stdin__ __stdout__ __unraisablehook__ _getframemodulename "
        "abiflags api_version argv builtin_module_names byteorder copyright displayhook exc_info excepthook "
        "exception executable exit flags float_info float_repr_style get_int_max_str_digits getallocatedblocks "
        "getdefaultencoding getfilesystemencodeerrors getfilesystemencoding getrecursionlimit getrefcount "
        "getsizeof hash_info hexversion implementation int_info intern maxsize maxunicode modules path platform "
        "prefix set_int_max_str_digits setrecursionlimit stderr stdin stdlib_module_names stdout thread_info "
        "unraisablehook version version_info warnoptions"
    ),
}
"""Modules of which these names (and the doc and the name) are all that a child keeps."""
HARMLESS = frozenset(
    "compile exec builtins.id builtins.input builtins.input/result time.sleep object.__setattr__ "
    "object.__delattr__ array.__new__ sys.unraisablehook sys._getframemodulename".split()
)
"""Audit events that a child may raise; `import` and `object.__getattr__` are decided by their argument."""
FRAMES = frozenset(("tb_frame", "gi_frame", "cr_frame", "ag_frame"))
NOBODY = 65534
OUT = 3
"""The only descriptor of a child that leads anywhere: its result."""
MAX_REASON_BYTES = 400
REGEX_CPU_S = 0.5


class Refused(PermissionError, ValueError):
    """Not in the sandbox. (A ValueError too: the library expects one where frames are not to be had.)"""


class _Overtime(Exception):
    """A regular expression used up its time."""


@dataclass
class _Child:
    pid: int
    job: int
    secret: bytes
    deadline: float
    heard: bytes = b""


def _limit(kind: int, value: int) -> None:
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):  # the hard limit is lower already, or this system has no such limit
        return


def _enclose(pipe: int, cpu_s: int, wall_s: float, memory_bytes: int) -> None:
    """Cut a fresh child off: its own session, no descriptor but /dev/null (0 to 2) and the result, limits."""
    os.setsid()
    os.dup2(pipe, OUT)
    os.closerange(OUT + 1, 1024)
    signal.setitimer(signal.ITIMER_REAL, wall_s + 5)  # should the zygote be gone by then
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, cpu_s)
    _limit(resource.RLIMIT_AS, memory_bytes)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NPROC, 0)
    _limit(resource.RLIMIT_NOFILE, 0)


def _install_hook() -> None:
    """Refuse what is not known to be harmless. An audit hook cannot be taken off again."""
    harmless, frames, refused = HARMLESS, FRAMES, Refused

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in harmless or (event == "object.__getattr__" and arguments[1] not in frames):
            return
        if event == "import":
            raise ImportError(f"{arguments[0]} is not available in the sandbox")
        raise refused(f"{event} is not allowed in the sandbox")

    sys.addaudithook(hook)


def _run_answer(job: dict[str, Any], secret: bytes) -> NoReturn:
    """In a child: run the answer, then the assertions in its namespace; write the secret if all held.

    Whatever is needed after the answer has run is bound to a local name before: it may have changed the rest.
    """
    write, leave, limit = os.write, os._exit, MAX_REASON_BYTES
    built: dict[str, Any] = builtins.__dict__
    anything, kind, text, look = BaseException, type, str, getattr
    main = types.ModuleType("__main__")
    scope = vars(main)
    pristine = dict(built)
    where = "the answer"
    try:
        random.seed(0)  # the same answer gets the same ruling before and after a lesson
        answer = compile(job["code"], "<answer>", "exec", dont_inherit=True, optimize=0)
        where = "the check"
        tests = compile(job["tests"], "<check>", "exec", dont_inherit=True, optimize=0)
        where = "the answer"
        sys.modules["__main__"] = main
        _install_hook()
        _keep_what_is_allowed()
        globals().clear()
        exec(answer, scope)  # noqa: S102 - this is what the sandbox is for
        where = "the check"
        built.clear()
        built.update(pristine)
        scope["__builtins__"] = built
        exec(tests, scope)  # noqa: S102
        write(3, secret)
        leave(0)
    except anything as error:  # whatever an answer throws is its ruling
        built.clear()
        built.update(pristine)
        try:
            trace = error.__traceback__.tb_next if error.__traceback__ else None
            line = trace.tb_lineno if trace else look(error, "lineno", "?")
            said = f"{where}, line {line}: {kind(error).__name__}: {text(error)}"
            write(3, said.encode("utf-8", "replace")[:limit])
        finally:
            leave(1)
    leave(1)


def _keep_what_is_allowed() -> None:
    """Take every module out of this child that is not on the lists, and delete what it held.

    The import system is among them: it could make a fresh copy of what was emptied. What C code asks of it by name
    (`from PACKAGE import NAME`, `repr(MODULE)`) is put back; the hook has refused a real import before.
    """
    imports = sys.modules["_frozen_importlib"]
    whole = {*IMPORTABLE, *LAZY, *NEEDED, "__main__"} - KEPT.keys()
    for name, module in list(sys.modules.items()):
        if name in whole:
            continue
        kept = {"__name__", "__doc__", *KEPT.get(name, "").split()}
        contents = vars(module)
        for key in [k for k in contents if k not in kept]:
            del contents[key]
        if name not in KEPT:
            del sys.modules[name]
    vars(imports).update(_handle_fromlist=_as_it_is, _module_repr=_module_repr)


def _as_it_is(module: types.ModuleType, _names: object, _import: object) -> types.ModuleType:
    return module


def _module_repr(module: types.ModuleType) -> str:
    return f"<module {module.__name__!r}>"


def _run_regexes(items: list[list[str]]) -> NoReturn:
    """In a child: one byte per (pattern, text): found, absent, or overtime (0.5 s of CPU)."""

    def ring(_signal: int, _frame: types.FrameType | None) -> None:
        raise _Overtime

    signal.signal(signal.SIGVTALRM, ring)
    for pattern, text in items:
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, REGEX_CPU_S)
            found = re.search(pattern, text) is not None
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            os.write(OUT, b"1" if found else b"0")
        except (_Overtime, re.error, MemoryError, RecursionError, OverflowError):
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            os.write(OUT, b"t")
    os._exit(0)


def _start(job: dict[str, Any], number: int, limits: dict[str, Any]) -> tuple[int, _Child]:
    items: list[list[str]] | None = job.get("regexes")
    cpu_s = limits["cpu_s"] if items is None else int(REGEX_CPU_S * len(items)) + 2
    wall_s = limits["wall_s"] if items is None else 5 * cpu_s
    ours, theirs = os.pipe()
    secret = os.urandom(24)
    pid = os.fork()
    if pid == 0:
        leave = os._exit
        try:
            _enclose(theirs, cpu_s, wall_s, limits["memory_bytes"])
            if items is None:
                _run_answer(job, secret)
            _run_regexes(items)
        finally:
            leave(1)
    os.close(theirs)
    return ours, _Child(pid, number, secret, time.monotonic() + wall_s)


def _end(child: _Child, overdue: bool) -> dict[str, Any]:
    """Kill, reap and rule."""
    for kill in (os.killpg, os.kill):
        try:
            kill(child.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    _, status = os.waitpid(child.pid, 0)
    passed = child.heard == child.secret
    reason = "" if passed else child.heard.decode("utf-8", "replace")
    if overdue:
        reason = "took too long"
    elif not reason and not passed:
        ended = os.waitstatus_to_exitcode(status)
        killed = f"killed by signal {-ended} (out of CPU time or stack)" if ended < 0 else f"status {ended}"
        reason = f"ended without a ruling: {killed}"
    return {"passed": passed, "heard": reason}


def run_all(jobs: list[dict[str, Any]], limits: dict[str, Any]) -> list[dict[str, Any]]:
    """All rulings, in order; at most `limits["workers"]` children at a time."""
    rulings: list[dict[str, Any]] = [{} for _ in jobs]
    waiting = list(range(len(jobs)))[::-1]
    running: dict[int, _Child] = {}
    while waiting or running:
        while waiting and len(running) < limits["workers"]:
            number = waiting.pop()
            fd, child = _start(jobs[number], number, limits)
            running[fd] = child
        nearest = min(c.deadline for c in running.values())
        ready = select.select(list(running), [], [], max(0.0, nearest - time.monotonic()))[0]
        now = time.monotonic()
        for fd in list(running):
            child = running[fd]
            data = os.read(fd, 65536) if fd in ready else None
            child.heard = (child.heard + (data or b""))[:65536]
            overdue = now >= child.deadline
            if data == b"" or overdue:
                os.close(fd)
                rulings[child.job] = _end(running.pop(fd), overdue and data != b"")
    return rulings


def main() -> None:
    """Read the jobs, load, drop root, run, answer."""
    devnull, walls = int(sys.argv[1]), [w for w in sys.argv[2].split(",") if w]
    request = json.loads(sys.stdin.buffer.read())
    answer_to = os.dup(1)
    for fd in (0, 1, 2):
        os.dup2(devnull, fd)
    for name in IMPORTABLE + LAZY:
        importlib.import_module(name)
    if os.getuid() == 0:  # root is exempt from RLIMIT_NPROC and could lift the others
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            walls.append("not root")
        except OSError:
            walls.append("ROOT")
    gc.collect()
    gc.freeze()
    rulings = run_all(request["jobs"], request["limits"])
    with os.fdopen(answer_to, "wb") as out:
        out.write(json.dumps({"walls": walls, "rulings": rulings}).encode())


if __name__ == "__main__":
    main()
