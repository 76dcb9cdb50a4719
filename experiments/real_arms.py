"""How each arm of the experiment on a real model is taught: the server's lesson, and what people do instead.

`lesson` is the server's own plan, own answers, trainer and looks, in one process, so that everything can be
measured at every look. The others are TRL's trainers (SFT and DPO, with peft for LoRA) on the same six corrections,
fp32, no gate; each leaves its weights in fp32, as it trained them.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from secondnature import wire
from secondnature.engines.local.engine import Engine
from secondnature.lessons.own_answers import OwnAnswers
from secondnature.lessons.planner import Planner
from secondnature.lessons.prober import Prober
from secondnature.model.chat import read_tokenizer
from secondnature.model.load import build, context_limit, read_config
from secondnature.train.apollo import highest_rank
from secondnature.train.run import TrainingRun
from secondnature.weights import checkpoint
from secondnature.weights.arena import Arena

__all__ = ["PEERS", "lesson", "peer"]

Row = dict[str, Any]
Look = Callable[[int, Mapping[str, Tensor]], object]
"""Given a step and the weights after it (bf16); nothing is written until it returns."""
PEERS: dict[str, Row] = {
    "sft": {"learning_rate": 1e-5},
    "lora": {"learning_rate": 2e-4, "rank": 8},
    "dpo": {"learning_rate": 1e-5},
}
"""What differs from TRL's defaults, beside the batch, the steps and the precision."""


def lesson(directory: Path, body: Row, look: Look, *, threads: int = 1) -> tuple[wire.Done, list[Row]]:
    """Teach as the server does, `look` being asked where the engine would be; how it ended, and the metrics."""
    torch.set_num_threads(threads)
    arena = Arena.create(checkpoint.read(directory))
    model, tokenizer = build(directory, arena.tensors), read_tokenizer(directory)
    limit = context_limit(directory)
    planner = Planner(
        tokenizer,
        vocab_size=read_config(directory).get_text_config(decoder=True).vocab_size,
        context_limit=limit,
        highest_rank=highest_rank(model),
        default_lr=None,
    )
    plan = planner.plan(wire.TrainRequest.model_validate(body), [], [])
    with Engine(model, tokenizer, threads=threads) as engine:
        prober = Prober(engine, tokenizer, context_limit=limit)
        own = OwnAnswers(prober, tokenizer, context_limit=limit).own(
            plan.own,
            _nothing,
            temperature=plan.own_temperature,
            seed=plan.seed,
            by_distribution=plan.hold_own,
        )
    metrics: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        job = wire.Train(
            job="experiment",
            lesson="experiment",
            objective=plan.objective,
            steps=plan.steps,
            batch_size=plan.batch_size,
            seed=plan.seed,
            examples=list(plan.examples),
            replay=[*plan.replay, *own],
            replay_share=plan.replay_share,
            replay_weight=plan.replay_weight,
            learned_loss=plan.learned_loss,
            optimizer=plan.optimizer.model_dump(mode="json"),
            optimizer_in=None,
            optimizer_out=str(Path(folder) / "optimizer.safetensors"),
            development=plan.development,
            until_margin=plan.until_margin,
            until_passed=plan.until_passed,
            look_every=plan.look_every,
            kl={},
        )
        done = TrainingRun(model, arena, job).run(
            metrics.append, lambda: None, lambda step: _looked(look, step, arena, len(plan.development))
        )
    return done, metrics


def peer(name: str, directory: Path, corrections: list[Row], *, steps: int, seed: int) -> dict[str, Tensor]:
    """Teach with a trainer of TRL; all weights in fp32, by the transformers model's names."""
    import datasets  # pyright: ignore[reportMissingImports]
    import trl  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    datasets.disable_progress_bars()
    settings = dict(PEERS[name])
    rank = settings.pop("rank", None)
    keys = ("prompt", "chosen", "rejected") if name == "dpo" else ("prompt", "completion")
    rows = [
        {key: _turn(key, row["chosen"] if key == "completion" else row[key]) for key in keys}
        for row in corrections
    ]
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind, trainer = (trl.DPOConfig, trl.DPOTrainer) if name == "dpo" else (trl.SFTConfig, trl.SFTTrainer)
        config: Any = kind(
            output_dir=folder,
            per_device_train_batch_size=len(rows),
            max_steps=steps,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            seed=seed,
            **settings,
        )
        more: Row = {}
        if rank is not None:
            from peft import LoraConfig  # pyright: ignore[reportMissingImports]

            more["peft_config"] = LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
            )
        running: Any = trainer(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=read_tokenizer(directory),
            **more,
        )
        running.train()
    taught: Any = running.model.merge_and_unload() if rank is not None else running.model
    return {name: p.detach() for name, p in taught.named_parameters()}


def _looked(look: Look, step: int, arena: Arena, count: int) -> list[bool]:
    """A look that stops nothing."""
    look(step, arena.tensors)
    return [False] * count


def _turn(key: str, text: str) -> list[dict[str, str]]:
    return [{"role": "user" if key == "prompt" else "assistant", "content": text}]


def _nothing(done: int, total: int) -> None:
    """Nobody waits for a word."""
