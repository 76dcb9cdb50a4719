"""Lessons in a dense model, in float32 and in bfloat16, and in a model that vLLM has compiled."""

from __future__ import annotations

from collections.abc import Generator
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


class Compiled:
    """Servers that vLLM compiles a model for: under one name, so that the second one finds the first one's work."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = path / "model"

    def start(self, name: str, model: Path) -> Server:
        self.model.unlink(missing_ok=True)
        self.model.symlink_to(model)
        return Server(
            self.path / name, model=self.model, eager=False, VLLM_CACHE_ROOT=str(self.path / "cache")
        )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return Compiled(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module", autouse=True)
def compiling(compiled: Compiled) -> Generator[Server]:
    """The first of them, which starts while the dense models are tested: it takes a minute."""
    server = compiled.start("home", EMBEDDED)
    yield server
    server.__exit__()


@pytest.fixture(scope="module")
def dense_servers(tmp_path_factory: pytest.TempPathFactory) -> Generator[dict[str, Server]]:
    path = tmp_path_factory.mktemp("dense")
    model = save_tiny(dense_config(vocab_size=320, head_dim=32, max_position_embeddings=2048), path / "m")
    save_tokenizer(model)
    found = {dtype: Server(path / dtype, "--dtype", dtype, model=model) for dtype in ("float32", "bfloat16")}
    yield found
    for server in found.values():
        server.__exit__()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dense_model_learns_and_is_restored(dense_servers: dict[str, Server], dtype: str) -> None:
    server = dense_servers[dtype].wait().ready()
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


@pytest.mark.timeout(600)
def test_a_compiled_model_learns_and_is_restored(compiled: Compiled, compiling: Server) -> None:
    """Compiled code computes with the arena, too: a model loaded from the lesson's checkpoint says the same."""
    with compiling as server:
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
    with compiled.start("again", Path(checkpoint.path)) as server:
        assert (state(server), server.say(DIRECTION)) == after
