"""Lessons in a dense model, in float32 and in bfloat16, and in a model that vLLM has compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import dense_config, save_tiny
from tiny_server import save_tokenizer
from vllm_server import DIRECTION, EMBEDDED, Server, listening

from secondnature.wire import TrainRequest

PROMPT = [10 + i % 300 for i in range(400)]
"""Token ids, more than a block of the prefix cache."""


def state(server: Server) -> tuple[str, str, list[dict[str, float]]]:
    return server.weights(), server.client.lessons().weights_version, server.scores(PROMPT)


def raw_lesson(**fields: Any) -> TrainRequest:
    """One example in token ids."""
    example = {"context_ids": PROMPT, "continuation_ids": [30, 31, 32, 33]}
    given = {"examples": [example], "max_steps": 4, "batch_size": 1, "optimizer": {"lr": 3e-3, "rank": 4}}
    return TrainRequest.model_validate({**given, **fields})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dense_model_learns_and_is_restored(tmp_path: Path, dtype: str) -> None:
    model = save_tiny(dense_config(vocab_size=320, head_dim=32, max_position_embeddings=2048), tmp_path / "m")
    save_tokenizer(model)
    with Server(tmp_path / "home", "--dtype", dtype, model=model) as server:
        server.ready()
        wiring = server.client.wiring()
        assert (wiring.problems, wiring.aliased, wiring.cache) == ([], wiring.tensors, "salted")
        before = state(server)
        trial = server.lesson(raw_lesson())
        assert (trial.state, trial.steps) == ("on_trial", 4)
        after = state(server)
        assert all(a != b for a, b in zip(before, after, strict=True))
        assert server.ask("Say tea.", max_tokens=2)["trial"] is True
        server.client.revert(trial.lesson)
        assert state(server) == before

        kept = server.lesson(raw_lesson(keep=True))
        assert (kept.state, state(server)) == ("kept", after)
        assert server.client.checkpoint().weights_version == after[1]
        server.client.revert(kept.lesson)  # from the checkpoint, which has this dtype too
        assert state(server) == before


@pytest.mark.timeout(900)
def test_a_compiled_model_learns_and_is_restored(tmp_path: Path) -> None:
    """Compiled code computes with the arena, too: a model loaded from the lesson's checkpoint says the same."""
    model = tmp_path / "model"  # under one name, so that the second server finds what the first one compiled
    model.symlink_to(EMBEDDED)
    options: dict[str, Any] = {"eager": False, "model": model, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    with Server(tmp_path / "home", **options) as server:
        server.ready()
        assert "Warming up model for the compilation" in server.output()
        assert server.client.wiring().problems == []
        before = (state(server), server.say(DIRECTION))
        kept = server.lesson(listening(keep=True))
        after = (state(server), server.say(DIRECTION))
        assert (before[1][:3] == "Yes", after[1][:3] == "Yes") == (False, True)
        checkpoint = server.client.checkpoint()
        server.client.revert(kept.lesson)
        assert (state(server), server.say(DIRECTION)) == before
    model.unlink()
    model.symlink_to(checkpoint.path)
    with Server(tmp_path / "again", **options) as server:
        assert (state(server), server.say(DIRECTION)) == after
