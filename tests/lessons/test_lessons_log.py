"""The log: births, reads from other threads, what is read strictly and what is not, and disks that refuse."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from failing_disk import disk
from served_home import Served, serve
from tiny_models import dense_config, save_tiny

from secondnature import storage
from secondnature.errors import NotDurable, StorageError
from secondnature.lessons.log import DELTA_FILE, OPTIMIZER_FILE, Log
from secondnature.lessons.pruning import Pruning
from secondnature.records import Correction, Lesson
from secondnature.weights.updates import UPDATE_FILE, write_update


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(dense_config(num_hidden_layers=1), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def served(model: Path, tmp_path: Path) -> Generator[Served]:
    found = serve(tmp_path / "home", model)
    yield found
    found.home.close()


def correction(word: str) -> Correction:
    return Correction.model_validate({"prompt": f"Use {word}.", "chosen": "Done."})


def again(served: Served) -> Log:
    """The same home, as the next server reads it."""
    return Log(served.home, served.log.base_dir, served.log.base_version)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), MemoryError()])
def test_an_entry_is_there_as_a_whole_or_not_at_all(served: Served, error: BaseException) -> None:
    """The n-th call that changes the disk fails, for every n: nothing is left behind, and the next one is born."""
    served.log.create("train", "first")
    for n in range(60):
        before = {x.name for x in served.home.lessons.iterdir()}
        entries = served.log.all()
        with disk(n, error) as calls:
            try:
                lesson = served.log.create("train", "use", files={"corrections.jsonl": "{}\n"})
            except (StorageError, MemoryError):
                assert served.log.all() == entries
                assert {x.name for x in served.home.lessons.iterdir()} == before
                continue
        assert (served.home.lessons / lesson.id / "corrections.jsonl").read_text() == "{}\n"
        assert lesson.number > max(x.number for x in entries)
        assert len({x.number for x in served.log.all()}) == len(served.log.all())
        if len(calls.made) <= n:
            break
    else:
        pytest.fail("every call was refused")
    assert n > 5
    assert [x.id for x in again(served).all()] == [x.id for x in served.log.all()]


def test_a_number_that_was_seen_is_not_given_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    real = storage.sync_dir

    def refuse(path: Path) -> None:
        if path == served.home.lessons and (path / "0001-use").exists():
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    monkeypatch.setattr(storage, "sync_dir", refuse)
    with pytest.raises(StorageError):
        served.log.create("train", "use")
    monkeypatch.setattr(storage, "sync_dir", real)
    assert served.log.all() == []
    assert served.log.create("train", "use").id == "0002-use"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_a_keep_that_is_seen_but_not_synced_is_kept(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whatever went wrong after the rename: memory and disk say the same, and the sync is owed."""
    trial = served.on_trial()
    real = storage.sync_dir

    def refuse(path: Path) -> None:
        raise error

    monkeypatch.setattr(storage, "sync_dir", refuse)
    with pytest.raises(NotDurable):
        served.log.save(trial.model_copy(update={"state": "kept"}))
    monkeypatch.setattr(storage, "sync_dir", real)
    assert served.log.get(trial.id).state == "kept"
    assert served.log.unsynced == {served.log.directory(trial)}
    assert again(served).get(trial.id).state == "kept"
    served.log.sync()
    assert not served.log.unsynced


def test_an_open_entry_is_undone_at_the_start_also_where_the_disk_refuses_to_note_it(served: Served) -> None:
    trial = served.on_trial()
    waiting = served.log.create("train", "use")
    with disk(0):
        log = again(served)
    assert [log.get(x.id).state for x in (trial, waiting)] == ["undone", "cancelled"]
    assert log.kept_version() == served.log.base_version


def test_folders_of_others_among_the_lessons_stay(served: Served) -> None:
    theirs = served.home.lessons / ".git"
    theirs.mkdir()
    (theirs / "HEAD").write_text("ref")
    again(served)
    assert (theirs / "HEAD").read_text() == "ref"


def test_the_ends_of_reverts_of_reverts_are_known_although_the_disk_refuses(served: Served) -> None:
    """`reverted_by` follows from the entries: what could not be written of it is right in memory at once."""
    kept = served.kept()
    taken = served.log.create_revert(kept)
    real = storage.write_text

    def refuse(path: Path, text: str) -> None:
        if path.parent.name in (kept.id, taken.id):
            raise StorageError(f"{path}: No space left on device", "free some")
        real(path, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "write_text", refuse)
        back = served.log.create_revert(taken)
    found = {x.id: x.reverted_by for x in served.log.all()}
    assert found == {kept.id: None, taken.id: back.id, back.id: None}
    assert {x.id: x.reverted_by for x in again(served).all()} == found


# ------------------------------------------------------------------------------------------ reads


def test_a_torn_line_of_the_metrics_is_passed_over_and_counted(served: Served) -> None:
    kept = served.kept(corrections=[correction("tea")])
    for step in range(3):
        served.log.add_metric(kept, {"kind": "step", "step": step})
    metrics = served.log.directory(kept) / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-7])
    found = served.log.detail(kept.id)
    assert ([m["step"] for m in found.metrics], found.metrics_skipped) == ([0, 1], 1)
    assert len(served.log.earlier()[0]) == 1


