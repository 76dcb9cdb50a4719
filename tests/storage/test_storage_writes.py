"""What a write promises is so whichever of its calls the disk refuses, and however the machine ends in between."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from failing_disk import CALLS, disk

from secondnature import storage
from secondnature.errors import NotDurable, StorageError

OLD, NEW = ["1", '{"a": "two"}'], ['{"a": 3}', "4", "5"]


def replace(path: Path) -> None:
    storage.write_text(path, "".join(f"{line}\n" for line in [*OLD, *NEW]))


def one_line(path: Path) -> None:
    storage.append_line(path, NEW[0])


def many_lines(path: Path) -> None:
    storage.append_lines(path, NEW)


WRITES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "replace": (replace, [*OLD, *NEW]),
    "one line": (one_line, [*OLD, NEW[0]]),
    "many lines": (many_lines, [*OLD, *NEW]),
}


def calls_of(write: Callable[[Path], None], path: Path) -> list[str]:
    with disk() as seen:
        write(path)
    return seen.made


@pytest.mark.parametrize("before", ["old lines", "no file", "a torn end"])
@pytest.mark.parametrize("name", WRITES)
def test_whatever_call_fails_the_caller_is_told_what_is_there(tmp_path: Path, name: str, before: str) -> None:
    """`StorageError`: the old; `NotDurable`: the new, all of it. Never some, never a temporary file."""
    write, whole = WRITES[name]
    path = tmp_path / "log.jsonl"
    old = [] if before == "no file" else OLD
    whole = whole if old or name == "replace" else whole[len(OLD) :]

    def reset() -> None:
        path.unlink(missing_ok=True)
        if old:
            torn = '{"to' if before == "a torn end" else ""
            path.write_text("".join(f"{x}\n" for x in old) + torn)

    reset()
    num_calls = len(calls_of(write, path))
    assert num_calls >= 3
    outcomes: set[str] = set()
    for n in range(num_calls):
        reset()
        with disk(n) as seen, pytest.raises(StorageError) as caught:
            write(path)
        refused = seen.made[n]
        lines = [line for line in path.read_text().split("\n") if line] if path.exists() else []
        lines = [line for line in lines if line != '{"to']
        told = type(caught.value).__name__
        outcomes.add(told)
        assert lines == (whole if isinstance(caught.value, NotDurable) else old), (n, refused, told)
        assert ("nothing was changed" in str(caught.value)) == (told == "StorageError")
        assert [p.name for p in tmp_path.iterdir() if p != path] == []
        write(path)  # repeated: as if it had never failed
        assert path.read_text().endswith("".join(f"{x}\n" for x in whole[-1:]))
    assert outcomes == ({"StorageError"} if name == "one line" else {"StorageError", "NotDurable"})


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("injected"), KeyboardInterrupt()])
def test_no_error_of_any_kind_leaves_half_a_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "log.jsonl"
    for write, whole in WRITES.values():
        path.write_text("".join(f"{x}\n" for x in OLD))
        for n in range(len(calls_of(write, path))):
            path.write_text("".join(f"{x}\n" for x in OLD))
            with disk(n, error), pytest.raises((type(error), NotDurable)):  # the latter: it is all there
                write(path)
            assert path.read_text().split() in (
                [*"".join(OLD).split()],
                "\n".join(OLD).split(),
                "\n".join(whole).split(),
            )
            assert [p for p in tmp_path.iterdir() if p != path] == []


def test_a_line_that_was_refused_and_stays_is_said_to_stay(tmp_path: Path) -> None:
    """The sync fails, and the cut fails too: then the line may be there, and nobody says that it is not."""
    path = tmp_path / "log.jsonl"
    storage.append_line(path, "1")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(NotDurable, match="could not be cut off"):
            storage.append_line(path, "2")
    assert storage.read_durable(path).values == [(1, 1), (2, 2)]


def test_lines_are_all_there_or_none_whenever_the_power_goes(tmp_path: Path) -> None:
    """The process ends before the n-th call, for every n: what is on the disk is the old log, or the new one."""
    path = tmp_path / "log.jsonl"
    path.write_text("1\n")
    lines = [json.dumps({"n": n, "text": "x" * 500}) for n in range(200)]
    code = f"""
import os, sys
from pathlib import Path
from secondnature import storage
calls = 0
def wrapped(call):
    def wrapper(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(sys.argv[1]):
            if call is real_write:
                real_write(args[0], bytes(args[1])[:30_000])
            os._exit(9)
        return call(*args, **kwargs)
    return wrapper
real_write = os.write
lines = {lines!r}
for name in {CALLS!r}:
    setattr(os, name, wrapped(getattr(os, name)))
storage.append_lines(Path({str(path)!r}), lines)
"""
    seen: list[int] = []
    for n in range(1, 30):
        done = subprocess.run([sys.executable, "-c", code, str(n)], timeout=60, check=False)
        found = storage.read_durable(path)
        assert found.skipped == []
        seen.append(len(found.values))
        assert seen[-1] in (1, 201)
        if done.returncode == 0:
            break
        assert done.returncode == 9
        path.write_text("1\n")
    assert seen[0] == 1
    assert seen[-1] == 201
    assert len(seen) > 5


def test_a_full_disk_refuses_an_import_as_a_whole(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from pathlib import Path
from secondnature import storage
from secondnature.errors import NotDurable, StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path({str(tmp_path)!r}) / "log.jsonl"
storage.append_line(path, "1")
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
    storage.append_lines(path, ['"' + "a" * 100 + '"'] * 100)
except StorageError as e:
    print(type(e).__name__, e)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith("StorageError")
    assert "nothing was changed" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]
    assert (tmp_path / "log.jsonl").read_text() == "1\n"


def test_a_log_stays_plain_lines(tmp_path: Path) -> None:
    """No mark of a batch: who knows JSON lines knows the file."""
    path = tmp_path / "log.jsonl"
    storage.append_lines(path, OLD)
    storage.append_line(path, NEW[0])
    storage.append_lines(path, NEW[1:])
    assert path.read_text().splitlines() == [*OLD, *NEW]
    assert path.stat().st_mode & 0o777 == 0o600
    storage.append_lines(path, [])
    assert path.read_text().splitlines() == [*OLD, *NEW]


def test_a_directory_that_cannot_be_synced_is_not_left_behind(tmp_path: Path) -> None:
    wanted = tmp_path / "a" / "b"
    with disk() as seen:
        storage.make_dir(wanted)
    assert seen.made.count("fsync") == 2
    assert [p.stat().st_mode & 0o777 for p in (wanted, wanted.parent)] == [0o700, 0o700]
    wanted.rmdir()
    wanted.parent.rmdir()
    for n, call in enumerate(seen.made):
        with disk(n), pytest.raises(StorageError):
            storage.make_dir(wanted)
        assert not wanted.exists(), (n, call)
        if wanted.parent.exists():  # it was made, and is durable
            wanted.parent.rmdir()
    storage.make_dir(wanted)
