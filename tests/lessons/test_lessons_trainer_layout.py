"""The trainer's process on an arena with vLLM's tensors: it writes there, or says by name why it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import engine_tensors, hybrid_config, read_weights, save_tiny

from secondnature import wire
from secondnature.errors import UnsupportedModel
from secondnature.lessons.trainer import Trainer
from secondnature.model.load import build
from secondnature.records import Example, OptimizerSettings
from secondnature.train.apollo import Apollo
from secondnature.train.step import train_step
from secondnature.weights.arena import Arena

CONTEXT, ANSWER = list(range(2, 22)), [30, 31, 32]
OPTIMIZER = {"lr": 1e-3, "rank": 4}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = hybrid_config(linear_key_head_dim=64, linear_value_head_dim=64)
    return save_tiny(config, tmp_path_factory.mktemp("layout"))


def job(directory: Path, steps: int) -> wire.Train:
    return wire.Train(
        job="j1",
        lesson="l1",
        objective="sft",
        steps=steps,
        batch_size=1,
        seed=5,
        examples=[wire.TokenExample(CONTEXT, ANSWER)],
        replay=[],
        replay_share=0.0,
        replay_weight=1.0,
        learned_loss=0.0,
        optimizer=OPTIMIZER,
        optimizer_in=None,
        optimizer_out=str(directory / "optimizer.safetensors"),
        development=[],
        until_margin=None,
        until_passed=None,
        look_every=1,
        kl={},
    )


def test_a_lesson_is_written_into_vllms_tensors(directory: Path, tmp_path: Path) -> None:
    """To the bit what the same steps write into the Hugging Face model's own tensors."""
    torch.set_num_threads(1)
    weights = read_weights(directory)
    arena = Arena.create(engine_tensors(weights))
    trainer = Trainer(arena, directory, threads=1, log_path=tmp_path / "trainer.log", layout="vllm")
    try:
        trainer.ensure(lambda: None)
        done = trainer.run(job(tmp_path, 2), lambda _: None, lambda: False)
    finally:
        trainer.stop()
    assert done.steps == 2
    assert arena.writes == (2, 2)
    weights = {name: (t.float() if name.endswith("A_log") else t) for name, t in weights.items()}
    model = build(directory, weights)
    optimizer = Apollo(model, OptimizerSettings.model_validate(OPTIMIZER), seed=5)
    example = Example(context_ids=CONTEXT, continuation_ids=ANSWER)
    for _ in range(2):
        train_step(model, optimizer, [example], learned_loss=0.0)
    for name, wanted in engine_tensors(weights).items():
        assert torch.equal(arena.tensors[name], wanted), name


def test_an_arena_of_another_model_is_refused_by_name(directory: Path, tmp_path: Path) -> None:
    tensors = engine_tensors(read_weights(directory))
    name = "model.layers.3.self_attn.qkv_proj.weight"
    tensors[name] = tensors[name][:100].clone()
    log_path = tmp_path / "trainer.log"
    trainer = Trainer(Arena.create(tensors), directory, threads=1, log_path=log_path, layout="vllm")
    try:
        with pytest.raises(UnsupportedModel, match=f"{name} has shape .100, 48.; expected .192, 48."):
            trainer.ensure(lambda: None)
    finally:
        trainer.stop()
