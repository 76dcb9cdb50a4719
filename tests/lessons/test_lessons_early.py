"""An answer to a probe is generated as far as its check needs it, and judged as the whole one would be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from secondnature import embedded
from secondnature.engines.generation import GenerationRequest
from secondnature.engines.local.engine import Engine
from secondnature.evidence.decided import decider
from secondnature.evidence.style import MAX_SAMPLED, sampled
from secondnature.lessons import prober as prober_module
from secondnature.lessons.prober import Prober
from secondnature.model.chat import encode_chat, read_tokenizer
from secondnature.model.load import build
from secondnature.records import Check, Message, Probe
from secondnature.weights import checkpoint

PROMPTS = ("Paint the door red.", "Who are you?", "Write a function that adds two numbers.", "Good morning.")
PATTERNS = (".", "red", "^Yes", "^How", r"\bthe\b", r"\?$", "(?i)i", "def ", "^[A-Z][a-z]+ [a-z]+", "zzz")


@pytest.fixture(scope="module")
def engine() -> Iterator[tuple[Engine, Any, int]]:
    torch.set_num_threads(1)
    directory = Path(embedded.path())
    tokenizer = read_tokenizer(directory)
    model = build(directory, {n: t.clone() for n, t in checkpoint.read(directory).items()})
    with Engine(model, tokenizer) as found:
        yield found, tokenizer, found.limits.context


def probes() -> list[Probe]:
    checks = [Check(matches=p) for p in PATTERNS] + [Check(not_matches=p) for p in PATTERNS]
    return [
        Probe.model_validate({"prompt": prompt, "behaviour": "guard", "check": check})
        for prompt in PROMPTS
        for check in checks
    ]


def test_the_verdicts_are_those_of_whole_answers(
    engine: tuple[Engine, Any, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = probes()
    monkeypatch.setattr(prober_module, "sampled", lambda probes: set[str]())
    early = Prober(engine[0], engine[1], context_limit=engine[2]).outcomes(asked, "w", lambda *_: None)
    monkeypatch.setattr(prober_module, "decider", lambda check: None)
    whole = Prober(engine[0], engine[1], context_limit=engine[2]).outcomes(asked, "w", lambda *_: None)
    assert [o.passed for o in early] == [o.passed for o in whole]
    assert all(w.answer.startswith(e.answer) for e, w in zip(early, whole, strict=True))
    num_early, num_whole = (sum(len(o.answer) for o in found) for found in (early, whole))
    assert num_early < 0.7 * num_whole
    for probe, outcome in zip(asked, early, strict=True):
        if probe.check.matches == r"\?$":
            assert outcome.answer in {w.answer for w in whole}, "this needs the end"


def test_a_probe_says_how_much_is_generated(engine: tuple[Engine, Any, int]) -> None:
    plain = Probe.model_validate(
        {"prompt": PROMPTS[2], "behaviour": "guard", "check": {"python": "assert True"}}
    )
    short = plain.model_copy(update={"max_tokens": 3})
    found = Prober(engine[0], engine[1], context_limit=engine[2]).outcomes(
        [plain, short], "w", lambda *_: None
    )
    assert len(found[1].answer) < len(found[0].answer)
    assert found[0].answer.startswith(found[1].answer)
    assert plain.digest() != short.digest()
    assert "max_tokens" not in plain.model_dump(exclude_none=True)


def test_what_raises_in_deciding_ends_no_answer(engine: tuple[Engine, Any, int]) -> None:
    def broken(text: str) -> bool:
        raise ValueError(text)

    ids = encode_chat(engine[1], [Message(role="user", content="Paint the door red.")])
    requests = [
        GenerationRequest(ids, max_tokens=8, temperature=0.0, enough=enough)
        for enough in (None, broken, decider(Check(matches=".")))
    ]
    plain, other, cut = engine[0].generate(requests)
    assert other.text == plain.text
    assert len(cut.token_ids) < len(plain.token_ids)
    assert cut.finish_reason == "stop"


def test_a_sample_is_answered_to_its_end_for_whoever_looks_at_style(engine: tuple[Engine, Any, int]) -> None:
    asked = probes()
    sample = sampled(asked)
    assert len(sample) == MAX_SAMPLED < len(asked)
    prober = Prober(engine[0], engine[1], context_limit=engine[2])
    first = prober.outcomes(asked[:1], "w", lambda *_: None)[0]
    found = {o.probe: o for o in prober.outcomes(asked, "w", lambda *_: None)}
    assert first.whole, "a set that is no larger than the sample"
    whole = {o.answer for o in found.values() if o.whole}
    assert {o.probe for o in found.values() if o.whole} == sample | {
        p.digest() for p in asked if decider(p.check) is None
    } | {first.probe}
    assert len(whole) <= len(PROMPTS), "one whole answer to each prompt"
    other = next(p for p in asked if p.digest() not in sample and not found[p.digest()].whole)
    again = prober.outcomes([other], "w", lambda *_: None)[0]
    assert again.whole, "an answer that was cut is no answer to whoever wants it whole"
    assert again.answer in whole
