"""Answers to different contexts in one forward equal one context at a time, where all layers are attention.
A recurrent model reads one at a time.
Reference: the same step with every context on its own, whose gradients `test_train_exact` compares with fp64.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny_models import (
    VOCAB_SIZE,
    dense_config,
    gpt2_config,
    hybrid_config,
    in_arena,
    llama_config,
    save_tiny,
)
from torch import Tensor, nn
from transformers import GemmaConfig, MistralConfig

from secondnature.model.gradients import dense
from secondnature.model.upcast import collect
from secondnature.train import forest
from secondnature.train.forest import forwards
from secondnature.train.losses import sequence_logprob
from secondnature.train.prefix import continuation_logps, freeze, side_by_side

MAKERS = {
    "dense": dense_config,
    "gpt2": gpt2_config,
    "llama": lambda: llama_config(attention_bias=True),
    "windows": lambda: MistralConfig(**SIZES, sliding_window=8),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=16),
}
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=count)


def batch() -> tuple[list[list[int]], list[list[list[int]]]]:
    """Contexts of one token, of two lengths after a shared beginning of 40, twice the same, and a stranger."""
    start = tokens(40, 1)
    contexts = [[5], start + tokens(9, 2), start + tokens(4, 3), start + tokens(9, 2), tokens(21, 4), [6]]
    lengths = [(3, 5), (8, 1), (2, 12), (4, 4), (1, 7), (6, 6)]
    return contexts, [[tokens(n, 10 + n) for n in pair] for pair in lengths]


def gradients_of(model: nn.Module) -> tuple[list[float], dict[str, Tensor], int]:
    """Log-probabilities of all answers, the gradient of their weighted sum, and how many forwards it took."""
    contexts, answers = batch()
    found: dict[int, list[float]] = {}
    count = 0
    with collect(model, factored=frozenset()) as gradients:
        for prefixes, chosen in forwards(model, contexts, answers):
            count += 1
            rows = [p for p, i in zip(prefixes, chosen, strict=True) for _ in answers[i]]
            scored = iter(continuation_logps(model, rows, [a for i in chosen for a in answers[i]]))
            totals = {i: [sequence_logprob(next(scored)) for _ in answers[i]] for i in chosen}
            torch.stack([(i + 1) * (a - 2 * b) for i, (a, b) in totals.items()]).sum().backward()
            found |= {i: [float(x.detach()) for x in pair] for i, pair in totals.items()}
    logps = [x for i in sorted(found) for x in found[i]]
    return logps, {name: dense(g) for name, g in gradients.items()}, count


@pytest.fixture(params=list(MAKERS))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> nn.Module:
    return in_arena(save_tiny(MAKERS[request.param](), tmp_path))[1]


def test_contexts_side_by_side_equal_one_at_a_time(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities to 2e-4 nats of whole answers, gradients to 1e-4 of each tensor's largest, in fp32."""
    together, gradient, count = gradients_of(model)
    monkeypatch.setattr(forest, "side_by_side", lambda model: False)
    alone, expected, one_by_one = gradients_of(model)
    assert (count, one_by_one) == (1, 5), "the same context twice is one"
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=0, atol=2e-4)
    assert gradient.keys() == expected.keys()
    for name, found in gradient.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-4 * scale, msg=name)


def test_what_stands_beside_does_not_matter(model: nn.Module) -> None:
    """A neighbour of another length, or other tokens in it, changes an answer by rounding only."""
    answer = tokens(6, 9)
    mine = freeze(model, tokens(11, 1))
    with torch.no_grad():
        found = [
            continuation_logps(model, [mine, freeze(model, tokens(n, seed))], [answer, tokens(4, 3)])[0]
            for n, seed in ((1, 2), (11, 3), (11, 4), (60, 5))
        ]
        (alone,) = continuation_logps(model, mine, [answer])
    for one in found:
        torch.testing.assert_close(one, alone, rtol=0, atol=3e-5)


def test_a_recurrent_model_reads_one_context_at_a_time(tmp_path: Path) -> None:
    """Its state would run over the padding."""
    _, hybrid = in_arena(save_tiny(hybrid_config(), tmp_path))
    assert not side_by_side(hybrid)
    contexts, answers = batch()
    seen: list[int] = []
    for prefixes, chosen in forwards(hybrid, contexts, answers):
        assert len({id(p) for p in prefixes}) == 1
        seen += chosen
    assert sorted(seen) == list(range(len(contexts)))


def test_a_model_that_ignores_padding_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its config says: the model itself is asked."""
    _, deaf = in_arena(save_tiny(dense_config(), tmp_path))
    body = deaf.get_submodule("model")
    forward = body.forward

    def without_mask(*args: object, **kwargs: object) -> object:
        kwargs.pop("attention_mask", None)
        return forward(*args, **kwargs)

    monkeypatch.setattr(body, "forward", without_mask)
    assert not side_by_side(deaf)
    monkeypatch.undo()
    _, hearing = in_arena(save_tiny(dense_config(), tmp_path))
    assert side_by_side(hearing)
