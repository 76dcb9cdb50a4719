"""How tokens are drawn: penalties, biases and cuts are those of transformers; rows hold only what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import END, byte_tokenizer, make_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from secondnature.engines.generation import Delta, GenerationRequest, PromptScored, Sampling
from secondnature.engines.local.engine import Engine
from secondnature.engines.local.sampling import Sampler, finite_rows, likeliest, likely
from secondnature.engines.local.text import vocabulary
from secondnature.errors import BadInput
from secondnature.model.defaults import SamplingDefaults, sampling_defaults

VOCABULARY = 50


def rows(seed: int, count: int = 200) -> torch.Tensor:
    return torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed)).double() * 3


@pytest.mark.parametrize(
    ("temperature", "min_p", "top_k", "top_p"),
    [
        (0.7, 0.0, 5, 1.0),
        (1.3, 0.05, 0, 1.0),
        (1.0, 0.0, 0, 0.8),
        (0.9, 0.02, 20, 0.9),
        (2.0, 0.3, 3, 0.5),
        (1.0, 1.0, 0, 1.0),
        (1.0, 0.0, 1, 1.0),
        (1.0, 0.0, 1000, 0.3),
    ],
)
def test_what_is_left_is_what_transformers_leaves(
    temperature: float, min_p: float, top_k: int, top_p: float
) -> None:
    """Down to the probability; warpers in vLLM's order."""
    logits = rows(1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(torch.zeros(len(logits), 1, dtype=torch.long), logits).softmax(-1)  # pyright: ignore[reportArgumentType]
    probs, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    sampler = Sampler(Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p))
    left = likely(probs, [sampler] * len(logits))
    found = torch.zeros_like(left).scatter(-1, order, left / left.sum(-1, keepdim=True))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    assert (found == 0).any() or top_k == 1000


def test_penalties_and_biases_are_those_of_transformers_and_of_openais_formula() -> None:
    prompt, said = [3, 4, 4, 9], [9, 7, 7, 7]
    logits = rows(2, 1)
    repeated = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + said]), logits.clone())  # pyright: ignore[reportArgumentType]
    found = logits[0].clone()
    Sampler(Sampling(repetition_penalty=1.7), prompt, said).move(found)
    torch.testing.assert_close(found, repeated[0], atol=0, rtol=0)
    expected = logits[0].clone()
    for token, times in ((9, 1), (7, 3)):
        expected[token] -= 0.5 * times + 0.25
    expected[11] += 4.0
    found = logits[0].clone()
    how = Sampling(frequency_penalty=0.5, presence_penalty=0.25, logit_bias={11: 4.0})
    Sampler(how, prompt, said).move(found)
    torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("hybrid")


def test_the_engine_uses_them_greedy_answers_too(model: Any) -> None:
    with Engine(model, byte_tokenizer(), stop_ids=[]) as engine:

        def ask(**fields: Any) -> list[int]:
            request = GenerationRequest([5, 6, 7], max_tokens=12, temperature=0.0, **fields)
            return engine.submit(request).result(30).token_ids

        plain = ask()
        assert ask(logit_bias={42: 100.0}) == [42] * 12
        assert len(set(ask(presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=50.0))) == 12
        assert plain[0] not in ask(logit_bias=dict.fromkeys(plain, -100.0))
        stopped = engine.submit(
            GenerationRequest([5, 6, 7], 12, temperature=0.0, stop_token_ids=(plain[0],), ignore_eos=True)
        ).result(30)
        assert (stopped.finish_reason, stopped.token_ids, stopped.text) == ("stop", plain[:1], "")
        for wrong in ({"logit_bias": {VOCABULARY_OF_MODEL: 1.0}}, {"stop_token_ids": (VOCABULARY_OF_MODEL,)}):
            with pytest.raises(BadInput, match=f"{next(iter(wrong))}: token id 260 is outside") as refused:
                ask(**wrong)
            assert refused.value.param == next(iter(wrong))


VOCABULARY_OF_MODEL = 260


def test_the_end_token_has_a_log_probability(model: Any) -> None:
    """As many entries as tokens in usage: an evaluation that drops the last one drops no token of the text."""
    with Engine(model, byte_tokenizer(), stop_ids=[END]) as engine:
        request = GenerationRequest([5, 6, 7], 12, temperature=0.0, logprobs=2, logit_bias={END: 100.0})
        result = engine.submit(request).result(30)
    assert result.token_ids == [END]
    assert [(t.token_id, t.text, t.raw) for t in result.tokens] == [(END, "<end>", None)]
    assert result.text == ""


