"""What crashes leave behind goes at the next start; what belongs to somebody else stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from secondnature.lessons import leftovers
from secondnature.lessons.home import Home
from secondnature.lessons.leftovers import clean_private_directories, rotate
from secondnature.lessons.trainer import _private_directory


@pytest.fixture
def living() -> Generator[int]:
    """The process id of another process that lives."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process.pid
    process.kill()
    process.wait()


@pytest.fixture
def dead() -> int:
    """The process id of one that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def open_home(path: Path) -> None:
    Home(path).close()


def test_a_dead_writers_files_go_at_the_next_start(tmp_path: Path, dead: int, living: int) -> None:
    home = tmp_path / "home"
    open_home(home)
    lesson = home / "lessons" / "0001-use"
    lesson.mkdir()
    half = home / "model" / f".wabc.{dead}.tmp"
    half.mkdir()
    (half / "model.safetensors").write_text("half")
    link = home / "model" / f".current.{dead}.tmp"
    link.symlink_to("wabc")
    gone = [
        home / f".home.json.{dead}.tmp",
        home / f".key.{os.getpid()}.tmp",
        lesson / f".lesson.json.{dead}.tmp",
        lesson / f".delta.safetensors.{dead}.tmp",
    ]
    stays = [
        home / f".ledger.jsonl.{living}.tmp",
        lesson / f".optimizer.safetensors.{living}.tmp",
        lesson / "notes.tmp",
        lesson / ".hidden",
        lesson / f"report.{dead}.tmp",
        lesson / ".x.tmp",
    ]
    for path in (*gone, *stays):
        path.write_text("x")
    os.utime(gone[1], (0, 0))  # older than this process: of one that had its number
    open_home(home)
    assert [p for p in (*gone, half) if p.exists()] == []
    assert not link.is_symlink()
    assert [p for p in stays if not p.exists()] == []


def test_a_kill_while_a_file_is_written_leaves_nothing_for_long(tmp_path: Path) -> None:
    """A real one: killed in the middle of `write_bytes`."""
    home = tmp_path / "home"
    open_home(home)
    code = f"""
import os, signal
from pathlib import Path
from secondnature import storage
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
storage.write_text(Path({str(home)!r}) / "home.json", "half")
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(list(home.glob(".home.json.*.tmp"))) == 1
    open_home(home)
    assert list(home.glob(".*.tmp")) == []


def test_the_announcement_of_a_dead_server_goes(tmp_path: Path, living: int) -> None:
    """Also where its number is another process's by now."""
    home = tmp_path / "home"
    open_home(home)
    (home / "server.json").write_text(f'{{"pid": {living}, "url": "http://127.0.0.1:1"}}')
    opened = Home(home)
    assert not (home / "server.json").exists()
    opened.close()


def test_nothing_is_cleaned_in_a_home_that_another_server_holds(tmp_path: Path, dead: int) -> None:
    home = tmp_path / "home"
    first = Home(home)
    first.announce("http://127.0.0.1:1")
    (home / f".home.json.{dead}.tmp").write_text("x")
    with pytest.raises(Exception, match="in use by another server"):
        Home(home)
    assert (home / "server.json").exists()
    assert (home / f".home.json.{dead}.tmp").exists()
    first.close()


def test_a_log_is_bounded(tmp_path: Path) -> None:
    log, before = tmp_path / "trainer.log", tmp_path / "trainer.log.1"
    rotate(log, max_bytes=10)  # none yet
    log.write_text("0123456789")
    rotate(log, max_bytes=10)
    assert not before.exists()
    log.write_text("a" * 11)
    rotate(log, max_bytes=10)
    assert (log.exists(), before.read_text()) == (False, "a" * 11)
    log.write_text("b" * 11)
    rotate(log, max_bytes=10)
    assert before.read_text() == "b" * 11
    home = tmp_path / "home"
    open_home(home)
    with (home / "trainer.log").open("wb") as file:
        file.truncate(leftovers.MAX_LOG_BYTES + 1)
    open_home(home)
    assert sorted(p.name for p in home.glob("*.log*")) == ["trainer.log.1"]


def test_a_dead_servers_sockets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, living: int, dead: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = _private_directory()
    assert mine.stat().st_mode & 0o777 == 0o700
    made = {name: tmp_path / f"secondnature-{name}" for name in ("dead", "living", "unmarked", "odd")}
    for path in made.values():
        path.mkdir()
        (path / "trainer.sock").touch()
    (made["dead"] / "pid").write_text(f"{dead}\n")
    (made["living"] / "pid").write_text(f"{living}\n")
    (made["odd"] / "pid").write_text("-1\n")
    (tmp_path / "secondnature-file").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "pid").write_text(f"{dead}\n")
    (tmp_path / "secondnature-link").symlink_to(elsewhere)
    assert clean_private_directories() >= 1
    assert not made["dead"].exists()
    assert all(p.exists() for p in (mine, made["living"], made["unmarked"], made["odd"], elsewhere / "pid"))
    shutil.rmtree(mine)


def test_a_start_removes_a_killed_servers_sockets(tmp_path: Path) -> None:
    code = """
import os, signal
from secondnature.lessons.trainer import _private_directory
print(_private_directory(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    left = Path(
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
            timeout=60,
        ).stdout.strip()
    )
    assert left.is_dir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path))
        open_home(tmp_path / "home")
    assert not left.exists()
