"""Which model this is, said so that another server can tell whether it has the same one (server).

A lesson belongs to the weights, the names and shapes of the tensors, the tokens and the chat template that it was
taught with. What files call themselves, and how they are written, is no part of it: a model has the same identity
as a directory, in a working copy and made of a .gguf file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from secondnature.errors import BadCheckpoint, Conflict
from secondnature.lessons.log import Log
from secondnature.model.chat import read_tokenizer
from secondnature.model.load import fingerprint
from secondnature.records import ModelIdentity
from secondnature.weights import checkpoint
from secondnature.weights.content import content_id, is_flat

__all__ = ["check_same", "identity_of", "model_directory"]

_TOKENS = ("added_tokens", "normalizer", "pre_tokenizer", "model")
"""Of tokenizer.json: what decides which ids a text has."""


def model_directory(log: Log) -> Path:
    """The model's own directory; where that is gone, the working copy."""
    return log.base_dir if (log.base_dir / "config.json").is_file() else log.checkpoint_state()[0]


def identity_of(log: Log, tensors: Mapping[str, torch.Tensor], like: str | None = None) -> ModelIdentity:
    """The identity of the model that is served.

    Args:
        tensors: as they lie in the arena; only names, dtypes and shapes are read.
        like: a content id; the base's is told in its kind, for which it may have to be read. None: the newest kind.

    Raises:
        BadCheckpoint: the model's files are gone or broken.
    """
    directory = model_directory(log)
    base = log.base_version
    if is_flat(base) != (like is not None and is_flat(like)):
        base = content_id(checkpoint.stream(log.base_dir, log.dtypes), like=like)
    template = read_tokenizer(directory).chat_template
    return ModelIdentity(
        architecture=fingerprint(directory),
        base_version=base,
        tokenizer_sha256=_sha256(_tokens(directory / "tokenizer.json")),
        template_sha256=_sha256(template),
        tensors={
            name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in sorted(tensors.items())
        },
    )


def _tokens(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {key: found.get(key) for key in _TOKENS}
    except (OSError, ValueError, AttributeError, RecursionError) as e:
        raise BadCheckpoint(f"{path}: {e}", "get the model's tokenizer again") from None


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_same(theirs: ModelIdentity, mine: ModelIdentity, name: str) -> None:
    """Whether a lesson of their model may be added to mine; `name`: what they call theirs.

    Raises:
        Conflict: it is another model; says by what.
    """
    differ = _first_difference(theirs, mine)
    if differ is not None:
        raise Conflict(
            f"the lesson is of another model ({name[:80]}): {differ}; nothing was written",
            "a lesson file goes with the weights, tokens and template it was taught with: teach it here",
        )


def _first_difference(theirs: ModelIdentity, mine: ModelIdentity) -> str | None:
    for tensor in sorted(theirs.tensors.keys() | mine.tensors.keys()):
        one, other = theirs.tensors.get(tensor), mine.tensors.get(tensor)
        if one != other:
            said = ["none" if x is None else f"{x[0][:20]} {x[1][:6]}" for x in (one, other)]
            return f"tensor {tensor[:120]} is {said[0]} there and {said[1]} here"
    if theirs.architecture != mine.architecture:
        return f"its architecture is {theirs.architecture[:19]}; this one's is {mine.architecture[:19]}"
    if theirs.base_version != mine.base_version:
        return f"its weights are {theirs.base_version[:19]}, before any lesson; these are {mine.base_version}"
    if theirs.tokenizer_sha256 != mine.tokenizer_sha256:
        return "its tokens are others"
    if theirs.template_sha256 != mine.template_sha256:
        return "its chat template is another"
    return None
