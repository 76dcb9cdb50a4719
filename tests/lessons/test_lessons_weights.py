"""The served weights: whole and named rightly, or known to be neither; whatever fails, and whenever one looks."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from served_home import Served, serve
from tiny_models import dense_config, save_tiny

from secondnature import storage
from secondnature.errors import BadCheckpoint, BadDelta, Busy, WeightsError
from secondnature.lessons.weights import RESTORING
from secondnature.weights import checkpoint
from secondnature.weights.content import content_id


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(dense_config(num_hidden_layers=1), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def served(model: Path, tmp_path: Path) -> Generator[Served]:
    found = serve(tmp_path / "home", model)
    yield found
    found.home.close()


def truthful(served: Served, told: list[tuple[str, bool]]) -> Callable[[int, int], None]:
    """Looks between two tensors: a plain name, told while nobody writes, is that of the bytes that are there."""

    def look(_done: int, _total: int) -> None:
        stamp = served.clock.read()
        told.append((stamp.version, stamp.writing))
        if "+" not in stamp.version and not stamp.writing:
            assert stamp.version == served.found

    return look


def test_at_no_moment_is_a_name_told_of_bytes_that_are_not_there(served: Served) -> None:
    """Held at every tensor of a record, an undo, a revert and its check, as hashing and writing would take long."""
    base = served.clock.version
    entry = served.begin()
    served.write()
    told: list[tuple[str, bool]] = []
    entry = served.weights.record(entry, truthful(served, told))
    assert set(told) == {(f"{base}+0001.1", False)}
    assert served.clock.read().trial

    told.clear()
    served.weights.restore(truthful(served, told))  # an undo
    assert set(told) == {(base, True)}
    assert (served.clock.read().version, served.clock.read().trial, served.found) == (base, False, base)
    served.log.save(entry.model_copy(update={"state": "undone"}))

    kept = served.kept(0.25)
    told.clear()
    served.weights.take_back(kept, lambda: served.log.create_revert(kept), truthful(served, told))
    assert set(told) == {(kept.version, False), (base, True)}  # compared first, then written
    assert served.found == served.clock.read().version == base


def test_what_is_announced_is_not_told_before_it_is_written(served: Served) -> None:
    trial = served.on_trial()
    served.clock.become("wnext")
    assert (served.clock.read().version, served.clock.read().trial) == (trial.version, True)


def test_a_restore_that_fails_leaves_them_dirty_and_nothing_begins(served: Served) -> None:
    base = served.clock.version
    served.kept()
    served.weights.fold()
    kept = served.clock.version
    lost = served.home.model_root / "current" / checkpoint.WEIGHTS_FILE
    served.on_trial(0.75)
    lost.rename(lost.with_name("gone"))
    for _ in range(2):
        with pytest.raises(BadCheckpoint):
            served.weights.restore()
        assert "could not be restored" in served.weights.dirty
        assert not served.weights.are_kept
        with pytest.raises(WeightsError, match="expected"):
            served.weights.begin(served.log.create("train", "use"))
    lost.with_name("gone").rename(lost)
    served.weights.restore()
    assert (served.weights.dirty, served.weights.are_kept, served.found) == ("", True, kept)
    assert kept != base


def test_memory_that_runs_out_in_the_middle_of_an_undo_is_said_and_made_good(served: Served) -> None:
    base = served.clock.version
    trial = served.on_trial()

    def full(done: int, _total: int) -> None:
        assert served.weights.dirty == RESTORING
        if done == 2:
            raise MemoryError

    with pytest.raises(MemoryError):
        served.weights.restore(full)
    assert served.weights.dirty == "they could not be restored: MemoryError"
    assert "+" in served.clock.read().version  # neither the trial's nor the base's
    assert served.clock.read().version not in (base, trial.version)
    served.weights.restore()
    assert (served.weights.dirty, served.found, served.clock.read().version) == ("", base, base)


@pytest.mark.parametrize("after_the_rename", [False, True])
def test_a_revert_that_fails_before_or_after_its_entry_is_there(
    served: Served, after_the_rename: bool
) -> None:
    """Before: nothing happened. After: it is taken back, and the weights are known to lag behind the log."""
    base = served.clock.version
    kept = served.kept()

    def commit() -> None:
        if after_the_rename:
            served.log.create_revert(kept)
        raise MemoryError

    with pytest.raises(MemoryError):
        served.weights.take_back(kept, commit)  # pyright: ignore[reportArgumentType]
    assert bool(served.weights.dirty) is after_the_rename
    assert served.weights.are_kept is not after_the_rename
    served.weights.restore()
    assert served.found == served.clock.version == (base if after_the_rename else kept.version)


# ------------------------------------------------------------------------------------------ the working copy


def in_the_copy(served: Served) -> str:
    return content_id(checkpoint.read(served.log.checkpoint_state()[0]))


def test_the_working_copy_is_exact_though_a_lesson_begins_to_write_while_it_is_saved(served: Served) -> None:
    """`POST /v1/checkpoint` in the seconds between the begin of a lesson and its first step."""
    kept = served.kept()
    served.begin()
    served.weights.fold(lambda done, _total: served.write(0.9) if done == 1 else None)
    assert in_the_copy(served) == kept.version
    served.weights.restore()
    assert served.found == kept.version


def test_a_working_copy_that_somebody_wrote_into_never_comes_into_force(served: Served) -> None:
    kept = served.kept()
    served.weights.fold()
    second = served.kept(0.25)
    with pytest.raises(WeightsError, match="while they were saved"):
        served.weights.fold(lambda done, _total: served.write(0.9) if done == 1 else None)
    assert in_the_copy(served) == kept.version
    served.weights.restore()
    assert served.found == second.version


def test_it_is_saved_from_disk_while_a_lesson_writes(served: Served) -> None:
    kept = served.kept()
    served.on_trial(0.75)
    served.weights.fold()
    assert in_the_copy(served) == kept.version
    assert served.log.chain() == []


def test_a_checkpoint_asked_for_in_the_middle_takes_nothing_away(served: Served) -> None:
    """The one before it would go with it: while that is read, the new one has to wait."""
    served.kept()
    served.weights.fold()
    kept = served.kept(0.25)
    entry = served.begin()
    served.write(0.9)
    refused: list[str] = []

    def ask(done: int, _total: int) -> None:
        if done == 1:
            with pytest.raises(Busy, match="nothing was done"):
                served.weights.fold()
            refused.append(in_the_copy(served))

    entry = served.weights.record(entry, ask)
    assert entry.version == served.found
    served.weights.restore(ask)
    assert served.found == kept.version
    served.weights.fold()
    assert len(refused) == 2
    assert in_the_copy(served) == kept.version


# ------------------------------------------------------------------------------------------ commits on a bad disk


def test_a_commit_that_is_seen_but_not_synced_stands(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a revert: its entry counts, nothing of the entry before is deleted, and the sync is done later."""
    base = served.clock.version
    kept = served.kept()
    real = storage.sync_dir

    def refuse(path: Path) -> None:
        if path == served.home.lessons and (path / "0002-revert-0001").exists():  # after the rename
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    monkeypatch.setattr(storage, "sync_dir", refuse)
    entry = served.weights.take_back(kept, lambda: served.log.create_revert(kept))
    assert (entry.state, served.found, served.log.kept_version()) == ("kept", base, base)
    assert served.log.unsynced == {served.home.lessons}
    assert served.delta(kept).exists()
    with pytest.raises(OSError, match="nothing was changed"):
        served.log.sync()
    assert served.log.unsynced
    monkeypatch.setattr(storage, "sync_dir", real)
    served.log.sync()
    assert not served.log.unsynced


# ------------------------------------------------------------------------------------------ at the start


def test_a_damaged_working_copy_is_not_served(served: Served, model: Path) -> None:
    """A bit of it has turned over, and no difference stands on it that would tell."""
    served.kept()
    served.weights.fold()
    path = served.home.model_root / "current" / checkpoint.WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    served.home.close()
    with pytest.raises(BadDelta, match="the disk gives the weights"):
        serve(served.home.path, model)


def test_a_working_copy_keeps_dtypes_that_are_not_bf16(model: Path, tmp_path: Path) -> None:
    """As inside vLLM, whose arena holds some tensors in float32: from memory, and from the disk."""
    dtypes = {"model.norm.weight": torch.float32}
    found = serve(tmp_path / "home", model, dtypes)
    try:
        found.kept()
        found.weights.fold()
        path, version, _ = found.log.checkpoint_state()
        assert version == content_id(checkpoint.stream(path, dtypes)) == found.found
        found.kept(0.25)
        found.begin()
        found.write(0.125)
        found.weights.fold()  # a lesson writes: from the disk
        path, version, _ = found.log.checkpoint_state()
        assert version == content_id(checkpoint.stream(path, dtypes)) == found.log.kept_version()
    finally:
        found.home.close()
