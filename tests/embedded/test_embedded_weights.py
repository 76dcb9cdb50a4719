"""The shipped weights: they load without a warning, have the shape that engines want, do what the card says."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from secondnature.embedded import path
from secondnature.embedded.answers import greedy, passes
from secondnature.embedded.curve import draw
from secondnature.embedded.evaluate import PLAN, WANTED, interval, short_of_promise
from secondnature.embedded.files import load_model
from secondnature.embedded.model_card import readme
from secondnature.embedded.scenarios import cases

MAX_BYTES = 20_000_000


def card() -> dict:
    return json.loads((path() / "card.json").read_text())


def test_the_files_are_small_bf16_and_vllm_shaped() -> None:
    assert (path() / "model.safetensors").stat().st_size <= MAX_BYTES
    config = AutoConfig.from_pretrained(path())
    assert config.linear_key_head_dim == config.linear_value_head_dim in (64, 128)
    assert config.layer_types == (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert config.vocab_size % 64 == 0
    assert config.max_position_embeddings >= 2048
    with safe_open(path() / "model.safetensors", "pt") as f:
        assert {f.get_slice(name).get_dtype() for name in f.keys()} == {"BF16"}  # noqa: SIM118


def test_the_tokenizer_and_the_template_round_trip() -> None:
    tokenizer = AutoTokenizer.from_pretrained(path())
    for text in ("Paint the door red.", "def get_total(x):\n    return x + 12", "Grüße 漢字"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    talk = [{"role": "user", "content": "Hello."}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>Hello.<|end|><|assistant|>"
    end = tokenizer.eos_token_id
    assert (
        GenerationConfig.from_pretrained(path()).eos_token_id
        == end
        == tokenizer.convert_tokens_to_ids("<|end|>")
    )
    with pytest.raises(Exception, match="found the role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_weights_do_what_the_card_says() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_model(path())
    for category, floor in (("habit", 0.85), ("accept-with-cue", 0.8), ("push-back", 0.8), ("code", 0.85)):
        chosen = list(cases(category, 20, "floor"))
        answers = greedy(model, tokenizer, [c.prompt for c in chosen], batch_size=20)
        good = sum(passes(c, a) for c, a in zip(chosen, answers, strict=True))
        assert good / len(chosen) >= floor, (category, answers)


def test_left_padded_batches_answer_as_single_prompts_do() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_model(path())
    prompts = [
        c.prompt for category in ("habit", "code", "accept-with-cue") for c in cases(category, 2, "pad")
    ]
    together = greedy(model, tokenizer, prompts)
    assert together == [greedy(model, tokenizer, [p])[0] for p in prompts]


def test_the_card_is_whole_and_the_readme_is_made_of_it() -> None:
    found = card()
    assert (path() / "README.md").read_text() == readme(found)
    assert (path() / "curve.svg").read_text() == draw(found["curve"], found["second"]["curve"], WANTED)
    rows = {(r["category"], r["held_out"]): r for r in found["evaluation"]}
    assert tuple(rows) == PLAN
    for (_, held), row in rows.items():
        assert row["n"] == 300 or held == "word"
        assert interval(row["passed"], row["n"]) == pytest.approx((row["low"], row["high"]), abs=1e-4)
        assert ("promise" in row) == (held == "combination" and row["category"] in WANTED)
    assert found["short_of_promise"] == short_of_promise(found["evaluation"], found["feelings"])
    for category in ("habit", "accept-with-cue", "push-back", "push-back-with-cue", "code"):
        assert rows[category, "combination"]["promise"] == "kept"
    assert found["feelings"]["n"] >= 300
    assert re.fullmatch(
        r"python -m secondnature\.embedded\.build --seed \d+ --tokens \d+", found["training"]["command"]
    )


def test_a_second_seed_was_trained_for_a_quarter_of_the_tokens() -> None:
    found = card()
    second = found["second"]
    assert second["seed"] != found["training"]["seed"]
    assert second["curve"][-1]["tokens"] >= 0.2 * found["training"]["settings"]["tokens"]
    assert len(second["largest_differences"]) >= 15


def test_heads_remember_from_one_token_to_hundreds() -> None:
    summary = card()["decay_summary"]
    assert summary["shortest"] <= 3
    assert summary["longest"] >= 100
