"""Before it serves, the local engine does with a model what it will do with it, and compares (server process).

Two rows of different length in one forward; a prompt read in two pieces; rows that join and go on together; a
window that is crossed. Every logit on the way is compared with a plain run of that row's whole text, without a
cache. Windows are narrowed for the time of the check, so that a short text crosses them: the masks are the same
code at any width. Each forward reads all weights, which for a large model takes seconds: there are eight.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

from secondnature.engines.local.rows import BatchRows
from secondnature.errors import BadCheckpoint, UnsupportedModel
from secondnature.model.limits import context_limit

__all__ = ["self_test"]

_LONG, _SHORT, _PIECE, _STEPS = 70, 23, 41, 3
"""Tokens of the two prompts, of the long one's first piece, and of the answers."""
_WINDOW = 16
_WINDOWS = ("sliding_window", "attention_chunk_size")


@torch.no_grad()
def self_test(model: nn.Module) -> float:
    """Compare rows that are served together with plain runs of each; returns the largest difference of logits.

    Raises:
        BadCheckpoint: a weight is NaN or infinite; names its tensor.
        UnsupportedModel: the difference exceeds 1e-3 of the logits' scale (0.1 in bf16), or a layer keeps a state
            that cannot be batched.
    """
    config: Any = model.config
    num_ids: int = config.get_text_config(decoder=True).vocab_size
    limit = context_limit(config)
    long = min(_LONG, limit - _STEPS)
    if long < 2:
        raise UnsupportedModel(f"the model reads only {limit} tokens", f"expected {_STEPS + 2} or more")
    texts = [
        [(7 * i + i * i // 3) % num_ids for i in range(long + _STEPS)],
        [(11 * i + i * i // 5 + 3) % num_ids for i in range(min(_SHORT, long - 1) + _STEPS)],
    ]
    with _narrow_windows(config):
        *together, in_pieces = _served(model, texts)
        plain = [_plain(model, text) for text in texts]
    if not all(bool(torch.isfinite(logits).all()) for logits in (*together, in_pieces, *plain)):
        raise _not_finite(model)
    scale = max(1.0, *(float(p.abs().max()) for p in plain))
    tolerance = (0.1 if plain[0].dtype in (torch.bfloat16, torch.float16) else 1e-3) * scale
    worst = 0.0
    for how, rows, so in (
        ("together", together, "an answer would depend on who else asks"),
        ("in two pieces", [in_pieces], "what is read on from a state would be another text"),
    ):
        difference = max(float((r - p[-len(r) :]).abs().max()) for r, p in zip(rows, plain, strict=False))
        if not difference <= tolerance:
            raise UnsupportedModel(
                f"rows that are read {how} have logits that differ by {difference:.2g} from those of each alone; "
                f"expected at most {tolerance:.2g}",
                f"{so}: this architecture cannot be served yet",
            )
        worst = max(worst, difference)
    return worst


def _served(model: nn.Module, texts: list[list[int]]) -> list[Tensor]:
    """The engine's logits of the last `_STEPS` + 1 tokens: of each text, and of the first read in two pieces."""
    prompts = [text[:-_STEPS] for text in texts]
    joining, in_pieces, batch = BatchRows(model), BatchRows(model), BatchRows(model)
    logits = joining.prefill(prompts, 1)
    cut = min(_PIECE, len(prompts[0]) - 1)
    in_pieces.prefill([prompts[0][:cut]], 1)
    first = [*logits, in_pieces.prefill([prompts[0][cut:]], 1)[0]]
    batch.append(joining, range(len(prompts)))
    batch.append(in_pieces, [0])
    rows, found = [*texts, texts[0]], [[f[-1]] for f in first]
    for step in range(_STEPS):
        logits = batch.step([text[len(text) - _STEPS + step] for text in rows])
        for row, of_row in enumerate(found):
            of_row.append(logits[row])
    return [torch.stack(of_row) for of_row in found]


def _plain(model: Any, text: list[int]) -> Tensor:
    """The logits of the last `_STEPS` + 1 positions, in one forward without a cache."""
    ids = torch.tensor([text], device=next(model.parameters()).device)
    places = torch.arange(len(text), device=ids.device)[None]
    return model(input_ids=ids, position_ids=places, use_cache=False).logits[0, -_STEPS - 1 :]


@contextlib.contextmanager
def _narrow_windows(config: Any) -> Generator[None]:
    """While open, layers with a window see `_WINDOW` tokens: the short text crosses it."""
    text = config.get_text_config(decoder=True)
    before: dict[str, int] = {}
    for name in _WINDOWS:
        width = getattr(text, name, None)
        if isinstance(width, int) and width > _WINDOW:
            before[name] = width
            setattr(text, name, _WINDOW)
    try:
        yield
    finally:
        for name, width in before.items():
            setattr(text, name, width)


def _not_finite(model: nn.Module) -> BadCheckpoint | UnsupportedModel:
    """Whose fault it is that a logit is no number."""
    for name, parameter in model.named_parameters():
        if not math.isfinite(float(parameter.float().sum())) and not bool(torch.isfinite(parameter).all()):
            return BadCheckpoint(
                f"tensor {name} holds NaN or infinite values",
                "get the checkpoint again; was it cut or converted?",
            )
    return UnsupportedModel(
        "the model computes NaN or infinite logits from finite weights",
        "this architecture cannot be served yet",
    )