def test_without_max_tokens_nobody_waits_for_what_might_be_written(model: Any) -> None:
    """A context of 4096 and memory for 2 such rows: eight requests without a limit run at once."""
    with Engine(model, byte_tokenizer(), stop_ids=[], max_context=4096, max_held_tokens=8192) as engine:
        handles = [engine.submit(GenerationRequest([i, 6, 7])) for i in range(8)]
        first = [next(iter(h)) for h in handles]
        assert all(isinstance(event, Delta) for event in first)
        assert engine.metrics.set_back == 0
        for handle in handles:
            handle.cancel()


@pytest.mark.parametrize("kind", ["hybrid", "qwen3"])
def test_rows_that_outgrow_the_memory_give_way_and_go_on(kind: str) -> None:
    """The newest wait, read again what they had written, and write what they would have written alone."""
    model = make_model(kind)
    requests = [
        GenerationRequest([i, 6, 7], 120, temperature=1.0, seed=i, logprobs=0, score_from=1) for i in range(3)
    ]
    with Engine(model, byte_tokenizer(), stop_ids=[]) as engine:
        alone = [engine.submit(r).result(60) for r in requests]
    widest: list[int] = []

    def look(engine: Engine) -> None:
        held = list(engine._turns.held())  # pyright: ignore[reportPrivateUsage]
        widest.append(len(held) * max((j.held for j in held), default=0))

    with Engine(model, byte_tokenizer(), stop_ids=[], max_held_tokens=200, on_step=[look]) as engine:
        engine._turns.max_held = 10_000  # pyright: ignore[reportPrivateUsage]  # all are let in
        handles = [engine.submit(r) for r in requests]
        for handle in handles:
            next(event for event in handle if isinstance(event, Delta))
        engine._turns.max_held = 200  # pyright: ignore[reportPrivateUsage]
        del widest[:]
        together = [h.result(60) for h in handles]
        assert engine.metrics.set_back >= 2
    assert max(widest[1:]) <= 200
    for one, other, handle in zip(alone, together, handles, strict=True):
        assert (one.token_ids, one.text) == (other.token_ids, other.text)
        assert len(other.tokens) == 120
        assert [p.logprob for p in other.tokens] == pytest.approx([p.logprob for p in one.tokens], abs=2e-2)
        assert sum(isinstance(event, PromptScored) for event in handle) == 1


def sentencepiece() -> Any:
    """Pieces with marked spaces and bytes, as Llama's and Gemma's vocabularies have them."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581tea", "\u2581", "oak"]
    core = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<unk>")


@pytest.mark.parametrize(
    "tokenizer", [byte_tokenizer(), sentencepiece()], ids=["byte-level", "sentencepiece"]
)
def test_the_bytes_of_tokens_joined_are_the_text(tokenizer: Any) -> None:
    """Also where a token is a quarter of a character."""
    entry = vocabulary(tokenizer)
    generator = torch.Generator().manual_seed(7)
    characters = [*"aé日🙂 \n\u2581x~ÿ\u0100", "\u0301"]
    first = 0 if tokenizer.eos_token == "<end>" else 1
    for _ in range(300):
        picked = torch.randint(len(characters), (6,), generator=generator).tolist()
        text = "".join(characters[i] for i in picked).replace("\u2581", " ")
        ids = [byte + first for byte in text.encode()]
        if first and torch.rand(1, generator=generator) < 0.5:
            ids, text = [*ids, 257, 259], text + " teaoak"
        raw = b"".join(entry(i)[1] or b"" for i in ids)
        assert raw == text.encode() == tokenizer.backend_tokenizer.decode(ids).encode()
    end = tokenizer.eos_token_id
    assert entry(end) == (tokenizer.eos_token, None)


def test_defaults_are_read_from_the_models_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert sampling_defaults(tmp_path) == SamplingDefaults()
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}))
    assert sampling_defaults(tmp_path) == SamplingDefaults(0.6, 0.95, 20)
    path.write_text(json.dumps({"temperature": "hot", "top_p": 2, "top_k": None, "repetition_penalty": 1.1}))
    assert sampling_defaults(tmp_path) == SamplingDefaults(repetition_penalty=1.1)
    assert "temperature is 'hot'" in caplog.text
    assert "top_p is 2" in caplog.text
    path.write_text("{")
    assert sampling_defaults(tmp_path) == SamplingDefaults()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1280, 16384, 16387])
def test_the_likeliest_is_the_first_of_the_largest(dtype: torch.dtype, width: int) -> None:
    logits = torch.randn(7, width).to(dtype)
    logits[1, [3, 700, 1279]] = 9.0
    logits[2, [128, 129]] = 9.0
    logits[3] = -5.0
    assert likeliest(logits) == [int((row == row.max()).nonzero()[0]) for row in logits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_no_numbers_are_seen(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 1280).to(dtype)
    for row, wrong in ((1, float("nan")), (2, float("inf")), (3, -float("inf"))):
        logits[row, 700] = wrong
    assert finite_rows(logits) == [True, False, False, False, True]
