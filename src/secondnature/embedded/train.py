"""Pretraining of the embedded model: resumable to the bit (one thread), fp32 master weights.

The data are a function of the document's number, so a checkpoint is weights, Adam's moments and a few counters; it
is one safetensors file, written beside the old one and renamed: a kill at any moment costs two minutes at most.
Loss weight 1 on the assistant's words and 0.1 on the rest; documents are never packed (the recurrent state would
leak from one to the next), batches hold documents of similar length. On CPUs with bf16 units autocast is 1.7 times
as fast as fp32, on others far slower: a short measurement decides, and the checkpoint remembers it. On a GPU the
same code runs with large batches: the steps of so small a model are bound by their launches.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from secondnature.embedded.delta_rule import one_chunk_training
from secondnature.embedded.generator import WRITTEN_FOR
from secondnature.embedded.tokenizer import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM

Precision = Literal["auto", "bf16", "fp32"]
Batch = list[tuple[list[int], list[bool]]]
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the weights, together with the generator's text."""

    seed: int = 0
    tokens: int = 6_000_000
    """Before the polish."""
    batch_tokens: int = 1024
    """Upper bound of documents x longest document in one step."""
    pool_documents: int = 1024
    """Documents that are sorted by length together."""
    lr: float = 2e-3
    warm_up_tokens: int = 100_000
    weight_decay: float = 0.05
    prompt_weight: float = 0.1
    clip: float = 1.0
    precision: Precision = "auto"
    device: str = "cpu"
    """cpu or cuda."""

    @classmethod
    def for_batches(cls, batch_tokens: int, **others: Any) -> Settings:
        """Settings whose pools and warm-up suit batches of this size; 1,024 gives the defaults."""
        pool_documents, warm_up_tokens = max(1024, batch_tokens), max(100_000, 50 * batch_tokens)
        return cls(
            batch_tokens=batch_tokens, pool_documents=pool_documents, warm_up_tokens=warm_up_tokens, **others
        )


@dataclass(slots=True)
class Progress:
    """Where the run is: everything but the tensors."""

    step: int = 0
    tokens: int = 0
    pool_start: int = 0
    """First document of the pool."""
    pool_tokens: int = 0
    """`tokens` when the pool began (it sets the pool's mix)."""
    next_batch: int = 0
    loss: float = float("nan")
    """Running mean over about 50 steps, assistant's words only."""
    seconds: float = 0.0


POLISH_SHARE = 15
"""After `Settings.tokens` come a fifteenth of them more, for what came out worst (`generator.POLISH_FROM`)."""
POLISH_RATE = 0.15
"""The learning rate with which they begin, as a share of the run's."""


def learning_rate(settings: Settings, tokens: int) -> float:
    """Warm-up, constant, linear to 2 % over the last half; then the polish, linear to 2 % of its own."""
    share = tokens / settings.tokens
    if share >= 1.0:
        decay = POLISH_RATE * max(0.02, 1.0 - POLISH_SHARE * (share - 1.0))
    else:
        decay = 1.0 if share < 0.5 else max(0.02, 2.0 * (1.0 - share))
    return settings.lr * decay * min(1.0, (tokens + 1) / settings.warm_up_tokens)


def pool_batches(tokenizer: PreTrainedTokenizerFast, settings: Settings, progress: Progress) -> list[Batch]:
    """The batches of the current pool, in the order in which they are trained.

    The stages of the text are stretched or shrunk to the run's length.
    """
    text_tokens = progress.pool_tokens * WRITTEN_FOR // settings.tokens
    documents = list(
        encode_texts(tokenizer, settings.seed, progress.pool_start, settings.pool_documents, text_tokens)
    )
    documents.sort(key=lambda d: len(d[0]))
    batches: list[Batch] = []
    for document in documents:
        if batches and (len(batches[-1]) + 1) * len(document[0]) <= settings.batch_tokens:
            batches[-1].append(document)
        else:
            batches.append([document])
    random.Random(f"{settings.seed}:{progress.pool_start}").shuffle(batches)
    return batches


def batch_loss(model: Qwen3_5ForCausalLM, batch: Batch, prompt_weight: float) -> tuple[torch.Tensor, float]:
    """The weighted loss of a right-padded batch, and the plain mean over the assistant's words."""
    length = max(len(ids) for ids, _ in batch)
    ids_BT = torch.zeros(len(batch), length, dtype=torch.long)
    weight_BT = torch.zeros(len(batch), length)
    for row, (ids, spoken) in enumerate(batch):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        weight_BT[row, : len(ids)] = torch.tensor([1.0 if s else prompt_weight for s in spoken])
    ids_BT, weight_BT = ids_BT.to(model.device), weight_BT.to(model.device)
    hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    logits = F.linear(hidden_BTD[:, :-1].flatten(0, 1), model.lm_head.weight)
    losses = F.cross_entropy(logits.float(), ids_BT[:, 1:].flatten(), reduction="none")
    weights = weight_BT[:, 1:].flatten()
    spoken_mask = weights == 1.0
    mean = float(losses.detach()[spoken_mask].mean())
    return (losses * weights).sum() / weights.sum(), mean