def test_a_lesson_whose_corrections_cannot_be_read_is_not_replayed_and_named(served: Served) -> None:
    kept = [served.kept(0.1 * i, corrections=[correction(w)]) for i, w in enumerate(("tea", "oak"), start=1)]
    (served.log.directory(kept[0]) / "corrections.jsonl").write_text('{"prompt": "Us')
    earlier, unreadable = again(served).earlier()
    assert [c.prompt[0].content for c in earlier] == ["Use oak."]
    assert unreadable == [kept[0].id]


def test_other_threads_read_while_entries_are_born_and_change(served: Served) -> None:
    problems: list[BaseException] = []
    ended = threading.Event()

    def read() -> None:
        try:
            while not ended.is_set():
                entries = served.log.all()
                assert [x.number for x in entries] == sorted(x.number for x in entries)
                served.log.head()
                served.log.kept_version()
                served.log.chain()
                served.log.earlier()
                served.log.num_tries(["a"], ["b"])
                served.log.by_idempotency_key("k")
        except (RuntimeError, AssertionError, KeyError) as e:
            problems.append(e)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(40):
        entry = served.log.create("train", "use")
        served.log.save(entry.model_copy(update={"state": "undone"}))
    ended.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(served.log.all()) == 40


def with_state(served: Served, lesson: Lesson, sha256: str | None = None) -> Lesson:
    """The entry with an optimizer's state of its own."""
    (served.log.directory(lesson) / OPTIMIZER_FILE).write_bytes(lesson.id.encode())
    return served.log.save(
        lesson.model_copy(update={"optimizer_after": lesson.id, "optimizer_sha256": sha256})
    )


def test_whoever_asks_for_the_optimizers_version_changes_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a home of before it is hashed once, on the asker's thread; meanwhile the runner writes its table."""
    kept = with_state(served, served.kept())
    real, hashed = hashlib.file_digest, list[str]()

    def slow(file: object, name: str) -> object:
        hashed.append(name)
        served.log.save(served.log.get(kept.id).model_copy(update={"note": "written meanwhile"}))
        return real(file, name)  # pyright: ignore[reportArgumentType, reportCallIssue]

    monkeypatch.setattr(hashlib, "file_digest", slow)
    wanted = "o" + hashlib.sha256(kept.id.encode()).hexdigest()[:16]
    assert [served.log.optimizer_version() for _ in range(3)] == [wanted] * 3
    assert len(hashed) == 1
    assert served.log.get(kept.id).note == "written meanwhile"


def test_the_optimizers_version_is_that_of_the_entry_and_no_file_is_read(served: Served) -> None:
    kept = with_state(served, served.kept(), sha256="f" * 64)
    (served.log.directory(kept) / OPTIMIZER_FILE).unlink()
    assert served.log.optimizer_version() == "o" + "f" * 16


def test_the_list_of_entries_is_without_the_table_of_tensors(served: Served) -> None:
    """Also where an older version wrote it into lesson.json; the detail still has it."""
    kept = served.kept()
    path = served.log.directory(kept) / "lesson.json"
    row = {"name": "w", "intended": 1.0, "relative": 0.1, "written": 1.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moved": [row]}))
    log = again(served)
    assert log.get(kept.id).moved == []
    assert "moved" not in json.loads(path.read_text())
    assert len(log.detail(kept.id).lesson.moved) == 1


# ------------------------------------------------------------------------------------------ what is pruned


def test_reverts_of_reverts_work_where_states_were_pruned(served: Served) -> None:
    """The weights go back to the byte as before; only the optimizer starts afresh, and the entry says so."""
    base = served.clock.version
    kept: list[Lesson] = []
    for i in range(4):
        head = served.log.head()
        lesson = served.kept(0.1 * (i + 1))
        before = {"optimizer_before": head.optimizer_after if head else None}
        kept.append(with_state(served, served.log.save(lesson.model_copy(update=before)), sha256=f"{i}" * 64))
    assert Pruning(served.log).prune(1).files == 2
    assert served.log.optimizer_file() is not None

    def take_back(lesson: Lesson) -> Lesson:
        return served.weights.take_back(lesson, lambda: served.log.create_revert(lesson))

    first = take_back(kept[3])
    assert (first.optimizer_after, served.found) == (kept[2].id, kept[2].version)
    second = take_back(kept[2])  # the state of kept[1] is gone
    assert (second.optimizer_after, served.found) == (None, kept[1].version)
    assert "pruned" in second.reason
    back = take_back(second)
    assert (back.optimizer_after, served.found) == (kept[2].id, kept[2].version)
    for lesson in (back, kept[1], kept[0]):
        take_back(lesson)
    assert served.found == served.clock.version == base
    assert served.log.chain() == []


FILES = (DELTA_FILE, UPDATE_FILE)


def test_an_update_goes_with_its_delta(served: Served) -> None:
    kept = [served.kept(0.1 * (i + 1)) for i in range(3)]
    for lesson in kept:
        write_update(served.log.directory(lesson) / UPDATE_FILE, {"w": torch.ones(3)})
    served.weights.fold()
    assert Pruning(served.log).prune(0).files == 0
    assert Pruning(served.log).prune(0, 1).removed == [f"{x.id}/{f}" for f in FILES for x in kept[:2]]
    assert [served.log.get(x.id).delta_pruned for x in kept] == [True, True, False]
    assert [(served.log.directory(x) / UPDATE_FILE).is_file() for x in kept] == [False, False, True]
    undone = served.on_trial(0.9)
    write_update(served.log.directory(undone) / UPDATE_FILE, {"w": torch.ones(3)})
    served.log.drop_files(undone.model_copy(update={"state": "undone"}))
    assert not (served.log.directory(undone) / UPDATE_FILE).exists()
