"""Files of different durability have different readers: what may be torn, and what is damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from secondnature import storage
from secondnature.errors import DamagedFile, StorageError

GARBLED = [b'{"a": ', b"\xff\xfe", b"\0" * 20, b"[" * 100_000, b"1" * 5000]


@pytest.mark.parametrize("garbage", GARBLED)
def test_only_the_end_of_a_durable_log_may_be_torn(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'1\n\n{"a": 2}\n' + garbage)
    found = storage.read_durable(path)
    assert found.values == [(1, 1), (3, {"a": 2})]
    assert [(s.number, s.torn) for s in found.skipped] == [(4, True)]
    path.write_bytes(b"1\n" + garbage + b"\n2\n")
    with pytest.raises(DamagedFile, match=r"log\.jsonl, line 2: ") as caught:
        storage.read_durable(path)
    assert caught.value.hint
    path.write_bytes(b"1\n" + garbage + b"\n")  # it has its newline: it was written whole
    with pytest.raises(DamagedFile, match="line 2"):
        storage.read_durable(path)


@pytest.mark.parametrize("garbage", GARBLED)
def test_an_unsynced_file_gives_what_it_has_and_names_the_rest(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(garbage + b"\n1\n" + garbage + b"\n2\n" + garbage)
    found = storage.read_lines(path)
    assert found.values == [(2, 1), (4, 2)]
    assert [(s.number, s.torn) for s in found.skipped] == [(1, False), (3, False), (5, True)]
    assert all(s.reason for s in found.skipped)


def test_no_file_is_no_lines_and_no_permission_is_an_error(tmp_path: Path) -> None:
    assert storage.read_lines(tmp_path / "none.jsonl") == storage.Lines()
    assert storage.read_durable(tmp_path / "none.jsonl") == storage.Lines()
    with pytest.raises(StorageError):
        storage.read_lines(tmp_path)


@pytest.mark.parametrize("size", [3, 65_536, 65_537, 200_000])
def test_a_torn_end_is_cut_off_by_the_next_line(tmp_path: Path, size: int) -> None:
    """It was never acknowledged; closed off instead, it would look like damage for ever."""
    for append in (storage.append_line, lambda p, x: storage.append_lines(p, [x, x])):
        path = tmp_path / "log.jsonl"
        for whole in (b"", b"1\n"):
            path.write_bytes(whole + b'"' + b"x" * size)
            append(path, "2")
            found = storage.read_durable(path)
            assert found.skipped == []
            assert {v for _, v in found.values} - {1} == {2}
            assert (1, 1) in found.values or not whole


def test_a_last_line_whose_newline_an_editor_left_out_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'1\n{"a": 2}')
    assert storage.read_durable(path).values == [(1, 1), (2, {"a": 2})]
    storage.append_line(path, "3")
    assert path.read_bytes() == b'1\n{"a": 2}\n3\n'
    path.write_bytes(b'1\n{"a": 2}')
    storage.append_lines(path, ["3", "4"])
    assert path.read_bytes() == b'1\n{"a": 2}\n3\n4\n'
