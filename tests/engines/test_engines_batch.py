"""The batch equals single runs: whatever joins, leaves or is read in pieces, for every kind of model."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import (
    KINDS,
    byte_tokenizer,
    generate_alone,
    logprobs_alone,
    make_model,
    prompts,
    real_chat_model,
)
from transformers import AutoModelForCausalLM, DeepseekV32Config, MistralConfig

from secondnature.engines.generation import GenerationRequest, score_request
from secondnature.engines.local.engine import Engine
from secondnature.engines.local.rows import BatchRows
from secondnature.errors import UnsupportedModel
from secondnature.model.load import build

LENGTHS = (5, 1, 17, 70, 2, 33)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.set_num_threads(1)
    return make_model(request.param)


def greedy(prompt: list[int], num: int, **fields: Any) -> GenerationRequest:
    return GenerationRequest(prompt, max_tokens=num, temperature=0.0, ignore_eos=True, **fields)


@torch.inference_mode()
def test_padded_logits_equal_single_ones(model: Any) -> None:
    texts = prompts(*LENGTHS)
    rows = BatchRows(model)
    logits = [rows.prefill(texts, 1)[:, -1]]
    for step in range(12):
        logits.append(rows.step([(7 * i + step) % 256 for i in range(len(texts))]))
    for i, prompt in enumerate(texts):
        told = [(7 * i + step) % 256 for step in range(12)]
        alone = model(input_ids=torch.tensor([prompt + told]), use_cache=False).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(torch.stack([x[i] for x in logits]), alone, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_prompts_that_begin_alike_equal_single_ones(model: Any) -> None:
    rows, begin = BatchRows(model), prompts(40, seed=2)[0]
    if not rows.can_share:
        pytest.skip("a recurrence has only its end")
    texts = [[*begin, *rest] for rest in prompts(9, 1, 30, 60, 9, seed=3)]
    logits = [rows.prefill_sharing(texts, len(begin), 1)[:, -1]]
    for step in range(6):
        logits.append(rows.step([(7 * i + step) % 256 for i in range(len(texts))]))
    for i, prompt in enumerate(texts):
        told = [(7 * i + step) % 256 for step in range(6)]
        alone = model(input_ids=torch.tensor([prompt + told]), use_cache=False).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(torch.stack([x[i] for x in logits]), alone, rtol=0, atol=1e-4)


def test_a_common_beginning_is_read_once_and_changes_nothing(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = prompts(40, seed=2)[0]
    texts = [[*begin, *rest] for rest in prompts(9, 1, 30, 12, 9, 5, seed=3)]
    inside = 38  # scored from inside what all begin with
    forwards: list[int] = []
    begun, all_wait = threading.Event(), threading.Event()
    plain = BatchRows._forward  # pyright: ignore[reportPrivateUsage]

    def counted(self: BatchRows, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        begun.set()
        all_wait.wait(60)
        if ids.shape[1] > 1:
            forwards.append(ids.numel())
        return plain(self, ids, *rest)

    monkeypatch.setattr(BatchRows, "_forward", counted)
    with Engine(model, byte_tokenizer(), prefill_tokens=512) as engine:
        first = engine.submit(greedy([1], 1))
        assert begun.wait(60)
        asked = [*[greedy(t, 8) for t in texts], score_request(texts[0][:inside], texts[0][inside:])]
        handles = [engine.submit(request) for request in asked]
        all_wait.set()
        *results, scored = [handle.result() for handle in handles]
        first.result()
        (again,) = engine.generate([greedy(texts[0], 8)])
    for text, result in zip(texts, results, strict=True):
        assert result.token_ids == generate_alone(model, text, 8)
    assert again.token_ids == results[0].token_ids
    exact = logprobs_alone(model, texts[0])[range(inside - 1, len(texts[0]) - 1), texts[0][inside:]]
    assert [t.logprob for t in scored.prompt_tokens] == pytest.approx(exact.tolist(), abs=1e-4)
    if BatchRows(model).can_share:
        longest, common = max(map(len, texts)), inside - 1
        assert forwards == [common, 7 * (longest - common), len(texts[0])], (
            "nothing is kept for the next turn"
        )
    else:
        assert forwards == [7 * max(map(len, texts)), len(texts[0])]


@torch.inference_mode()
def test_rows_join_and_leave_at_any_time_without_touching_the_others(model: Any) -> None:
    rng = random.Random(3)
    rows, texts, seen = BatchRows(model), list[list[int]](), list[list[torch.Tensor]]()
    pool = prompts(*[rng.randrange(1, 60) for _ in range(40)], seed=1)
    done = 0
    while pool or texts:
        if pool and (not texts or rng.random() < 0.4):
            group = [pool.pop() for _ in range(min(len(pool), rng.randrange(1, 4)))]
            new = BatchRows(model)
            first = new.prefill(group, 1)[:, -1]
            chosen = [i for i in range(len(group)) if rng.random() < 0.9]
            rows.append(new, chosen)
            texts += [list(group[i]) for i in chosen]
            seen += [[first[i]] for i in chosen]
        if texts:
            tokens = [rng.randrange(256) for _ in texts]
            logits = rows.step(tokens)
            for i, token in enumerate(tokens):
                texts[i].append(token)
                seen[i].append(logits[i])
        leaving = [i for i in range(len(texts)) if rng.random() < (0.08 if pool else 0.4)]
        for i in leaving:
            count = len(seen[i])
            alone = model(input_ids=torch.tensor([texts[i]]), use_cache=False).logits[0, -count:]
            torch.testing.assert_close(torch.stack(seen[i]), alone, rtol=0, atol=1e-4)
            done += 1
        order = rows.remove(leaving)
        texts, seen = [texts[i] for i in order], [seen[i] for i in order]
        assert rows.lengths == [len(t) for t in texts]
    assert done >= 25


@torch.inference_mode()
def test_columns_are_given_back_and_grow_again(model: Any) -> None:
    texts = prompts(300, 4, 9)
    rows = BatchRows(model)
    rows.prefill(texts, 1)
    texts = [texts[i] for i in rows.remove([0])]
    assert rows.num_columns == 9
    assert rows.window.end == 9  # the columns of the long row are used again
    for step in range(80):
        for i, logits in enumerate(rows.step([step, step + 1])):
            texts[i].append(step + i)
            if step % 20 == 19:
                alone = model(input_ids=torch.tensor([texts[i]]), use_cache=False).logits[0, -1]
                torch.testing.assert_close(logits, alone, rtol=0, atol=1e-4)
        if step == 50:  # a longer one joins, and what it needs is zero in the others
            new = BatchRows(model)
            (other,) = prompts(200, seed=4)
            new.prefill([other], 1)
            rows.append(new, [0])
            assert rows.num_columns == 200
            assert rows.remove([2]) == [0, 1]


@torch.inference_mode()
def test_a_row_that_was_nan_does_not_poison_the_next_one_in_its_place() -> None:
    model = make_model("hybrid")
    rows = BatchRows(model)
    first, second = prompts(40, 30)
    rows.prefill([first, second], 1)
    for layer in rows.layers:
        for state in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if state is not None:
                state[1] = float("nan")
    rows.remove([1])
    new = BatchRows(model)
    logits = [new.prefill([second[:3]], 1)[:, -1]]
    rows.append(new, [0])
    logits.append(rows.step([1, 2])[1:])
    alone = model(input_ids=torch.tensor([[*second[:3], 2]]), use_cache=False).logits[0, -2:]
    torch.testing.assert_close(torch.cat(logits), alone, rtol=0, atol=1e-4)


def test_crowd_equals_transformers_generate(model: Any) -> None:
    texts = prompts(*LENGTHS, 120, 9, 64)
    with Engine(model, byte_tokenizer(), prefill_tokens=96) as engine:
        results = engine.generate([greedy(p, 10 + 3 * i) for i, p in enumerate(texts)])
    for i, (prompt, result) in enumerate(zip(texts, results, strict=True)):
        assert result.token_ids == generate_alone(model, prompt, 10 + 3 * i)
        assert (result.finish_reason, result.num_completion_tokens) == ("length", 10 + 3 * i)


def test_prompt_read_in_pieces_equals_whole(model: Any) -> None:
    (prompt,) = prompts(300)
    for piece in (29, 64, 300):
        with Engine(model, byte_tokenizer(), prefill_tokens=piece) as engine:
            assert engine.generate([greedy(prompt, 12)])[0].token_ids == generate_alone(model, prompt, 12)
            (scored,) = engine.generate([score_request(prompt[:100], prompt[100:], top=2)])
        alone = logprobs_alone(model, prompt)
        told = torch.tensor([t.logprob for t in scored.prompt_tokens]).double()
        expected = alone[99:-1].gather(-1, torch.tensor(prompt[100:])[:, None])[:, 0]
        torch.testing.assert_close(told, expected, rtol=0, atol=1e-4)


def test_scores_of_a_crowd_equal_plain_forwards(model: Any) -> None:
    texts = prompts(2, 9, 33, 40, 5, 90, 21)
    pairs = [(p[: max(1, len(p) // 3)], p[max(1, len(p) // 3) :]) for p in texts]
    with Engine(model, byte_tokenizer(), prefill_tokens=128) as engine:
        told = engine.score(pairs)
    for (context, continuation), scores in zip(pairs, told, strict=True):
        alone = logprobs_alone(model, [*context, *continuation])[len(context) - 1 : -1]
        expected = alone.gather(-1, torch.tensor(continuation)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scores).double(), expected, rtol=0, atol=1e-4)


def test_eager_attention_works_as_well() -> None:
    model = make_model("hybrid", attention="eager")
    texts = prompts(*LENGTHS)
    with Engine(model, byte_tokenizer()) as engine:
        for prompt, result in zip(texts, engine.generate([greedy(p, 8) for p in texts]), strict=True):
            assert result.token_ids == generate_alone(model, prompt, 8)


def test_a_model_that_nobody_here_made_up_to_its_last_position() -> None:
    model, tokenizer = real_chat_model()
    questions = ["hi there", "what do you like to eat?", "do you have a dog?", "i am sad.", "who are you?"]
    texts = [tokenizer(f"[INST] {q}[/INST]", add_special_tokens=False)["input_ids"] for q in questions]
    with Engine(model, tokenizer) as engine:
        results = engine.generate([greedy(p, 64 - len(p)) for p in texts])
        told = engine.generate([GenerationRequest(p, temperature=0.0) for p in texts])
    for prompt, result, spoken in zip(texts, results, told, strict=True):
        alone = generate_alone(model, prompt, 64 - len(prompt))
        assert result.token_ids == alone
        assert spoken.finish_reason in ("stop", "length")
        assert spoken.token_ids == alone[: len(spoken.token_ids)]
        assert (
            spoken.finish_reason == "length" or spoken.token_ids[-1] in model.generation_config.eos_token_id
        )
        assert spoken.text == tokenizer.decode(spoken.token_ids, skip_special_tokens=True)


def test_weights_of_the_arena_kind_are_live(tmp_path: Path) -> None:
    source = make_model("hybrid")
    source.config.save_pretrained(tmp_path)
    weights = {name: p.detach().bfloat16() for name, p in source.named_parameters()}
    model = build(tmp_path, weights)
    texts = prompts(*LENGTHS)
    with Engine(model, byte_tokenizer()) as engine:
        before = [r.token_ids for r in engine.generate([greedy(p, 12) for p in texts])]
        assert before == [generate_alone(model, p, 12) for p in texts]
        old = {name: w.clone() for name, w in weights.items()}
        for name, w in weights.items():
            if "norm" not in name:
                w.add_(torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).bfloat16() * 0.1)
        after = [r.token_ids for r in engine.generate([greedy(p, 12) for p in texts])]
        assert after == [generate_alone(model, p, 12) for p in texts]
        assert after != before
        for name, w in weights.items():
            w.copy_(old[name])
        assert [r.token_ids for r in engine.generate([greedy(p, 12) for p in texts])] == before


def test_states_that_cannot_be_batched_are_refused_by_name() -> None:
    """DeepSeek V3.2 keeps keys of a second, smaller attention that picks what the first one sees."""
    config = DeepseekV32Config(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        n_group=1,
        topk_group=1,
    )
    with pytest.raises(UnsupportedModel, match="layer 0 of a deepseek_v32 keeps another state"):
        Engine(AutoModelForCausalLM.from_config(config), byte_tokenizer())


def test_a_window_is_seen_by_every_row(tmp_path: Path) -> None:
    """Sliding layers keep all keys; the masks do the rest, alone, together and across joins."""
    config = MistralConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=16,
    )
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    model.lm_head.weight.mul_(8)
    texts = prompts(5, 70, 31, 300)
    with Engine(model, byte_tokenizer(), stop_ids=[]) as engine:
        found = [r.token_ids for r in engine.generate([greedy(p, 24) for p in texts])]
    assert found == [generate_alone(model, p, 24) for p in texts]
    model.config.sliding_window = 4096
    assert found[3] != generate_alone(model, texts[3], 24), "the window matters here"
