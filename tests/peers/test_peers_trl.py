"""Losses and gradients equal TRL's own on the same logits; runs where TRL is installed (`make test-peers`).

TRL's trainers compute, not a copy of their code: they are given a stand-in model whose body puts out wanted
hidden states and whose head is the identity, so that those are the logits. TRL has no DPOP: there the
reference is the paper's equation, transcribed here in fp64, and TRL's DPO where the two must agree.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, in_arena, save_tiny
from torch import Tensor, nn
from torch.nn import functional as F

from secondnature import embedded
from secondnature.model.chat import read_tokenizer
from secondnature.model.head import target_logps
from secondnature.model.upcast import collect
from secondnature.records import Example
from secondnature.train.losses import DPO_BETA, DPOP_LAMBDA, ORPO_LAMBDA, Reference, dpo, dpop, orpo, sft
from secondnature.train.prefix import continuation_logps, freeze

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl = pytest.importorskip(
        "trl", reason="TRL is not installed here; `make test-peers` makes its environment"
    )

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

VOCAB = 53
BOUND = 1e-5
REFERENCE = [Reference(-30.0, -25.0), Reference(-38.0, -41.0)]


class Logits(nn.Module):
    """A causal model that puts out given logits (rows, tokens, V), whatever it is asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.lm_head = nn.Linear(logits.shape[-1], logits.shape[-1], bias=False)
        self.lm_head.weight = nn.Parameter(torch.eye(logits.shape[-1]), requires_grad=False)
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)
        self.base_model = self._body

    def _body(self, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.logits)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(logits=self.logits)


def with_fused_head(model: Logits) -> Logits:
    """TRL's own head, put on as its trainers do."""
    from trl.trainer.utils import add_fused_lm_head  # pyright: ignore[reportMissingImports]

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


def examples(num_context: int = 5) -> list[Example]:
    """Two pairs; all four answers of different length."""
    source = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(2, VOCAB, (count,), generator=source).tolist()

    return [
        Example(context_ids=ids(num_context), continuation_ids=ids(a), rejected_ids=ids(b))
        for a, b in ((7, 11), (9, 6))
    ]


def logits_for(rows: Sequence[Sequence[int]], seed: int = 0, scale: float = 1.5) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    shape = (len(rows), max(map(len, rows)), VOCAB)
    return (torch.randn(shape, generator=source) * scale).requires_grad_()


def whole_rows(batch: Sequence[Example]) -> list[list[int]]:
    """Chosen answers of all examples, then rejected ones, each after its context: the order of TRL's batch."""
    chosen = [e.context_ids + e.continuation_ids for e in batch]
    return chosen + [e.context_ids + (e.rejected_ids or []) for e in batch]


def our_logps(logits: Tensor, batch: Sequence[Example]) -> list[tuple[Tensor, Tensor]]:
    """Per example the log-probabilities of both answers' tokens."""
    found: list[Tensor] = []
    for row, example, answer in zip(
        logits,
        [*batch, *batch],
        [*(e.continuation_ids for e in batch), *(e.rejected_ids or [] for e in batch)],
        strict=True,
    ):
        first = len(example.context_ids) - 1
        found.append(target_logps(row[first : first + len(answer)], torch.tensor(answer)))
    return list(zip(found[: len(batch)], found[len(batch) :], strict=True))


def compare(theirs: Tensor, ours: Tensor, logits: Tensor) -> None:
    """Two losses and their gradients with respect to the logits."""
    (expected,) = torch.autograd.grad(theirs, logits)
    (found,) = torch.autograd.grad(ours, logits)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=BOUND, abs=BOUND)
    assert float(expected.norm()) > 0
    torch.testing.assert_close(found, expected, rtol=BOUND, atol=BOUND * float(expected.abs().max()))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return save_tiny(CONFIGS["hybrid"](vocab_size=VOCAB), folder)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer_step(tiny: Path, batch: Sequence[Example], objective: str, folder: Path) -> Any:
    from models import stock
    from trl_peer import TrlStep

    return TrlStep(stock(tiny), batch, objective, folder)


def test_sft_is_the_trainers_loss(tiny: Path, tmp_path: Path) -> None:
    batch = [e.model_copy(update={"continuation_ids": e.continuation_ids[:7]}) for e in examples()]
    step = trainer_step(tiny, batch, "sft", tmp_path)
    rows = [e.context_ids + e.continuation_ids for e in batch]
    logits = logits_for(rows)
    theirs = step.trainer.compute_loss(with_fused_head(Logits(logits)), dict(step.inputs))
    order = [rows.index(ids.tolist()) for ids in step.inputs["input_ids"]]  # the loader shuffles
    ours: list[Tensor] = []
    for row, i in zip(logits, order, strict=True):
        first, answer = len(batch[i].context_ids) - 1, batch[i].continuation_ids
        ours.append(sft(target_logps(row[first : first + len(answer)], torch.tensor(answer))))
    compare(theirs, torch.stack(ours).mean(), logits)


