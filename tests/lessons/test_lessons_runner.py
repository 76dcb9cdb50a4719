"""The runner: two words at once, words in the middle of something, and turns in which anything is raised."""

from __future__ import annotations

import contextlib
import errno
import json
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from tiny_server import KEY, LOW_GATE, Running, running, say_probes, teach, use_probes

from secondnature import storage
from secondnature.errors import BadCheckpoint, Busy, Conflict, SecondnatureError, WrongState
from secondnature.lessons import runner as runner_module
from secondnature.lessons.runner import Runner
from secondnature.records import Lesson
from secondnature.weights.content import Named
from secondnature.wire import Client


def until(done: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def settled(server: Running) -> bool:
    """Nothing runs, and all is well."""
    return not server.parts.runner._jobs and server.client.health().status == "ok"


def on_disk(server: Running, lesson: str) -> str:
    return json.loads((server.parts.home.lessons / lesson / "lesson.json").read_text())["state"]


class Word:
    """A request of another client, on a thread of its own."""

    def __init__(self, server: Running, say: Callable[[Client], Any]) -> None:
        self.answer: Any = None
        self.error: SecondnatureError | None = None

        def ask() -> None:
            with Client(server.url, KEY) as client:
                try:
                    self.answer = say(client)
                except SecondnatureError as e:
                    self.error = e

        self.thread = threading.Thread(target=ask)
        self.thread.start()


@contextlib.contextmanager
def held(runner: Runner) -> Generator[Callable[[int], None]]:
    """The runner is in the middle of a command; gives a function that waits until so many wait behind it."""
    inside, release = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        release.wait(60)

    runner._commands.put((hold, Future()))
    assert inside.wait(30)
    try:
        yield lambda count: until(lambda: runner._commands.qsize() >= count, f"{count} commands")
    finally:
        release.set()


def at_once(server: Running, *words: Callable[[Client], Any]) -> list[Word]:
    """They are handed over in this order, and the runner finds them all at one time."""
    said: list[Word] = []
    with held(server.parts.runner) as waiting:
        for i, word in enumerate(words, start=1):
            said.append(Word(server, word))
            waiting(i)
    for word in said:
        word.thread.join(60)
    return said


def test_keep_and_revert_at_once_is_a_kept_lesson_that_was_reverted(server: Running) -> None:
    """What was acknowledged as kept stays an entry of the log, with its difference."""
    before = server.state()
    lesson = server.lesson(teach(max_steps=1))
    keep, revert = at_once(server, lambda c: c.keep(lesson.id), lambda c: c.revert(lesson.id))
    assert (keep.error, keep.answer.state) == (None, "kept")
    assert (revert.error, revert.answer.kind, revert.answer.reverts) == (None, "revert", lesson.id)
    assert on_disk(server, lesson.id) == "kept"
    assert (server.parts.home.lessons / lesson.id / "delta.safetensors").exists()
    assert server.state() == before


def test_other_pairs_of_words_at_once(server: Running) -> None:
    before = server.state()
    lesson = server.lesson(teach(max_steps=1))
    revert, keep = at_once(server, lambda c: c.revert(lesson.id), lambda c: c.keep(lesson.id))
    assert (revert.answer.state, type(keep.error)) == ("undone", WrongState)
    assert (on_disk(server, lesson.id), server.state()) == ("undone", before)

    lesson = server.lesson(teach(max_steps=1))
    first, second = at_once(server, lambda c: c.keep(lesson.id), lambda c: c.keep(lesson.id))
    assert (first.answer.state, type(second.error)) == ("kept", WrongState)
    server.client.revert(lesson.id)

    lesson = server.lesson(teach(max_steps=1))
    first, second = at_once(server, lambda c: c.cancel(lesson.job), lambda c: c.cancel(lesson.job))
    assert [w.answer.state for w in (first, second)] == ["cancelled", "cancelled"]
    assert server.state() == before

    lesson = server.lesson(teach(max_steps=1))
    first, second = at_once(server, lambda c: c.cancel(lesson.job), lambda c: c.keep(lesson.id))
    assert (first.error, second.error) == (None, None)
    assert first.answer.state == second.answer.state == on_disk(server, lesson.id) == "kept"
    server.client.revert(lesson.id)
    assert server.state() == before


@pytest.fixture
def slow_tensors(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[threading.Event, threading.Event]]:
    """(somebody is between two tensors of a record or an undo, go on): commands are served meanwhile."""
    weights = server.parts.runner.weights
    real, inside, go_on = weights._counted, threading.Event(), threading.Event()

    def slow(tensors: Any, on_tensor: Callable[[int, int], None]) -> Iterator[Named]:
        for i, item in enumerate(real(tensors, on_tensor)):
            if i == 2:
                inside.set()
                while not go_on.is_set():
                    on_tensor(i, 9)
                    time.sleep(0.01)
            yield item

    monkeypatch.setattr(weights, "_counted", slow)
    yield inside, go_on
    go_on.set()


def test_words_in_the_middle_of_a_record_and_of_an_undo(
    server: Running, slow_tensors: tuple[threading.Event, threading.Event]
) -> None:
    """Each is answered at once, by what is so; none of them disturbs what is under way."""
    inside, go_on = slow_tensors
    before = server.state()
    reply = server.client.train(teach(max_steps=1))
    job, lesson = reply.job, str(reply.lesson)
    undo: Word | None = None
    for phase in ("writing down the change", "undoing"):
        assert inside.wait(60)
        status = server.client.status(job)
        assert (status.phase, status.progress is not None) == (phase, True)
        assert server.client.health().status == "ok"  # an undo under way is no trouble
        for word in (server.client.keep, server.client.revert):
            with pytest.raises((WrongState, Conflict), match=phase):
                word(lesson)
        with pytest.raises(Busy, match="nothing was done"):
            server.client.checkpoint()
        queued = server.client.train(teach(["hats"], max_steps=1)).job
        assert server.client.cancel(queued).state == "cancelled"
        if phase == "undoing":
            break
        inside.clear()
        go_on.set()
        server.until(job, lambda s: s.phase == "on trial")
        go_on.clear()
        undo = Word(server, lambda c: c.revert(lesson))
    go_on.set()
    assert undo is not None
    undo.thread.join(60)
    assert (undo.error, undo.answer.state) == (None, "undone")
    assert server.state() == before


# ------------------------------------------------------------------------------------------ whatever is raised


@pytest.mark.parametrize(
    "error",
    [RuntimeError("can't allocate memory"), MemoryError(), OSError(errno.EROFS, "Read-only file system"),
     BadCheckpoint("the disk does not answer for a moment", "wait")],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_an_undo_that_fails_is_tried_until_it_is_whole(
    server: Running, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The entry is open on disk and nothing else begins until the weights are those of the log again."""
    runner, before = server.parts.runner, server.state()
    lesson = server.lesson(teach(max_steps=1))
    waiting = server.client.train(teach(["hats"], max_steps=1))
    broken = threading.Event()
    broken.set()
    real = runner.log.durable_weights

    def durable_weights() -> Iterator[Named]:
        if broken.is_set():
            raise error
        return real()

    monkeypatch.setattr(runner.log, "durable_weights", durable_weights)
    with pytest.raises(SecondnatureError):
        server.client.revert(lesson.id)
    until(lambda: server.client.health().status == "degraded", "a trouble that is told")
    assert "could not be restored" in server.client.health().detail
    time.sleep(1.2)  # it is tried, and fails, again
    assert runner._thread.is_alive()
    assert (on_disk(server, lesson.id), server.client.status(lesson.job).state) == ("on_trial", "on_trial")
    assert server.client.status(waiting.job).state == "queued"
    assert server.client.health().weights_version != before[1]
    broken.clear()
    server.until(waiting.job, lambda s: s.phase == "on trial")
    assert on_disk(server, lesson.id) == "undone"
    assert server.client.health().status == "ok"
    second = server.client.lesson(str(waiting.lesson)).lesson
    assert second.parent == before[1]
    server.client.revert(second.id)
    assert server.state() == before


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.EMFILE, "Too many open files"), KeyboardInterrupt()]
)
def test_whatever_a_turn_raises_is_told_and_the_next_turn_begins(
    server: Running, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    runner = server.parts.runner
    real, left = runner.trainer.tend, [2]

    def tend() -> None:
        if left[0]:
            left[0] -= 1
            raise error
        real()

    monkeypatch.setattr(runner.trainer, "tend", tend)
    until(lambda: type(error).__name__ in server.client.health().detail, "a trouble that is told")
    until(lambda: server.client.health().status == "ok", "a turn that goes well")
    assert runner._thread.is_alive()
    server.client.revert(server.lesson(teach(max_steps=1)).id)


def test_a_keep_whose_sync_fails_is_kept_and_synced_later(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the rename everybody sees it: it stands, with its difference, and health says what is missing."""
    runner, before = server.parts.runner, server.state()
    lesson = server.lesson(teach(max_steps=1))
    real = storage.sync_dir

    def refuse(path: Any) -> None:
        if path == runner.log.directory(lesson):
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    monkeypatch.setattr(storage, "sync_dir", refuse)
    assert server.client.keep(lesson.id).state == "kept"
    until(lambda: "the disk" in server.client.health().detail, "a trouble that is told")
    assert (on_disk(server, lesson.id), server.weights) == ("kept", lesson.version)
    waiting = server.client.train(teach(["hats"], max_steps=1))
    time.sleep(0.6)
    assert server.client.status(waiting.job).state == "queued"  # nothing is built on what may not last
    monkeypatch.setattr(storage, "sync_dir", real)
    server.until(waiting.job, lambda s: s.phase == "on trial")
    assert server.client.health().status == "ok"
    server.client.cancel(waiting.job)
    assert server.client.revert(lesson.id).kind == "revert"
    assert server.state() == before


# ------------------------------------------------------------------------------------------ done, or never begun


def test_what_timed_out_is_not_done_later(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "COMMAND_TIMEOUT_S", 0.3)
    lesson = server.lesson(teach(max_steps=1))
    entries = len(server.client.lessons().lessons)
    with held(server.parts.runner):
        with pytest.raises(Busy, match="nothing was done"):
            server.client.keep(lesson.id)
        with pytest.raises(Busy, match="nothing was done"):
            server.client.train(teach(["hats"]))
    server.parts.runner._do(lambda: None)  # it has come to all that was handed over before
    assert server.client.lesson(lesson.id).lesson.state == "on_trial"
    assert len(server.client.lessons().lessons) == entries
    server.client.revert(lesson.id)


def test_a_request_with_a_key_makes_one_lesson_however_often_it_is_sent(server: Running) -> None:
    request = teach(max_steps=1, idempotency_key="only once")
    first, second = at_once(server, lambda c: c.train(request), lambda c: c.train(request))
    assert first.answer.job == second.answer.job
    with pytest.raises(Conflict, match="only once"):
        server.client.train(request.model_copy(update={"seed": 9}))
    assert server.client.train(request.model_copy(update={"dry_run": True})).state == "planned"
    server.client.cancel(first.answer.job)
    again = server.client.train(request)
    assert (again.job, again.state) == (first.answer.job, "cancelled")
    keyed = [x for x in server.client.lessons().lessons if x.idempotency_key == "only once"]
    assert len(keyed) == 1


def test_a_request_with_a_key_makes_one_lesson_across_a_restart(talker: Path, tmp_path: Path) -> None:
    request = teach(max_steps=1, keep=True, idempotency_key="only once")
    with running(tmp_path / "home", talker) as server:
        first = server.lesson(request)
    with running(tmp_path / "home", talker) as server:
        again = server.client.train(request)
        assert (again.lesson, again.state) == (first.id, "kept")
        assert server.client.status(again.job).state == "kept"
        with pytest.raises(Conflict, match="only once"):
            server.client.train(request.model_copy(update={"seed": 9}))
        assert len(server.client.lessons().lessons) == 1


# ------------------------------------------------------------------------------------------ what is kept of a job


def test_a_job_that_ended_leaves_memory_and_losses_come_after_a_step(server: Running) -> None:
    job = server.client.train(teach(max_steps=5)).job
    server.until(job, lambda s: s.phase == "on trial")

    def losses(after: int) -> list[float]:
        path = f"/v1/train/status?job={job}&after={after}"
        return server.client.request("GET", path).get("losses", [])

    whole = losses(0)
    assert len(whole) == 5
    assert losses(3) == whole[3:]
    assert losses(9) == []
    server.client.cancel(job)
    assert server.parts.runner._jobs == {}
    assert server.parts.runner._current is None
    assert server.client.status(job).state == "cancelled"


def test_a_torn_line_in_the_metrics_of_a_kept_lesson_stops_nothing(server: Running) -> None:
    kept = server.lesson(teach(["jam"], keep=True, max_steps=2))
    path = server.parts.home.lessons / kept.id / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    client = server.client
    assert client.lesson(kept.id).metrics_skipped == 1
    assert client.status(kept.job).state == "kept"
    assert kept.job in {x["job"] for x in client.request("GET", "/v1/train/status")["jobs"]}
    assert kept.id in {x.id for x in client.lessons().lessons}
    assert client.train(teach(["hats"], dry_run=True)).state == "planned"
    assert client.cancel(client.train(teach(["hats"], max_steps=1)).job).state == "cancelled"
    client.revert(kept.id)


def test_equal_requests_that_wait_together_pay_for_each_other(server: Running) -> None:
    """Counted when each begins: the second is judged at half the level, though it was queued before any verdict."""
    probes = [
        *use_probes(["mud", "ink", "bell", "clay", "drum", "snow", "iron", "milk"]),
        *say_probes(["maps"]),
    ]
    slow: dict[str, Any] = {"probes": probes, "gate": LOW_GATE, "max_steps": 1, "optimizer": {"lr": 1e-6}}
    found: list[Lesson] = []
    requests = [teach(["wool", "rope"], **slow), teach(["rope", "wool"], **slow, seed=3)]
    jobs = [server.client.train(r) for r in requests]
    for job in jobs:
        server.until(job.job, lambda s: s.phase == "done")
        found.append(server.client.lesson(str(job.lesson)).lesson)
    assert [x.cause.num_retries for x in found] == [0, 1]
    evidence = [server.client.lesson(x.id).evidence for x in found]
    assert [e.alpha for e in evidence if e is not None] == [0.025, 0.0125]
