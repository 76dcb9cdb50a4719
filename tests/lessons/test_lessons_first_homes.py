"""A home of the first kind (flat content ids, deltas of format 1) opens, is taught, and goes back to its base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from safetensors.numpy import save
from tiny_server import running, teach

from secondnature.errors import BadDelta
from secondnature.model.load import fingerprint
from secondnature.records import utc_now
from secondnature.weights import checkpoint

Tensors = dict[str, torch.Tensor]


def flat_id(tensors: Tensors) -> str:
    """As version 0.1 named weights."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(f"{name}\0{tensors[name].dtype}\0{tuple(tensors[name].shape)}\0".encode())
        hasher.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return "w" + hasher.hexdigest()[:16]


def first_home(home: Path, model: Path) -> tuple[str, str]:
    """What version 0.1 left after one kept lesson; the versions before and after it."""
    before = checkpoint.read(model)
    after = {n: t.clone() for n, t in before.items()}
    after["model.norm.weight"] += 0.25
    base, result = flat_id(before), flat_id(after)
    xor = np.bitwise_xor(*(w["model.norm.weight"].view(torch.uint8).numpy() for w in (before, after)))
    packed = zstandard.ZstdCompressor(level=3).compress(xor.reshape(-1, 2).T.tobytes())
    metadata = {"format": "secondnature-delta/1", "base": base, "result": result}
    metadata["bytes:model.norm.weight"] = str(xor.size)
    data = save({"model.norm.weight": np.frombuffer(packed, np.uint8)}, metadata=metadata)
    lesson = home / "lessons" / "0001-use"
    lesson.mkdir(parents=True)
    (lesson / "delta.safetensors").write_bytes(data)
    entry = {"schema_version": 1, "id": "0001-use", "number": 1, "job": "job-0123456789ab", "kind": "train"}
    now = utc_now().isoformat()
    entry |= {"state": "kept", "parent": base, "version": result, "created_at": now, "ended_at": now}
    entry |= {"delta_sha256": hashlib.sha256(data).hexdigest()}
    (lesson / "lesson.json").write_text(json.dumps(entry))
    bound = {"model": str(model), "fingerprint": fingerprint(model), "base_version": base, "engine": "local"}
    (home / "home.json").write_text(json.dumps(bound))
    return base, result


def test_it_opens_is_taught_and_goes_back_to_its_base(tmp_path: Path, talker: Path) -> None:
    base, result = first_home(tmp_path, talker)
    with running(tmp_path, talker) as server:
        assert server.client.health().weights_version == result
        assert flat_id(server.parts.arena.tensors) == result
        lesson = server.lesson(teach(["jam"], keep=True, max_steps=1))
        assert (lesson.state, lesson.parent) == ("kept", result)
        assert lesson.version == server.weights
        assert str(lesson.version).startswith("w2-")
        assert server.client.checkpoint().weights_version == lesson.version
    with running(
        tmp_path, talker
    ) as server:  # from the checkpoint; the undo crosses from new ids to old ones
        assert server.client.health().weights_version == lesson.version
        undone = server.lesson(teach(["hats"], max_steps=1))
        server.client.revert(undone.id)
        for taken, left in ((lesson.id, result), ("0001", base)):
            server.client.revert(taken)
            assert server.client.health().weights_version == left == flat_id(server.parts.arena.tensors)
        assert server.client.health().status == "ok"
        assert server.client.checkpoint().weights_version == base
    with running(tmp_path, talker) as server:
        assert server.client.health().weights_version == base


def test_its_weights_are_still_checked(tmp_path: Path, talker: Path) -> None:
    first_home(tmp_path, talker)
    path = tmp_path / "lessons" / "0001-use" / "lesson.json"
    entry = json.loads(path.read_text())
    for change in ({"version": "w" + "0" * 16}, {"parent": "w" + "0" * 16}):
        path.write_text(json.dumps(entry | change))
        with pytest.raises(BadDelta, match="lesson 0001-use"), running(tmp_path, talker):
            pass
