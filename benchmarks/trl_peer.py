"""TRL's trainers, so that one step of theirs can be measured: nothing is logged, saved or loaded from a hub.

The peer gets its best case: examples are token ids already, the batch is made before the clock starts, reference
log-probabilities of DPO too; gradient clipping and the loop around the step are left out. `gradients` is the
trainer's own `training_step`: forward, loss with its metrics, backward.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from torch import nn

from secondnature import embedded
from secondnature.model.chat import read_tokenizer
from secondnature.records import Example

HAS_TRL = importlib.util.find_spec("trl") is not None


class TrlStep:
    """One trainer of TRL with one batch.

    Args:
        model: as transformers loads it; the trainer puts its own head on it.
        batch: examples; pairs are rows of chosen and rejected answers for "dpo".
        objective: "sft" or "dpo".
        defaults: with TRL's own defaults, bf16 autocast and gradient checkpointing; else fp32 and neither.
        folder: for files that the trainer wants to keep.
    """

    def __init__(
        self, model: Any, batch: Sequence[Example], objective: str, folder: Path, *, defaults: bool = False
    ) -> None:
        import datasets  # pyright: ignore[reportMissingImports]
        import trl  # pyright: ignore[reportMissingImports]

        datasets.disable_progress_bars()
        common: dict[str, Any] = {
            "output_dir": str(folder),
            "per_device_train_batch_size": len(batch),
            "max_steps": 1,
            "max_length": None,
            "use_cpu": True,
            "bf16": defaults,
            "gradient_checkpointing": defaults,
            "report_to": "none",
            "logging_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        tokenizer = read_tokenizer(embedded.path())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if objective == "sft":
                rows = {
                    "input_ids": [e.context_ids + e.continuation_ids for e in batch],
                    "completion_mask": [
                        [0] * len(e.context_ids) + [1] * len(e.continuation_ids) for e in batch
                    ],
                }
                settings = trl.SFTConfig(completion_only_loss=True, **common)
                kind: Any = trl.SFTTrainer
            else:
                rows = {
                    "prompt_ids": [e.context_ids for e in batch],
                    "chosen_ids": [e.continuation_ids for e in batch],
                    "rejected_ids": [e.rejected_ids for e in batch],
                }
                settings = trl.DPOConfig(precompute_ref_log_probs=True, **common)

                class Tokenised(trl.DPOTrainer):
                    """It reads texts only; ours are token ids."""

                    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
                        return dataset

                kind = Tokenised
            self.trainer = kind(
                model=model,
                args=settings,
                train_dataset=datasets.Dataset.from_dict(rows),
                processing_class=tokenizer,
            )
            self.inputs = next(iter(self.trainer.get_train_dataloader()))
        self.trainer.current_gradient_accumulation_steps = 1
        if defaults:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.gradient_checkpointing_enable()
        self.model: nn.Module = self.trainer.accelerator.prepare_model(model)  # autocast, as `train` does

    def gradients(self) -> torch.Tensor:
        """The trainer's step without the optimizer's: fills the parameters' `grad`; returns the loss."""
        return self.trainer.training_step(self.model, dict(self.inputs))
