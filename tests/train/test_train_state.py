"""The optimizer's state on disk: the format's own bytes, no second copy in memory, durable or not at all."""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from tiny_models import dense_config, in_arena, save_tiny

from secondnature.errors import BadCheckpoint, Cancelled, StorageError
from secondnature.records import Example, OptimizerSettings
from secondnature.train.apollo import Apollo
from secondnature.train.state import load_optimizer, save_optimizer
from secondnature.train.step import train_step


@pytest.fixture
def optimizer(tmp_path: Path) -> Apollo:
    """After one step; with rows of an embedding, and names beyond ASCII nowhere."""
    model = in_arena(save_tiny(dense_config(), tmp_path / "model"))[1]
    made = Apollo(model, OptimizerSettings(lr=1e-3, rank=8))
    train_step(model, made, [Example(context_ids=[5, 6, 7], continuation_ids=[8, 9])])
    return made


def test_the_file_is_what_safetensors_itself_would_write_and_is_named_by_its_bytes(
    optimizer: Apollo, tmp_path: Path
) -> None:
    path = tmp_path / "optimizer.safetensors"
    heard: list[int] = []
    sha256 = save_optimizer(optimizer, path, heard.append)
    tensors, metadata = optimizer.state_dict()
    data = path.read_bytes()
    expected = save({name: t.contiguous() for name, t in tensors.items()}, metadata=metadata)
    # the metadata's own order is not fixed: the tensors and their places are
    length = int.from_bytes(data[:8], "little")
    assert data[8 + length :] == expected[8 + int.from_bytes(expected[:8], "little") :]
    assert len(data) == len(expected)
    assert sha256 == hashlib.sha256(data).hexdigest()
    assert heard == list(range(len(tensors)))
    assert path.stat().st_mode & 0o777 == 0o600
    other = Apollo(in_arena(tmp_path / "model")[1], optimizer.settings)
    load_optimizer(other, path)
    again, metadata_again = other.state_dict()
    assert metadata_again == metadata
    assert all(torch.equal(t, again[name]) for name, t in tensors.items())


def test_what_ends_the_writing_leaves_the_old_file(optimizer: Apollo, tmp_path: Path) -> None:
    path = tmp_path / "optimizer.safetensors"
    path.write_bytes(b"old")

    def each(num_done: int) -> None:
        if num_done == 3:
            raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        save_optimizer(optimizer, path, each)
    with pytest.raises(StorageError):
        save_optimizer(optimizer, tmp_path / "nowhere" / "optimizer.safetensors")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))  # a full disk
    try:
        with pytest.raises(StorageError):
            save_optimizer(optimizer, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "optimizer.safetensors"]


def test_a_broken_file_is_refused_and_a_cancel_ends_the_reading(optimizer: Apollo, tmp_path: Path) -> None:
    path = tmp_path / "optimizer.safetensors"
    save_optimizer(optimizer, path)
    before = optimizer.state_dict()

    def each(num_done: int) -> None:
        if num_done == 3:
            raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        load_optimizer(optimizer, path, each)
    path.write_bytes(path.read_bytes()[:-9])
    for broken in (path, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadCheckpoint):
            load_optimizer(optimizer, broken)
    after = optimizer.state_dict()
    assert after[1] == before[1]
    assert all(torch.equal(t, after[0][name]) for name, t in before[0].items())


MEASURED = """
import sys
from pathlib import Path
import torch
from torch import nn
from secondnature.records import OptimizerSettings
from secondnature.train.apollo import Apollo
from secondnature.train.state import load_optimizer, save_optimizer
torch.set_num_threads(1)
model = nn.Module()
model.wide = nn.Parameter(torch.zeros(64, 64))
for i in range(4):  # Adam's own moments: 8 bytes for each element
    setattr(model, f"long{i}", nn.Parameter(torch.zeros(4_000_000)))
optimizer = Apollo(model, OptimizerSettings(lr=1e-3, rank=8), track=False)
optimizer.step({name: torch.ones_like(p) for name, p in model.named_parameters()})
path = Path(sys.argv[1]) / "optimizer.safetensors"

def private() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

before, most = private(), 0
def each(num_done: int) -> None:
    global most
    most = max(most, private() - before)
save_optimizer(optimizer, path, each)
most = max(most, private() - before)
print(path.stat().st_size, most)
other = Apollo(model, OptimizerSettings(lr=1e-3, rank=8), track=False)
before, most = private(), 0
load_optimizer(other, path, each)
print(private() - before, most)
"""


def test_no_second_copy_is_made(tmp_path: Path) -> None:
    """A state of 128 MB; written in memory first it would take as much again, read into memory first too."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    (size, writing), (read, reading) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert size > 128e6
    assert writing < 20e6
    assert reading < 20e6  # while the tensors are looked up
    assert read < 1.1 * size  # and then the state itself
