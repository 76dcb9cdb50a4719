"""Training: resumed is the same to the bit, the fast delta rule is the delta rule, the loss falls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

from secondnature.embedded.delta_rule import delta_rule_one_chunk, one_chunk_training
from secondnature.embedded.generator import WRITTEN_FOR
from secondnature.embedded.shape import fresh_model, text_config
from secondnature.embedded.tokenizer import END, encode_document, train_tokenizer
from secondnature.embedded.train import (
    CHECKPOINT,
    Batch,
    Pretrainer,
    Progress,
    Settings,
    learning_rate,
    pool_batches,
)

SETTINGS = Settings(
    seed=1, tokens=6_000, batch_tokens=256, pool_documents=24, warm_up_tokens=500, precision="fp32"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    torch.set_num_threads(1)
    return train_tokenizer(1, num_documents=400)


def new_trainer(tokenizer: PreTrainedTokenizerFast, settings: Settings = SETTINGS) -> Pretrainer:
    config = text_config(
        len(tokenizer),
        0,
        4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=1,
        head_dim=32,
        linear_num_key_heads=1,
        linear_num_value_heads=1,
        layer_types=["linear_attention", "full_attention"],
    )
    return Pretrainer(fresh_model(config, settings.seed), tokenizer, settings)


def run(trainer: Pretrainer, work: Path, stop: int | None = None) -> None:
    work.mkdir(exist_ok=True)
    trainer.run(work, lambda _: None, lambda _: None, save_s=1e9, stop_after_steps=stop)


def test_a_resumed_run_is_the_same_to_the_bit(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    whole = new_trainer(tokenizer)
    run(whole, tmp_path / "whole", stop=14)
    first = new_trainer(tokenizer)
    run(first, tmp_path / "parts", stop=9)
    second = new_trainer(tokenizer)
    assert second.load(tmp_path / "parts")
    assert second.progress.step == 9
    run(second, tmp_path / "parts", stop=5)
    assert second.progress.pool_start > 0, "the test must cross a pool"
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (tmp_path / "whole" / CHECKPOINT).stat().st_size > 0
    assert whole.progress.tokens == second.progress.tokens
    assert whole.progress.loss == second.progress.loss


def test_the_loss_falls(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trainer = new_trainer(tokenizer, replace(SETTINGS, tokens=20_000))
    run(trainer, tmp_path, stop=1)
    before = trainer.progress.loss
    run(trainer, tmp_path)
    assert trainer.progress.tokens >= 20_000
    assert trainer.progress.loss < 0.9 * before


def test_stopping_early_keeps_the_schedule(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    whole, part = new_trainer(tokenizer), new_trainer(tokenizer)
    run(whole, tmp_path / "whole", stop=12)
    (tmp_path / "part").mkdir()
    part.run(tmp_path / "part", lambda _: None, lambda _: None, save_s=1e9, stop_at=whole.progress.tokens)
    assert part.progress.step == whole.progress.step
    assert part.progress.tokens < SETTINGS.tokens
    for a, b in zip(whole.model.parameters(), part.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert new_trainer(tokenizer).load(tmp_path / "part")


def test_large_batches_get_pools_and_a_warm_up_to_suit(tokenizer: PreTrainedTokenizerFast) -> None:
    assert Settings.for_batches(1024) == Settings()
    large = Settings.for_batches(4096, seed=1, tokens=600_000)
    assert (large.pool_documents, large.warm_up_tokens) == (4096, 204_800)
    batches = pool_batches(tokenizer, large, Progress())
    assert sum(len(b) for b in batches) == large.pool_documents
    assert sum(len(b) >= 16 for b in batches) > len(batches) / 2


def test_the_stages_of_the_text_are_stretched_to_the_runs_length(tokenizer: PreTrainedTokenizerFast) -> None:
    def text(tokens: int, total: int) -> list[Batch]:
        return pool_batches(tokenizer, replace(SETTINGS, tokens=total), Progress(pool_tokens=tokens))

    assert text(450_000, WRITTEN_FOR) == text(4_500_000, 10 * WRITTEN_FOR)
    assert text(450_000, WRITTEN_FOR) != text(450_000, 10 * WRITTEN_FOR)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_with_large_batches(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    settings = Settings.for_batches(16_384, seed=1, tokens=400_000, device="cuda")
    trainer = new_trainer(tokenizer, settings)
    run(trainer, tmp_path, stop=1)
    before = trainer.progress.loss
    run(trainer, tmp_path, stop=10)
    assert trainer.progress.loss < before
    second = new_trainer(tokenizer, settings)
    assert second.load(tmp_path)
    for a, b in zip(trainer.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_other_settings_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    run(new_trainer(tokenizer), tmp_path, stop=1)
    with pytest.raises(ValueError, match="use another --work"):
        new_trainer(tokenizer, Settings(seed=2, precision="fp32")).load(tmp_path)
    assert not new_trainer(tokenizer).load(tmp_path / "elsewhere")


def test_a_loss_that_is_not_finite_updates_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = new_trainer(tokenizer)
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = float("nan")
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(FloatingPointError):
        trainer.step()
    for a, b in zip(before, trainer.model.parameters(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_batches_hold_every_document_once_and_obey_the_bound(tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = new_trainer(tokenizer)
    batches = pool_batches(tokenizer, SETTINGS, trainer.progress)
    assert sum(len(b) for b in batches) == SETTINGS.pool_documents
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(ids) for ids, _ in batch) <= SETTINGS.batch_tokens


def test_only_the_assistants_words_have_full_weight(tokenizer: PreTrainedTokenizerFast) -> None:
    talk = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello, good to see you."},
    ]
    ids, spoken = encode_document(tokenizer, talk)
    said = tokenizer.decode([i for i, s in zip(ids, spoken, strict=True) if s])
    assert said == f"Hello, good to see you.{END}"
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(talk, tokenize=False)


def test_the_learning_rate_warms_up_holds_and_falls() -> None:
    s = Settings(tokens=1_000_000, lr=1.0, warm_up_tokens=100_000)
    rates = [learning_rate(s, t) for t in (0, 50_000, 200_000, 499_999, 750_000, 999_999)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.5, 0.02], abs=1e-4)
    polish = [learning_rate(s, 1_000_000 + t) for t in (0, 33_333, 66_666, 70_000)]
    assert polish == pytest.approx([0.15, 0.075, 0.003, 0.003], abs=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 5, 64, 100])
def test_one_chunk_equals_the_recurrence(num_tokens: int) -> None:
    g = torch.Generator().manual_seed(num_tokens)
    q, k, v = (torch.randn(2, num_tokens, 3, 16, generator=g) for _ in range(3))
    decay = -torch.rand(2, num_tokens, 3, generator=g) * 2
    beta = torch.rand(2, num_tokens, 3, generator=g)
    ours = delta_rule_one_chunk(q, k, v, decay, beta)
    theirs, _ = torch_recurrent_gated_delta_rule(q, k, v, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)
    assert torch.allclose(ours, theirs, atol=2e-5, rtol=1e-4)


def test_the_whole_model_is_the_same_within_one_chunk(tokenizer: PreTrainedTokenizerFast) -> None:
    model = new_trainer(tokenizer).model.eval()
    for length in (40, 200):
        ids = torch.randint(5, 300, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            plain = model(input_ids=ids, use_cache=False).logits
            with one_chunk_training():
                fast = model(input_ids=ids, use_cache=False).logits
        assert torch.allclose(plain, fast, atol=1e-4)
