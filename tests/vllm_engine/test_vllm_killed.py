"""Servers that are killed, and what the next one on their home serves: the last kept lesson, to the bit.

One home goes through all of it, in order: kept lesson; kill -9 of everything; started again from deltas; a second
server is refused; checkpoint; kill -9 of the API server alone; of the engine alone; and a server on the checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from vllm_server import DIRECTION, Server, command_line, listening, until

PROMPT = list(range(20, 320))
"""Token ids, more than a block of the prefix cache."""


def gone(server: Server) -> None:
    """Every process of this server ends by itself, and cleans up."""
    until(lambda: not server.left(), f"the end of {server.left()}", 60)
    assert server.sockets() == []


def state(server: Server) -> tuple[str, str, list[dict[str, float]]]:
    return server.weights(), server.client.lessons().weights_version, server.scores(PROMPT)


def check_second_server(server: Server) -> None:
    """Another one on the same home says who has it, and ends before it loads anything."""
    second = Server(server.home)
    try:
        assert second.process.wait(180) == 1
        said = second.output()
    finally:
        second.__exit__()
    line = said.strip().splitlines()[-1]
    assert line.startswith("secondnature: HomeInUse: ")
    assert f"process {server.process.pid}, {server.url}" in line
    assert "--home" in line
    assert "Traceback" not in said
    assert "Loading" not in said


@pytest.mark.timeout(900)
def test_a_killed_server_starts_again_with_the_kept_lesson(tmp_path: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    with Server(home) as server:
        server.ready()
        assert server.status("/v1/models", key=None) == 200  # vLLM has no key here: it is open
        base = state(server)
        kept_id = server.lesson(listening(keep=True)).lesson
        kept = state(server)
        assert all(a != b for a, b in zip(base, kept, strict=True))
        trial = server.client.train(listening(2, seed=9))
        server.until(trial.job, lambda s: s.phase == "on trial")
        assert server.weights() != kept[0]
        for pid in server.processes().values():  # kill -9 of everything at once
            if "secondnature.train.worker" not in command_line(pid):
                os.kill(pid, signal.SIGKILL)
        server.process.wait()
        gone(server)

    with Server(home) as server:  # from the base and a delta
        log = {x.id: x.state for x in server.client.lessons().lessons}
        assert log == {kept_id: "kept", str(trial.lesson): "undone"}
        assert state(server) == kept
        assert server.say(DIRECTION).startswith("Yes")
        check_second_server(server)
        checkpoint = server.client.checkpoint()
        assert checkpoint.weights_version == kept[1]
        os.kill(server.process.pid, signal.SIGKILL)  # the API server alone
        server.process.wait()
        gone(server)

    of_its_own = Server(other, model=Path(checkpoint.path))  # starts beside the next one
    try:
        with Server(home) as server:  # from the checkpoint
            assert state(server) == kept
            os.kill(server.processes()["core"], signal.SIGKILL)  # the engine alone
            assert server.process.wait(60) is not None
            gone(server)
    except BaseException:
        of_its_own.__exit__()
        raise
    with of_its_own as server:
        server.ready()
        assert state(server) == kept
        job = server.client.train(listening(2000, learned_loss=0.0))
        server.until(job.job, lambda s: s.phase == "training" and s.step >= 2)
        assert server.end(signal.SIGTERM) == 0  # asked to end in mid-lesson
        gone(server)
    lesson = json.loads((other / "lessons" / str(job.lesson) / "lesson.json").read_text())
    assert lesson["state"] in ("undone", "cancelled")
    assert not (other / "server.json").exists()
