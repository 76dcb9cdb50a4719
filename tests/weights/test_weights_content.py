"""Content ids: a tree over blocks, and the flat ids of the first homes."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import pytest
import torch

from secondnature.errors import WeightsError
from secondnature.weights import content
from secondnature.weights.content import (
    BLOCK_BYTES,
    ContentHasher,
    content_id,
    is_flat,
    root_id,
    tensor_digest,
)


def some_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "b.weight": torch.randn(3, 1, 4).to(torch.bfloat16),
        "a.weight": torch.randn(7, 5).to(torch.bfloat16),
        "c": torch.randn(11),
        "empty": torch.zeros(0, 3, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.0),
        "wide": torch.randn(BLOCK_BYTES // 4 + 5),
    }


def id_of_the_first_homes(tensors: dict[str, torch.Tensor]) -> str:
    """As version 0.1 computed it."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        hasher.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        hasher.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return "w" + hasher.hexdigest()[:16]


def test_an_id_is_the_tree_that_the_note_describes() -> None:
    """An independent reading of docs/decisions/content-ids-as-a-tree.md."""
    weights = some_weights()
    root = hashlib.sha256(b"weights\n")
    for name, tensor in sorted(weights.items()):
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        dtype = {torch.bfloat16: "bfloat16", torch.float32: "float32"}[tensor.dtype]
        shape = ",".join(str(n) for n in tensor.shape)
        digest = hashlib.sha256(f'tensor\n["{name}","{dtype}",[{shape}],4194304]\n'.encode())
        for start in range(0, len(data), 4194304):
            digest.update(hashlib.sha256(data[start : start + 4194304]).digest())
        root.update(digest.digest())
    assert content_id(weights) == "w2-" + root.hexdigest()[:16]


def test_it_sees_every_byte_name_shape_and_dtype() -> None:
    weights = some_weights()
    changed = []
    for index in (0, BLOCK_BYTES // 4, -1):
        flipped = {**weights, "wide": weights["wide"].clone()}
        flipped["wide"].view(torch.int32)[index] ^= 1
        changed.append(flipped)
    zero = {**weights, "c": torch.zeros(11)}
    changed += [
        zero,
        {**weights, "c": -torch.zeros(11)},
        {**weights, "c": weights["c"].reshape(11, 1)},
        {**weights, "c": weights["c"].view(torch.int32)},
        {("d" if n == "c" else n): t for n, t in weights.items()},
        {**weights, "empty": torch.zeros(3, 0, dtype=torch.bfloat16)},
        {n: t for n, t in weights.items() if n != "empty"},
    ]
    for like in (None, "w" + "0" * 16):
        assert len({content_id(w, like) for w in [weights, *changed]}) == 1 + len(changed)


def test_tensors_may_come_in_any_order_and_a_part_has_a_digest_of_its_own() -> None:
    weights = some_weights()
    wanted = content_id(weights)
    hasher = ContentHasher()
    for name, tensor in reversed(list(weights.items())):
        hasher.add(name, tensor)
    assert hasher.id() == wanted
    digests = {name: tensor_digest(name, tensor) for name, tensor in weights.items()}
    assert digests == hasher.digests
    assert root_id(digests) == wanted
    weights["c"] = weights["c"] + 1
    assert root_id({**digests, "c": tensor_digest("c", weights["c"])}) == content_id(weights) != wanted
    with pytest.raises(WeightsError, match="tensor c came twice"):
        hasher.add("c", weights["c"])


def test_ids_of_the_first_homes_are_still_computed() -> None:
    weights = some_weights()
    old = id_of_the_first_homes(weights)
    assert content_id(weights, like=old) == old
    assert content_id(sorted(weights.items()), like=old) == old
    assert content_id(weights, like=content_id(weights)) == content_id(weights) != old
    hasher = ContentHasher(like=old)
    hasher.add("b.weight", weights["b.weight"])
    with pytest.raises(WeightsError, match=r"a\.weight came after b\.weight"):
        hasher.add("a.weight", weights["a.weight"])


def test_strange_ids_are_refused_and_strided_tensors_are_read_as_they_look() -> None:
    assert is_flat("w0123456789abcdef")
    assert not is_flat("w2-0123456789abcdef")
    for strange in ("w3-0123456789abcdef", "w0123456789abcdef+0007.3", "o0123456789abcdef", ""):
        with pytest.raises(WeightsError, match="no content id"):
            content_id({}, like=strange)
    table = torch.arange(12.0).reshape(3, 4)
    assert content_id({"t": table.t()}) == content_id({"t": table.t().contiguous()})


def test_several_threads_give_the_same_ids_and_the_same_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weights = {
        "a": torch.randn(3 * BLOCK_BYTES // 4 + 17),
        "b": torch.randn(5 * BLOCK_BYTES // 4),
        "c": torch.ones(2),
    }
    hashed_by: set[int] = set()
    sha256 = content._sha256

    def noted(part: Any) -> bytes:
        hashed_by.add(threading.get_ident())
        return sha256(part)

    monkeypatch.setattr(content, "_sha256", noted)
    monkeypatch.setattr(content, "MAX_THREADS", 1)
    alone = content_id(weights)
    assert hashed_by == {threading.get_ident()}
    monkeypatch.setattr(content, "MAX_THREADS", 4)
    hasher = ContentHasher()
    for name, tensor in weights.items():
        passed = list(hasher.passing(name, tensor))
        assert b"".join(part.tobytes() for part in passed) == tensor.numpy().tobytes()
    assert hasher.id() == alone
    assert len(hashed_by) > 1
