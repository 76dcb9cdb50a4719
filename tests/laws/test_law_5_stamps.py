"""Law 5: every answer says which weights gave it, and nothing computed before a write is used after it."""

from __future__ import annotations

from typing import Any

import torch
from tiny_server import Running, teach

from secondnature.engines.stamps import Clock
from secondnature.model.load import build
from secondnature.weights.arena import Arena

PROMPT = [3, 85, 83, 69, 4]


def test_the_clock_names_every_write() -> None:
    arena = Arena.create({"a": torch.zeros(8, dtype=torch.bfloat16)})
    clock = Clock(arena, "wone")
    assert (clock.read().version, clock.read().trial) == ("wone", False)
    clock.begin(7)
    assert (clock.read().version, clock.read().trial) == ("wone", True)
    with arena.writing():
        during = clock.read()
    after = clock.read()
    assert (during.version, during.writing, during.trial) == ("wone+0007.1", True, True)
    assert (after.version, after.writing, after.epoch) == ("wone+0007.1", False, during.epoch)
    clock.settle("wtwo", after.epoch, trial=True)
    assert (clock.read().version, clock.read().trial) == ("wtwo", True)
    clock.become("wone")
    assert (clock.read().version, clock.read().trial) == ("wtwo", True)  # announced is not written
    with arena.writing():
        assert (clock.read().version, clock.read().writing) == ("wone", True)
    undone = clock.read()
    assert (undone.version, undone.writing) == ("wone", False)
    assert undone.epoch > after.epoch  # the same weights again, but never the same epoch
    was = clock.become("wthree")
    with arena.writing():
        pass
    clock.give_up(was)  # it failed in the middle
    assert clock.read().version == "wone+1"


def _answer(server: Running) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 1}
    return server.client.request("POST", "/v1/completions", body=body)


@torch.inference_mode()
def _expected(server: Running, answer: dict[str, Any]) -> float:
    """Log-probability of the answer's first token by a plain forward on what lies in the arena now."""
    copies = {n: t.clone() for n, t in server.parts.arena.tensors.items()}
    model = build(server.parts.runner.trainer._model_dir, copies)  # pyright: ignore[reportPrivateUsage]
    logits = model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0, -1]
    return float(logits.float().log_softmax(-1).max())


def test_identical_requests_around_a_lesson_are_answered_by_their_own_weights(server: Running) -> None:
    answers: list[dict[str, Any]] = []
    lesson = None
    for stage in ("before", "on trial", "undone"):
        if stage == "on trial":
            lesson = server.lesson(teach(max_steps=2))
        if stage == "undone":
            server.client.revert(server.client.lessons().lessons[-1].id)
        answers.append(_answer(server))
        assert answers[-1]["weights_version"] == server.weights, stage
        first = answers[-1]["choices"][0]["logprobs"]["token_logprobs"][0]
        assert abs(first - _expected(server, answers[-1])) < 1e-3, stage
    before, trial, after = answers
    assert [a["trial"] for a in answers] == [False, True, False]
    assert lesson is not None
    assert trial["weights_version"] == lesson.version
    assert before["choices"] == after["choices"] != trial["choices"]
    epochs = [a["weights_span"]["last_epoch"] for a in answers]
    assert epochs == sorted(set(epochs))
