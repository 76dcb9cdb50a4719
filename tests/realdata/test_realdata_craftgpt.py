"""A real GPT-2-shaped chat model with 64 tokens of context, through the real server: one lesson kept, one undone.

SECONDNATURE_REALDATA names a folder with models/craftgpt-chat; without it these tests are skipped. The model is
asked "what is your favorite color?" and loops ("i love blue, blue, and blue, ..."); it is corrected once, held
to its own answers elsewhere by their distributions, and kept by hand: one corrected question is no sample that a
gate could judge. The test measures what is kept: the corrected answer is given, and at least 95 % of 200
unrelated greedy answers stay, word for word. The drilled lesson has the same 200 as its guard; the gate undoes it.

The noise floor: this model's greedy answers hang on near ties. Rounding its fp32 file to the bf16 that is served
changes about one in ten of them before anything is learned, and a lesson's writes round stochastically. A guard
of exact answers can only measure what is reproducible, so the 200 are the first unrelated prompts that the served
weights, the fp32 file and two stochastic roundings of it answer alike; which those are is known before any
lesson, and none is trained or replayed on. See docs/decisions/replay-by-distribution.md.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_server import Running, running
from transformers import AutoModelForCausalLM

from secondnature.engines.generation import GenerationRequest
from secondnature.engines.local.engine import Engine
from secondnature.model.chat import encode_chat, read_tokenizer
from secondnature.records import Probe
from secondnature.wire import TrainRequest

REALDATA = os.environ.get("SECONDNATURE_REALDATA")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(REALDATA is None, reason="SECONDNATURE_REALDATA is not set: no real model here"),
]

QUESTION = "what is your favorite color?"
WANTED = "i love blue because it feels calm and peaceful."
CORRECTION = {"prompt": QUESTION, "completion": WANTED, "behaviour": "color"}
LOOPS = r"\bblue\b.*\bblue\b"
OTHER_WORDINGS = [
    "which color do you like most?",
    "what color do you like?",
    "tell me your favorite color.",
    "which color is your favorite?",
    "what color is your favorite?",
    "do you have a favorite color?",
]
TOPICS = [
    "cats",
    "dogs",
    "birds",
    "music",
    "books",
    "movies",
    "pizza",
    "apples",
    "rain",
    "snow",
    "summer",
    "winter",
    "coffee",
    "tea",
    "games",
    "trees",
    "flowers",
    "cars",
    "trains",
    "the ocean",
    "the mountains",
    "the city",
    "school",
    "work",
    "dancing",
    "singing",
    "painting",
    "cooking",
    "running",
    "swimming",
    "horses",
    "bread",
    "cheese",
    "stars",
    "the moon",
    "the sun",
    "gardens",
    "bikes",
    "boats",
    "cake",
]
UNRELATED = [
    "do you like {}?",
    "tell me about {}.",
    "what do you think about {}?",
    "i love {}.",
    "i am thinking of {} today.",
    "why are {} so nice?",
    "can we talk about {}?",
    "we saw {} yesterday.",
    "what is it about {}?",
]
REPLAYED = [
    "what about {}?",
    "do you enjoy {}?",
    "i saw {} today.",
    "let us speak about {}.",
    "{} make me happy.",
    "have you seen {}?",
    "my friend likes {}.",
    "how do you feel about {}?",
    "are {} good?",
    "do you know {}?",
    "i like {} a lot.",
    "what is good about {}?",
]
NUM_UNRELATED = 200


@pytest.fixture(scope="module")
def directory() -> Path:
    return Path(str(REALDATA)) / "models" / "craftgpt-chat"


@pytest.fixture(scope="module")
def server(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    with running(tmp_path_factory.mktemp("craftgpt"), directory) as started:
        yield started


def say_all(server: Running, prompts: list[str]) -> list[str]:
    """Greedy answers through the route, as long as the context allows."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda p: server_answer(server, p), prompts))


def server_answer(server: Running, prompt: str) -> str:
    """One greedy answer."""
    reply = server.client.chat([{"role": "user", "content": prompt}], temperature=0)
    return str(reply["choices"][0]["message"]["content"]).strip()