def dpo_inputs(batch: Sequence[Example]) -> dict[str, Tensor]:
    """A batch as TRL's collator makes it."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference  # pyright: ignore[reportMissingImports]

    collate = DataCollatorForPreference(pad_token_id=0)
    rows = [
        {
            "prompt_ids": e.context_ids,
            "chosen_ids": e.continuation_ids,
            "rejected_ids": e.rejected_ids,
            "ref_chosen_logps": r.chosen,
            "ref_rejected_logps": r.rejected,
        }
        for e, r in zip(batch, REFERENCE, strict=True)
    ]
    return collate(rows)


def their_dpo(tiny: Path, folder: Path, batch: Sequence[Example], logits: Tensor) -> Tensor:
    trainer = trainer_step(tiny, batch, "dpo", folder).trainer
    assert trainer.beta == DPO_BETA
    return trainer.compute_loss(with_fused_head(Logits(logits)), dpo_inputs(batch))


def test_dpo_is_the_trainers_loss(tiny: Path, tmp_path: Path) -> None:
    batch = examples()
    logits = logits_for(whole_rows(batch))
    theirs = their_dpo(tiny, tmp_path, batch, logits)
    pairs = zip(our_logps(logits, batch), REFERENCE, strict=True)
    compare(theirs, torch.stack([dpo(a, b, r) for (a, b), r in pairs]).mean(), logits)


def test_dpop_without_its_penalty_is_the_trainers_dpo(tiny: Path, tmp_path: Path) -> None:
    batch = examples()
    logits = logits_for(whole_rows(batch))
    theirs = their_dpo(tiny, tmp_path, batch, logits)
    pairs = zip(our_logps(logits, batch), REFERENCE, strict=True)
    compare(theirs, torch.stack([dpop(a, b, r, weight=0.0) for (a, b), r in pairs]).mean(), logits)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_dpop_is_the_papers_equation(scale: float) -> None:
    """L = -log s(beta * (log p/r (chosen) - log p/r (rejected) - lambda * max(0, log r/p (chosen))))."""
    batch = examples()
    logits = logits_for(whole_rows(batch), scale=scale)
    sums = answer_sums(logits, batch)
    chosen, rejected = sums[: len(batch)], sums[len(batch) :]
    theirs = torch.zeros((), dtype=torch.float64)
    for c, r, reference in zip(chosen, rejected, REFERENCE, strict=True):
        penalty = torch.clamp(reference.chosen - c, min=0)
        inside = (c - reference.chosen) - (r - reference.rejected) - DPOP_LAMBDA * penalty
        theirs = theirs - F.logsigmoid(DPO_BETA * inside) / len(batch)
    pairs = zip(our_logps(logits, batch), REFERENCE, strict=True)
    compare(theirs, torch.stack([dpop(a, b, r) for (a, b), r in pairs]).mean(), logits)


def answer_sums(logits: Tensor, batch: Sequence[Example]) -> list[Tensor]:
    """The log-probability of every answer, in the order of the rows of logits, in fp64."""
    found: list[Tensor] = []
    answers = [e.continuation_ids for e in batch] + [e.rejected_ids or [] for e in batch]
    for row, example, answer in zip(logits, [*batch, *batch], answers, strict=True):
        first = len(example.context_ids) - 1
        table = F.log_softmax(row.double(), dim=-1)
        found.append(torch.stack([table[first + i, token] for i, token in enumerate(answer)]).sum())
    return found


def test_orpo_is_the_trainers_loss(tmp_path: Path, tiny: Path) -> None:
    """Its likelihood term reads the prompt too; with a prompt of one token both read the same."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from models import stock
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # pyright: ignore[reportMissingImports]

    texts = {"prompt": ["Hello"], "chosen": [" you"], "rejected": [" me"]}
    trainer: Any = ORPOTrainer(
        model=stock(tiny),
        args=ORPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=64),
        train_dataset=Dataset.from_dict(texts),
        processing_class=read_tokenizer(embedded.path()),
    )
    assert trainer.beta == ORPO_LAMBDA
    batch = examples(num_context=1)[:1]
    logits = logits_for(whole_rows(batch))
    inputs: dict[str, Tensor] = {}
    for name, row in zip(("chosen", "rejected"), whole_rows(batch), strict=True):
        inputs[f"{name}_input_ids"] = torch.tensor([row])
        inputs[f"{name}_attention_mask"] = torch.ones((1, len(row)), dtype=torch.long)
        inputs[f"{name}_labels"] = torch.tensor([[-100, *row[1:]]])
    theirs, _ = trainer.get_batch_loss_metrics(Logits(logits), inputs)
    ((chosen, rejected),) = our_logps(logits, batch)
    compare(theirs, orpo(chosen, rejected), logits)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_whole_gradient_is_the_trainers_where_the_context_is_one_token(
    tiny: Path, tmp_path: Path, objective: str
) -> None:
    """Nothing is frozen then, so the model's whole gradient is the trainer's."""
    (example, _) = examples(num_context=1)
    step = trainer_step(tiny, [example], objective, tmp_path)
    step.gradients()
    expected = {n: p.grad for n, p in step.trainer.model.named_parameters()}
    _, model = in_arena(tiny)
    prefix = freeze(model, example.context_ids)
    assert example.rejected_ids is not None
    with collect(model) as gradients:
        if objective == "sft":
            (chosen,) = continuation_logps(model, prefix, [example.continuation_ids])
            loss = sft(chosen)
        else:
            chosen, rejected = continuation_logps(
                model, prefix, [example.continuation_ids, example.rejected_ids]
            )
            start = Reference(float(chosen.detach().sum()), float(rejected.detach().sum()))
            loss = dpo(chosen, rejected, start)
            assert float(loss) == pytest.approx(math.log(2), abs=1e-6)
        loss.backward()
    assert gradients.keys() == expected.keys()
    size = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    difference = math.sqrt(sum(float((gradients[n] - g).square().sum()) for n, g in expected.items()))
    assert difference <= 1e-5 * size
