"""Answers that fit a schema, beside others that need not: masks are per row, log-probabilities stay the model's."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import dense_config, in_arena, save_tiny
from tiny_server import save_tokenizer

from secondnature.engines.generation import GenerationRequest
from secondnature.engines.local.engine import Engine
from secondnature.engines.local.text import decoder
from secondnature.errors import BadInput
from secondnature.model.chat import read_tokenizer
from secondnature.model.thoughts import Thoughts

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "colour": {"enum": ["red", "blue"]}},
    "required": ["ok", "colour"],  # no others are written, though JSON Schema would allow them
}
END = 1


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("shape")
    save_tiny(dense_config(vocab_size=320), directory)  # it says anything: what fits is the mask's doing
    save_tokenizer(directory)
    _, model = in_arena(directory)
    with Engine(model, read_tokenizer(directory), stop_ids=[END]) as engine:
        yield engine


def _fits(text: str) -> bool:
    found = json.loads(text)
    return (
        found.keys() == {"ok", "colour"}
        and isinstance(found["ok"], bool)
        and found["colour"] in ("red", "blue")
    )


def read_ids(engine: Engine, text: str) -> list[int]:
    """The tokens of a text."""
    return list(engine._grammars._tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_an_answer_fits_its_schema_beside_answers_that_need_not(engine: Engine, temperature: float) -> None:
    shape = engine.shape(SCHEMA)
    prompt = [40, 50, 60]
    free = GenerationRequest(prompt, max_tokens=64, temperature=temperature, seed=3, logprobs=2)
    alone = engine.generate([free])[0]
    shaped = [
        GenerationRequest(prompt, max_tokens=64, temperature=temperature, top_p=p, seed=s, shape=shape)
        for s, p in ((1, 1.0), (2, 1.0), (3, 0.5))
    ]
    *answers, beside = engine.generate([*shaped, free])
    assert all(_fits(a.text) and a.finish_reason == "stop" for a in answers)
    assert beside.token_ids == alone.token_ids


def test_log_probabilities_are_the_models_own(engine: Engine) -> None:
    request = GenerationRequest(
        [40, 50], max_tokens=64, temperature=0, logprobs=5, shape=engine.shape(SCHEMA)
    )
    answer = engine.generate([request])[0]
    own = engine.score([([40, 50], answer.token_ids)])[0]
    assert [t.logprob for t in answer.tokens] == pytest.approx(own, abs=1e-3)
    best = [t.top[0] for t in answer.tokens]
    assert any(b.token_id != t for b, t in zip(best, answer.token_ids, strict=True)), (
        "it wanted another token"
    )


def test_what_a_schema_says_of_other_properties_holds(engine: Engine) -> None:
    parts = [{"type": "object", "properties": {k: {"const": 1}}, "required": [k]} for k in ("a", "b")]
    more = {
        "type": "object",
        "properties": {"a": {"const": 1}},
        "additionalProperties": {"const": 2},
        "minProperties": 2,
    }
    for schema in ({"allOf": parts}, {**more, "required": ["a"]}):
        request = GenerationRequest([40, 50], max_tokens=200, temperature=0, shape=engine.shape(schema))
        text = engine.generate([request])[0].text
        assert text.startswith('{"a": 1, "'), text


@pytest.mark.parametrize("close", ["?", "<|user|>"], ids=["text", "a special token"])
@pytest.mark.parametrize("opened", [True, False])
def test_thoughts_come_first_and_the_shape_begins_behind_them(
    engine: Engine, close: str, opened: bool
) -> None:
    """The model says anything: it is let think as it likes, and what follows fits."""
    thoughts = Thoughts("!", close, opened)
    # it would go on for ever: the marks are made likely
    ends = dict.fromkeys(read_ids(engine, close + "!"), 4.0)
    shape = engine.shape(SCHEMA, thoughts)
    requests = [
        GenerationRequest([40, 50], max_tokens=500, seed=s, logit_bias=ends, shape=shape, marks=(close,))
        for s in range(4)
    ]
    answers = engine.generate(requests)
    parts = [answer.text.partition(close) for answer in answers]
    assert all(_fits(said if found else before) for before, found, said in parts)
    assert any(before.strip("!") for before, found, _ in parts if found)
    assert all(found or not opened for _, found, _ in parts)
    assert all(before.startswith("!") or opened for before, found, _ in parts if found)


def test_an_answer_that_is_cut_says_so(engine: Engine) -> None:
    answer = engine.generate([GenerationRequest([40], max_tokens=3, shape=engine.shape(SCHEMA))])[0]
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == 3


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "colour"}, "colour"),
        ({"$ref": "https://example.org/x.json"}, "not present in a registry"),  # nothing is fetched
        ({"type": "string", "pattern": "(("}, "unclosed group"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "Unsatisfiable"),
        ({"type": "string", "description": "x" * 300_000}, "at most 200,000"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_with_its_words(
    engine: Engine, schema: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        engine.shape(schema)


def test_without_the_extra_it_is_named(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(BadInput, match="llguidance") as found:
        engine.shape(SCHEMA)
    assert "secondnature[json]" in found.value.hint


def test_marks_stay_in_the_text_and_other_special_tokens_do_not(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    ids = tokenizer("<|system|>Say<|user|> tea")["input_ids"]
    assert decoder(tokenizer)(ids) == "Say tea"
    assert decoder(tokenizer, ("<|user|>",))(ids) == "Say<|user|> tea"
