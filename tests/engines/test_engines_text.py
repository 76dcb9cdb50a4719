"""What a reader gets: whole characters, stop strings, seeds, log-probabilities."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from engine_models import (
    END,
    SENTENCE,
    byte_tokenizer,
    logprobs_alone,
    make_model,
    prompts,
    speaking_model,
)

from secondnature.engines.generation import Delta, Finished, GenerationRequest, GenerationResult, Sampling
from secondnature.engines.local.engine import Engine
from secondnature.engines.local.sampling import Sampler, finite_rows, sample
from secondnature.engines.local.text import Detokenizer, StopScanner, decoder
from secondnature.errors import BadInput

QUESTION = list(b"Q:")


@pytest.fixture(scope="module")
def engine() -> Any:
    torch.set_num_threads(1)
    with Engine(speaking_model(), byte_tokenizer(), stop_ids=[END]) as engine:
        yield engine


def listen(engine: Engine, request: GenerationRequest) -> tuple[list[Delta], GenerationResult]:
    """Every delta, and the result."""
    events = list(engine.submit(request))
    assert isinstance(events[-1], Finished)
    return [e for e in events if isinstance(e, Delta)], events[-1].result


def test_ends_at_the_end_token_and_streams_whole_characters(engine: Engine) -> None:
    deltas, result = listen(engine, GenerationRequest(QUESTION, temperature=0.0))
    assert result.text == SENTENCE == "".join(d.text for d in deltas)
    assert result.token_ids == [*SENTENCE.encode(), END]
    assert (result.finish_reason, result.stop_reason) == ("stop", END)
    assert [d.text for d in deltas] == list(SENTENCE)  # one per character, never a piece of one


@pytest.mark.parametrize("cut", range(1, len(SENTENCE.encode())))
def test_an_answer_cut_in_a_character_leaves_it_out(engine: Engine, cut: int) -> None:
    _, result = listen(engine, GenerationRequest(QUESTION, max_tokens=cut, temperature=0.0))
    assert result.text == SENTENCE.encode()[:cut].decode(errors="ignore")
    assert (result.finish_reason, result.num_completion_tokens) == ("length", cut)


@pytest.mark.parametrize(
    "stops",
    [
        ("stop",),
        ("b\ns",),
        ("🙂, 日",),
        ("zzz", "says: ab\nstop hero", "here"),
        ("G",),
        ("go on.",),
        (",", "日"),
    ],
)
def test_stop_strings_are_never_shown(engine: Engine, stops: tuple[str, ...]) -> None:
    hits = {SENTENCE.find(s): s for s in stops if s in SENTENCE}
    at, found = min(hits.items())
    deltas, result = listen(engine, GenerationRequest(QUESTION, temperature=0.0, stop=stops, logprobs=0))
    assert result.text == SENTENCE[:at] == "".join(d.text for d in deltas)
    assert (result.finish_reason, result.stop_reason) == ("stop", found)
    assert "".join(chr(t.token_id) for t in result.tokens).encode("latin1").decode() == SENTENCE[:at]


def test_what_looked_like_a_stop_string_comes_out_after_all(engine: Engine) -> None:
    _, result = listen(engine, GenerationRequest(QUESTION, temperature=0.0, stop=("on.!", "here, thin")))
    assert result.text == SENTENCE


def test_log_probabilities_equal_an_independent_forward(engine: Engine) -> None:
    request = GenerationRequest(QUESTION, max_tokens=20, temperature=1.3, top_p=0.9, seed=3, logprobs=5)
    crowd = [GenerationRequest(p, max_tokens=9, logprobs=20) for p in prompts(4, 30)]
    result = engine.generate([crowd[0], request, crowd[1]])[1]
    alone = logprobs_alone(speaking_model(), [*QUESTION, *result.token_ids])[len(QUESTION) - 1 : -1]
    kept = [t for t in result.token_ids if t != END]
    assert [t.token_id for t in result.tokens] == kept
    for row, token in zip(alone, result.tokens, strict=False):
        assert token.logprob == pytest.approx(row[token.token_id].item(), abs=1e-4)
        best = row.topk(5)
        assert [t.token_id for t in token.top] == best.indices.tolist()
        assert [t.logprob for t in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_seed_gives_the_same_text_in_any_company() -> None:
    model = make_model("hybrid")
    requests = [
        GenerationRequest(p, max_tokens=25, temperature=0.8, top_p=0.95, seed=40 + i, ignore_eos=True)
        for i, p in enumerate(prompts(4, 11, 30, 4))
    ]
    with Engine(model, byte_tokenizer()) as engine:
        alone = [engine.generate([r])[0].token_ids for r in requests]
        together = [r.token_ids for r in engine.generate(requests[::-1])][::-1]
        other = engine.generate([GenerationRequest(requests[0].prompt_ids, max_tokens=25, seed=1)])[0]
    assert alone == together
    assert other.token_ids != alone[0]


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -40.0]])
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.9)):
        probs = (logits[0].double() / temperature).softmax(-1)
        before = probs.cumsum(-1) - probs  # the logits are in falling order
        expected = torch.where(before < top_p, probs, 0.0)
        expected /= expected.sum()
        num = 20_000
        sampler = Sampler(Sampling(temperature=temperature, top_p=top_p, seed=11))
        counts = torch.bincount(torch.tensor(sample(logits.repeat(num, 1), [sampler] * num)), minlength=5)
        spread = 5 * (num * expected * (1 - expected)).sqrt() + 1e-9
        assert ((counts - num * expected).abs() <= spread).all()


def test_sampling_at_the_edges() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.999, -3.0]])
    for temperature in (0.0, 5e-324, 1e-12):
        assert sample(logits, [Sampler(Sampling(temperature=temperature, seed=0))]) == [1]
    assert sample(logits, [Sampler(Sampling(top_p=1e-9, seed=0))]) == [1]
    bad = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [float("-inf"), 1.0], [float("inf"), 1.0]])
    assert finite_rows(bad) == [True, False, False, False]
    for request in (
        GenerationRequest([1], temperature=-1.0),
        GenerationRequest([1], temperature=math.nan),
        GenerationRequest([1], top_p=0.0),
        GenerationRequest([1], logprobs=21),
    ):
        with pytest.raises(BadInput):
            request.check()


def test_detokenizer_and_scanner_on_random_cuts() -> None:
    decode, rng = decoder(byte_tokenizer()), random.Random(0)
    alphabet = "ab é日🙂\n\u200d́"
    for _ in range(200):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 30)))
        detokenizer = Detokenizer(decode, [rng.randrange(256) for _ in range(rng.randrange(6))])
        pieces = [detokenizer.feed(b) for b in text.encode()]
        assert "".join(pieces) == text
        stops = ["".join(rng.choice(alphabet[:3]) for _ in range(rng.randrange(1, 4))) for _ in range(3)]
        scanner = StopScanner(stops)
        shown = "".join(map(scanner.feed, pieces)) + scanner.flush()
        ends = [(text.index(s), s) for s in stops if s in text]
        if ends:
            # the first one to be complete ends the text; none that is complete is ever shown
            assert scanner.found is not None
            assert text.startswith(shown + scanner.found)
            assert not any(s in shown for s in stops)
        else:
            assert shown == text


def test_bytes_that_are_no_text_do_not_stop_the_stream() -> None:
    detokenizer = Detokenizer(decoder(byte_tokenizer()))
    raw = bytes([0xFF, 0xFF, 0xE2, 0x41, 0xFF, 0xFE, 0xFD, 0xFC, 0xFB, 0xE2, 0x82, 0xAC, 0x42])
    assert "".join(map(detokenizer.feed, raw)) == raw.decode(errors="replace")
