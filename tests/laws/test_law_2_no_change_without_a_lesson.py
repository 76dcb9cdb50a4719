"""Law 2: no change without a lesson; an undo restores every byte (the many ways to end: tests/serve)."""

from __future__ import annotations

import pytest
from tiny_server import Running, file_hashes, teach

from secondnature.errors import SecondnatureError


def test_the_weights_are_those_of_the_last_kept_entry(server: Running) -> None:
    assert server.weights == server.client.lessons().weights_version == server.client.health().weights_version
    lesson = server.lesson(teach(max_steps=1))
    assert server.weights == lesson.version != lesson.parent
    server.client.revert(lesson.id)
    assert server.weights == lesson.parent
    durable = dict(server.parts.runner.log.durable_weights())
    assert durable.keys() == server.parts.arena.tensors.keys()
    for name, tensor in server.parts.arena.tensors.items():
        assert tensor.equal(durable[name]), name


def test_a_refused_request_writes_nothing(server: Running) -> None:
    before = (server.state(), file_hashes(server.parts.home.path), server.parts.arena.writes)
    refused = [
        ("/v1/train", {"examples": [{"context_ids": [1], "continuation_ids": [999_999]}]}),
        ("/v1/train", {"ledger": True, "lesson": {"behaviour": "nobody-corrected-this"}, "objective": "dpo"}),
        ("/v1/train", {"corrections": []}),
        ("/v1/feedback", {"completion_id": "chatcmpl-unknown", "corrected": "x"}),
        ("/v1/corrections", {"corrections": [{"prompt": "a", "chosen": "b"}, {"prompt": "a"}]}),
        ("/v1/lessons/0099/keep", {}),
        ("/v1/lessons/0099/revert", {}),
    ]
    for path, body in refused:
        with pytest.raises(SecondnatureError):
            server.client.request("POST", path, body=body)
    assert (server.state(), file_hashes(server.parts.home.path), server.parts.arena.writes) == before