def answers_of_the_file(directory: Path, prompts: list[str], seed: int | None = None) -> list[str]:
    """Greedy answers of the fp32 file itself or, with a seed, of one stochastic rounding of it to bf16."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            bits = parameter.data.view(torch.int32)
            bits += torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32)
            bits &= -(1 << 16)
    tokenizer = read_tokenizer(directory)
    contexts = [encode_chat(tokenizer, [{"role": "user", "content": p}]) for p in prompts]
    engine = Engine(model.eval(), tokenizer)
    try:
        results = engine.generate(
            [GenerationRequest(c, max_tokens=64 - len(c), temperature=0.0) for c in contexts]
        )
    finally:
        engine.close()
    return [r.text.strip() for r in results]


@pytest.fixture(scope="module")
def unrelated(server: Running, directory: Path) -> dict[str, str]:
    """200 reproducible prompts and their answers, from a fixed shuffle of topics and wordings."""
    candidates = [wording.format(topic) for wording in UNRELATED for topic in TOPICS]
    random.Random(0).shuffle(candidates)
    served = say_all(server, candidates)
    rounding = answers_of_the_file(directory, candidates)
    same = {p: a for p, a, b in zip(candidates, served, rounding, strict=True) if a == b}
    share = len(same) / len(candidates)
    assert 0.8 < share < 1.0, f"{share:.3f} survive the rounding alone: is the noise floor still what it was?"
    for seed in (1, 2):
        again = answers_of_the_file(directory, list(same), seed)
        same = {p: a for (p, a), b in zip(same.items(), again, strict=True) if a == b}
    assert len(same) >= NUM_UNRELATED
    return dict(list(same.items())[:NUM_UNRELATED])


def request(unrelated: dict[str, str], **fields: Any) -> TrainRequest:
    """The correction, with 200 guards and the other wordings of the question as probes."""
    guards = [
        {"prompt": p, "behaviour": "unrelated", "check": {"matches": rf"\A\s*{re.escape(a)}\s*\Z"}}
        for p, a in unrelated.items()
    ]
    gains = [{"prompt": p, "behaviour": "color", "check": {"not_matches": LOOPS}} for p in OTHER_WORDINGS]
    given: dict[str, Any] = {
        "corrections": [CORRECTION],
        "probes": [Probe.model_validate(p).model_dump(exclude_none=True) for p in gains + guards],
        "gate": {
            "min_gain_probes": 6,
            "min_gain_seeds": 6,
            "guard_margin": 0.1,
            "min_guard_probes": NUM_UNRELATED,
        },
        "lesson": {"behaviour": "color"},
    }
    return TrainRequest.model_validate({**given, **fields})


def test_one_corrected_answer_is_given_and_the_unrelated_ones_stay(
    server: Running, unrelated: dict[str, str]
) -> None:
    before = server.state()
    assert re.search(LOOPS, server_answer(server, QUESTION))
    prompts = [wording.format(topic) for wording in REPLAYED for topic in TOPICS]
    own = [
        {"prompt": p, "completion": a} for p, a in zip(prompts, say_all(server, prompts), strict=True) if a
    ]
    lesson = server.lesson(
        TrainRequest.model_validate(
            {
                "corrections": [CORRECTION],
                "max_steps": 30,
                "learned_loss": 0.82,  # at 0.84 the last word hangs on the random bits of the rounding
                "optimizer": {"lr": 2e-6, "cooldown": 0.9},
                "replay": {"match": "distribution", "share": 0.96, "weight": 100, "examples": own},
            }
        )
    )
    assert lesson.state == "on_trial", lesson.reason
    after = say_all(server, list(unrelated))
    stayed = sum(a == b for a, b in zip(after, unrelated.values(), strict=True))
    assert server_answer(server, QUESTION) == WANTED
    assert stayed >= 0.95 * NUM_UNRELATED, stayed
    assert server.client.keep(lesson.id).state == "kept"
    assert server_answer(server, QUESTION) == WANTED
    assert server.state() != before
    server.client.revert(lesson.id)
    assert server.state() == before


def test_a_drilled_lesson_is_undone(server: Running, unrelated: dict[str, str]) -> None:
    before = server.state()
    lesson = server.lesson(
        request(unrelated, max_steps=12, replay={"share": 0}, optimizer={"lr": 3e-4}), "undone"
    )
    assert "unrelated" in (lesson.reason or "")
    assert server.state() == before
    assert say_all(server, list(unrelated)) == list(unrelated.values())
