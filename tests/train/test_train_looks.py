"""Looks at development probes: as the whole logits have it, with memory that does not grow with the vocabulary."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB_SIZE, gpt2_config, hybrid_config, in_arena, save_tiny
from torch import nn

from secondnature import wire
from secondnature.model import head
from secondnature.model.head import find_head, token_ranks
from secondnature.train import looks
from secondnature.train.looks import look_at

CONFIGS = {"hybrid": hybrid_config, "gpt2": gpt2_config}


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(2, VOCAB_SIZE), k=count)


def plain(model: nn.Module, context: list[int], answer: list[int]) -> tuple[float, bool]:
    """(log p(answer | context), whether it is the greedy answer), from one run over the whole text."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + answer]), use_cache=False).logits[0]
    logps = torch.log_softmax(logits[len(context) - 1 : -1].float(), dim=-1)
    ids = torch.tensor(answer)
    return float(logps.gather(1, ids.unsqueeze(1)).sum()), bool((logps.argmax(dim=1) == ids).all())


def greedy(model: nn.Module, context: list[int], count: int) -> list[int]:
    ids = list(context)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(context) :]


@pytest.mark.parametrize("whole", [False, True], ids=["sliced", "whole"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_margins_and_greedy_answers_are_those_of_the_whole_logits(
    kind: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several lengths, on contexts of which some are alike; half of the wanted answers are the greedy ones."""
    _, model = in_arena(save_tiny(CONFIGS[kind](), tmp_path))
    monkeypatch.setattr(head, "MAX_LOGITS", 60)  # many slices
    monkeypatch.setattr(token_ranks, "__kwdefaults__", {"max_logits": 60})
    if whole:  # as of a model whose logits are scaled or capped
        monkeypatch.setattr(looks, "find_head", lambda _: None)
        monkeypatch.setattr("secondnature.train.prefix.find_head", lambda _: None)
        monkeypatch.setattr(looks, "MAX_WHOLE_LOGITS", 10 * VOCAB_SIZE)
    given: list[wire.DevelopmentProbe] = []
    for i in range(9):
        context = tokens(5 + 7 * (i // 2), i // 2)
        wanted = greedy(model, context, 1 + i % 4) if i % 2 else tokens(2 + i % 4, 40 + i)
        given.append(wire.DevelopmentProbe(context, wanted, tokens(1 + i % 5, 80 + i), "right"))
    heard: list[int] = []
    seen = look_at(model, given, heard.append)
    for look, found in zip(given, seen, strict=True):
        (yes, likeliest), (no, _) = (plain(model, look.context, a) for a in (look.wanted, look.unwanted))
        assert found.margin == pytest.approx(yes - no, abs=1e-4)
        assert found.greedy == likeliest
    assert [x.greedy for x in seen].count(True) >= 4
    assert heard == sorted(set(heard))
    assert heard[-1] == len(given)
    assert len(heard) >= (1 if kind == "gpt2" else 5)  # attention alone: contexts share forwards
    assert look_at(model, []) == []


def test_of_equally_likely_tokens_the_first_is_the_greedy_one(tmp_path: Path) -> None:
    arena, model = in_arena(save_tiny(CONFIGS["hybrid"](tie_word_embeddings=False), tmp_path))
    arena.tensors["lm_head.weight"].zero_()
    found = find_head(model)
    assert found is not None
    hidden = torch.randn(3, 48)
    logps, likeliest = token_ranks(found, hidden, torch.tensor([0, 1, 96]), max_logits=60)
    assert likeliest.tolist() == [True, False, False]
    assert logps.tolist() == pytest.approx([-torch.tensor(float(VOCAB_SIZE)).log().item()] * 3)


MEASURED = """
import resource, sys
from pathlib import Path
import torch
from tiny_models import dense_config, in_arena, save_tiny
from secondnature import wire
from secondnature.train.looks import look_at
torch.set_num_threads(1)
config = dense_config(vocab_size=151_936, num_hidden_layers=1)
model = in_arena(save_tiny(config, Path(sys.argv[1])))[1]
context, wanted, unwanted = list(range(10, 210)), list(range(300, 320)), list(range(400, 420))
looks = [wire.DevelopmentProbe([i, *context], wanted, [*unwanted[i % 20 :], 5], "right") for i in range(48)]
look_at(model, looks[:1])  # what the first use takes
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
seen = look_at(model, looks)
print(peak() - before)
with torch.no_grad():
    for look, found in list(zip(looks, seen))[::16]:
        margins = []
        for answer in (look.wanted, look.unwanted):
            logits = model(input_ids=torch.tensor([look.context + answer]), use_cache=False).logits[0]
            logps = torch.log_softmax(logits[len(look.context) - 1 : -1], dim=-1)
            margins.append(float(logps.gather(1, torch.tensor(answer).unsqueeze(1)).sum()))
            if answer is look.wanted:
                assert found.greedy == bool((logps.argmax(dim=1) == torch.tensor(answer)).all())
        assert abs(found.margin - margins[0] + margins[1]) < 1e-4, (found, margins)
print("as before")
"""


def test_the_memory_of_a_look_does_not_grow_with_probes_times_vocabulary(tmp_path: Path) -> None:
    """48 probes, 40 scored positions each, a vocabulary of 151,936: logits of 1.2 GB, and as much again."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    grown, said = done.stdout.split("\n", 1)
    assert said.strip() == "as before"
    assert int(grown) < 0.3e9, int(grown)
