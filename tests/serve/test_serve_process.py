"""A server of its own process, as users have it: a full disk, SIGTERM, kill -9, one server per home."""

from __future__ import annotations

import http.client
import resource
import signal
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tiny_server import Process, file_hashes, process, teach, wait_for

from secondnature import wire
from secondnature.errors import StorageError
from secondnature.wire import Client, FeedbackRequest


def limit_files(pids: list[int], num_bytes: int) -> None:
    """From now on these processes cannot make a file longer than this: EFBIG, which they must take like ENOSPC."""
    for pid in pids:
        if not Path(f"/proc/{pid}").exists():
            continue
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, hard))


def chat(client: Client, text: str) -> dict[str, Any]:
    return client.chat([{"role": "user", "content": text}], temperature=0, max_tokens=12)


def check_full_disk(server: Process, client: Client) -> None:
    """Feedback answers 507 and nothing half-written stays; a lesson fails cleanly; with space all goes on."""
    version = client.lessons().weights_version
    said = str(chat(client, "Use tea.")["id"])
    client.feedback(FeedbackRequest(completion_id=said, corrected="Done."))
    before, ledger = file_hashes(server.home), client.corrections()
    pids = [server.process.pid, *server.children()]
    limit_files(pids, 100)
    with pytest.raises(StorageError, match="nothing was changed"):
        client.feedback(FeedbackRequest(completion_id=said, corrected="Tea it is."))
    with pytest.raises(StorageError):
        client.train(teach())
    with pytest.raises(StorageError):
        client.checkpoint()
    assert chat(client, "Say tea.")["weights_version"] == version  # answering goes on
    assert client.corrections() == ledger
    assert client.lessons().lessons == []
    assert file_hashes(server.home) == before

    limit_files(pids, 60_000)  # room for the small files, not for the optimizer's state or the delta
    job = client.train(teach()).job
    status = wait_for(client, job, lambda s: s.state == "failed" and s.phase == "done")
    assert status.error is not None
    assert status.error.type == "StorageError"
    assert client.lessons().weights_version == version

    limit_files(pids, resource.RLIM_INFINITY)
    job = client.train(teach(max_steps=5000)).job
    wait_for(client, job, lambda s: s.phase == "training" and s.step >= 2)
    limit_files(pids[:1], 100)  # full while the trainer writes: the server cannot note the next metric
    status = wait_for(client, job, lambda s: s.state == "failed" and s.phase == "done")
    assert client.lessons().weights_version == version
    time.sleep(1)
    assert chat(client, "Say tea.")["weights_span"]["changed"] is False  # nobody writes any more
    assert chat(client, "Say tea.")["weights_version"] == version
    while client.health().trainer != "ready":  # the new trainer has inherited the limit
        time.sleep(0.05)
    limit_files([server.process.pid, *server.children()], resource.RLIM_INFINITY)
    client.feedback(FeedbackRequest(completion_id=said, corrected="Tea it is."))
    assert [c.chosen[0].content for c in client.corrections() if c.chosen] == ["Tea it is."]  # it amends


def check_second_server(server: Process, model: Path) -> None:
    """Two servers on one home: the second says who has it, and ends."""
    with process(server.home, model) as second:
        status, errors = second.process.wait(240), second.end()[1]
    assert status == 1
    assert "HomeInUse" in errors
    assert str(server.process.pid) in errors
    assert "--home" in errors
    assert "Traceback" not in errors


def check_idle_connection(client: wire.Client) -> None:
    """It is still open after the time for which clients keep one."""
    address = urlsplit(client.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    for pause_s in (5.5, 0):
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        time.sleep(pause_s)
    connection.close()


@pytest.mark.timeout(900)
def test_a_server_that_is_killed_or_stopped_starts_with_the_kept_weights(
    talker: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    with process(home, talker) as server, server.connect() as client:
        base = client.lessons().weights_version
        check_full_disk(server, client)
        check_second_server(server, talker)
        check_idle_connection(client)
        kept = client.train(teach(["jam"], keep=True, max_steps=1)).job
        wait_for(client, kept, lambda s: s.state == "kept")
        before = client.lessons()
        answer = chat(client, "Use tea.")["choices"]
        assert before.weights_version != base
        trial = client.train(teach())
        wait_for(client, trial.job, lambda s: s.phase == "on trial")
        assert client.lessons().weights_version != before.weights_version
        trainer = server.children()
        assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
    with process(home, talker) as server, server.connect() as client:
        after = client.lessons()
        assert (after.weights_version, after.optimizer_version) == (
            before.weights_version,
            before.optimizer_version,
        )
        assert chat(client, "Use tea.")["choices"] == answer
        lesson = client.lesson(str(trial.lesson)).lesson
        assert (lesson.state, lesson.reason) == ("undone", "the server ended while it was on trial")
        assert not any(Path(f"/proc/{pid}").exists() for pid in trainer)  # it ended with its parent
        running = client.train(wire.TrainRequest.model_validate(teach(max_steps=5000)))
        wait_for(client, running.job, lambda s: s.phase == "training" and s.step >= 2)
        waiting = client.train(teach())
        began = time.monotonic()
        status, errors = server.end(signal.SIGTERM)
        assert status == 0, errors
        assert "Traceback" not in errors
        assert time.monotonic() - began < 60
    with process(home, talker) as server, server.connect() as client:
        after = client.lessons()
        assert (after.weights_version, after.optimizer_version) == (
            before.weights_version,
            before.optimizer_version,
        )
        states = {x.id: x.state for x in after.lessons}
        assert states[str(running.lesson)] in ("undone", "cancelled")
        assert states[str(waiting.lesson)] == "cancelled"
        assert len(client.corrections()) == 1