def faster_precision(model: Qwen3_5ForCausalLM, batch: Batch) -> Literal["bf16", "fp32"]:
    """Measure three steps each (forward and backward, no update); bf16 must win by a tenth."""
    best = {"fp32": float("inf"), "bf16": float("inf")}
    for _ in range(3):
        for name, fastest in best.items():
            start = time.perf_counter()
            with _autocast(name, model.device.type):
                loss, _ = batch_loss(model, batch, 0.1)
            loss.backward()
            model.zero_grad(set_to_none=True)
            best[name] = min(fastest, time.perf_counter() - start)
    return "bf16" if best["bf16"] < 0.9 * best["fp32"] else "fp32"


def _autocast(precision: str, device: str) -> Any:
    return torch.autocast(device, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


class Pretrainer:
    """The model, its optimizer and its place in the text; `run` goes on until `settings.tokens`."""

    def __init__(
        self, model: Qwen3_5ForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings
    ) -> None:
        self.model: Any = model.to(settings.device)  # pyright: ignore[reportArgumentType]
        self.tokenizer, self.settings = tokenizer, settings
        self.progress = Progress()
        decayed = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(0.9, 0.95),
            fused=True,
        )
        self._batches: list[Batch] = []

    def load(self, work: Path) -> bool:
        """Take up the checkpoint in `work`, if there is one. Raises ValueError if its settings differ."""
        file = work / CHECKPOINT
        if not file.exists():
            return False
        with safe_open(file, framework="pt") as f:
            meta = f.metadata()
            found = Settings(**json.loads(meta["settings"]))
            wanted = self.settings
            if wanted.precision == "auto":
                wanted = replace(wanted, precision=found.precision)
            if found != wanted:
                raise ValueError(
                    f"{file} was made with {found}; expected {wanted}: use another --work or delete it"
                )
            self.settings = wanted
            self.progress = Progress(**json.loads(meta["progress"]))
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(f.get_tensor(f"weights.{name}"))
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(float(self.progress.step), device=parameter.device),
                        "exp_avg": f.get_tensor(f"mean.{name}").to(parameter.device),
                        "exp_avg_sq": f.get_tensor(f"square.{name}").to(parameter.device),
                    }
        return True

    def save(self, work: Path) -> None:
        """Write the checkpoint: a new file, flushed to disk, renamed over the old one."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            tensors[f"weights.{name}"] = parameter.detach()
            tensors[f"mean.{name}"], tensors[f"square.{name}"] = state["exp_avg"], state["exp_avg_sq"]
        meta = {"settings": json.dumps(asdict(self.settings)), "progress": json.dumps(asdict(self.progress))}
        fresh = work / f"{CHECKPOINT}.{os.getpid()}.new"
        save_file(tensors, fresh, metadata=meta)
        with fresh.open("rb") as f:
            os.fsync(f.fileno())
        fresh.replace(work / CHECKPOINT)

    def step(self) -> None:
        """One update on the next batch. Raises FloatingPointError before the update if the loss is not finite."""
        progress, settings = self.progress, self.settings
        if not self._batches:
            self._batches = pool_batches(self.tokenizer, settings, progress)
        batch = self._batches[progress.next_batch]
        if settings.precision == "auto":
            settings = self.settings = replace(settings, precision=faster_precision(self.model, batch))
        start = time.perf_counter()
        with _autocast(settings.precision, self.model.device.type):
            loss, mean = batch_loss(self.model, batch, settings.prompt_weight)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss at step {progress.step} is {loss.item()}; nothing was updated"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, progress.tokens)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += sum(len(ids) for ids, _ in batch)
        progress.seconds += time.perf_counter() - start
        progress.loss = mean if progress.step == 1 else 0.98 * progress.loss + 0.02 * mean
        progress.next_batch += 1
        if progress.next_batch == len(self._batches):
            progress.pool_start += settings.pool_documents
            progress.pool_tokens, progress.next_batch, self._batches = progress.tokens, 0, []

    def run(
        self,
        work: Path,
        on_step: Callable[[Progress], None],
        on_look: Callable[[Progress], None],
        look_tokens: int = 400_000,
        save_s: float = 120.0,
        stop_after_steps: int | None = None,
        stop_at: int | None = None,
    ) -> None:
        """Train to the end of the polish, or to `stop_at` tokens on the same schedule.

        `on_look` is called after every `look_tokens` (the curve, the snapshot).
        """
        saved, steps = time.monotonic(), 0
        end = self.settings.tokens + self.settings.tokens // POLISH_SHARE
        end = min(end, stop_at or end)
        self.model.train()
        with one_chunk_training():
            while self.progress.tokens < end:
                before = self.progress.tokens // look_tokens
                self.step()
                steps += 1
                on_step(self.progress)
                if self.progress.tokens // look_tokens > before:
                    self.model.eval()
                    on_look(self.progress)
                    self.model.train()
                if time.monotonic() - saved > save_s or steps == stop_after_steps:
                    self.save(work)
                    saved = time.monotonic()
                if steps == stop_after_steps:
                    return
        self.save(work)
