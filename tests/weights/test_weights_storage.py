"""A file that is written in a stream: the old one or the new one, whatever happens in between."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from secondnature import storage
from secondnature.errors import BadDelta, StorageError


def test_a_stream_takes_the_files_place_at_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with storage.writing(path) as file:
        file.write(b"new head, new tail")
        file.seek(0)
        assert file.read(8) == b"new head"
        assert path.read_text() == "old"
        assert storage.clean(tmp_path) == 0  # somebody is writing it
    assert path.read_text() == "new head, new tail"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [BadDelta("no"), MemoryError(), KeyboardInterrupt(), OSError(28, "full")])
def test_a_stream_that_ends_early_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    seen = StorageError if isinstance(error, OSError) else type(error)

    def stream() -> None:
        with storage.writing(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(seen):
        stream()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_refuses_in_mid_stream_is_a_storage_error(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from pathlib import Path
from secondnature import storage
from secondnature.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    with storage.writing(Path({str(tmp_path / "file")!r})) as file:
        for _ in range(100):
            file.write(bytes(1_000))
except StorageError as e:
    print("refused:", e)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith("refused:")
    assert list(tmp_path.iterdir()) == []


def test_only_our_kind_of_name_is_cleaned(tmp_path: Path) -> None:
    for name in ("a.99999999.tmp", ".a.tmp", ".a.x.tmp", ".a.99999999.tmp2", ".a.99999999999999999999.tmp"):
        (tmp_path / name).write_text("")
    assert storage.clean(tmp_path) == 1  # a number that no process can have
    assert len(list(tmp_path.iterdir())) == 4
