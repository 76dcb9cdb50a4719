"""Checkpoints: whole, swapped in at once, read and written one tensor at a time; strangers' files stay."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import hybrid_config, save_tiny
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3_5Config

from secondnature.errors import BadCheckpoint, WeightsError
from secondnature.weights import checkpoint
from secondnature.weights.arena import Arena
from secondnature.weights.content import BLOCK_BYTES, content_id


def a_model(directory: Path, seed: int) -> dict[str, torch.Tensor]:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return checkpoint.read(directory)


def test_checkpoint_is_whole_and_swapped_in(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "model"
    one = a_model(source, 0)
    two = {n: t + 1 for n, t in one.items()}
    assert all(t.dtype == torch.bfloat16 for t in one.values())
    first = checkpoint.save(root, source, one, {"version": "w1"})
    assert checkpoint.current(root) == first
    second = checkpoint.save(root, source, two, {"version": "w2", "lesson": 3})
    assert checkpoint.current(root) == second
    assert not first.exists()
    assert checkpoint.state(second) == {"version": "w2", "lesson": 3}
    assert content_id(checkpoint.read(second)) == content_id(two)
    loaded = AutoModelForCausalLM.from_pretrained(second)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, two["lm_head.weight"])
    again = checkpoint.save(root, source, two, {"version": "w2"})
    assert checkpoint.current(root) == again != second


def test_checkpoint_on_a_disk_that_refuses_leaves_the_old_one(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "model"
    weights = a_model(source, 0)
    first = checkpoint.save(root, source, weights, {"version": "w1"})
    code = f"""
import resource, signal
from pathlib import Path
from secondnature.errors import StorageError
from secondnature.weights import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
source, root = Path({str(source)!r}), Path({str(root)!r})
weights = checkpoint.read(source)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    checkpoint.save(root, source, weights, {{"version": "w2"}})
except StorageError as e:
    print("refused:", e)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.startswith("refused:")
    assert checkpoint.current(root) == first
    assert content_id(checkpoint.read(first)) == content_id(weights)
    assert [p.name for p in root.iterdir() if p.name.endswith(".tmp")] == []


def test_read_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        checkpoint.read(tmp_path)
    a_model(tmp_path, 0)
    (tmp_path / "model.safetensors").write_bytes(os.urandom(100))
    with pytest.raises(BadCheckpoint):
        checkpoint.read(tmp_path)


def test_the_text_of_a_model_that_also_sees_is_read_and_the_rest_is_kept(tmp_path: Path) -> None:
    """As Qwen3.5 is published: the text model within another, a vision tower and a draft head beside it."""
    text = save_tiny(hybrid_config(tie_word_embeddings=True), tmp_path / "text")
    weights = checkpoint.read(text)
    source = tmp_path / "published"
    Qwen3_5Config(
        text_config=hybrid_config(tie_word_embeddings=True).to_dict(),
        architectures=["Qwen3_5ForConditionalGeneration"],
        tie_word_embeddings=True,
    ).save_pretrained(source)
    beside = {"model.visual.patch_embed.proj.bias": torch.arange(4.0), "mtp.norm.weight": torch.ones(3)}
    stored = {f"model.language_model.{n.removeprefix('model.')}": t for n, t in weights.items()}
    save_file({**stored, **beside}, source / "model.safetensors", metadata={"format": "pt"})
    read = checkpoint.read(source)
    assert content_id(read) == content_id(weights)
    changed = {name: tensor + 1 for name, tensor in read.items()}
    saved = checkpoint.save(tmp_path / "model", source, changed, {"version": "w1"})
    assert content_id(checkpoint.read(saved)) == content_id(changed)
    found = load_file(saved / "model.safetensors")
    assert set(found) == set(stored) | set(beside)
    assert all(torch.equal(found[name], tensor) for name, tensor in beside.items())


def test_a_checkpoint_keeps_the_dtypes_that_its_engine_has(tmp_path: Path) -> None:
    """vLLM holds the decay of a GatedDeltaNet in float32; what was trained there must not be rounded."""
    source = save_tiny(hybrid_config(), tmp_path / "source")
    name = "model.layers.0.linear_attn.A_log"
    weights = checkpoint.read(source, {name: torch.float32})
    assert weights[name].dtype == torch.float32
    weights[name] = weights[name] + 2.0**-20
    saved = checkpoint.save(tmp_path / "model", source, weights, {"version": "w1"})
    assert content_id(checkpoint.read(saved, {name: torch.float32})) == content_id(weights)
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"


def test_weights_are_read_in_the_order_of_names_each_in_memory_of_its_own(tmp_path: Path) -> None:
    weights = a_model(tmp_path, 0)
    names = []
    for name, tensor in checkpoint.stream(tmp_path):
        names.append(name)
        assert torch.equal(tensor, weights[name])
        tensor.zero_()
    assert names == sorted(weights)
    assert content_id(checkpoint.read(tmp_path)) == content_id(weights)
    specs = checkpoint.specs(tmp_path, {"lm_head.weight": torch.float32})
    assert list(specs) == names
    assert specs["lm_head.weight"].dtype == torch.float32
    arena = Arena.reserve(checkpoint.specs(tmp_path))
    for name, tensor in checkpoint.stream(tmp_path):
        arena.fill(name, tensor)
    assert content_id(arena.tensors) == content_id(weights)
    with pytest.raises(WeightsError, match=r"tensor lm_head\.weight does not fit"):
        arena.fill("lm_head.weight", torch.zeros(1))


def test_values_are_converted_block_by_block_as_the_library_converts_them(tmp_path: Path) -> None:
    """float32 on disk, more than a block of it, bf16 in memory; NaN and -0.0 too."""
    config = LlamaConfig(
        vocab_size=40_000, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"][0, :2] = torch.tensor([float("nan"), -0.0])
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert stored["lm_head.weight"].nbytes > BLOCK_BYTES
    for name, tensor in checkpoint.stream(tmp_path):
        assert torch.equal(tensor.view(torch.int16), stored[name].to(torch.bfloat16).view(torch.int16)), name


def test_tensors_of_other_widths_lie_where_loaders_can_map_them(tmp_path: Path) -> None:
    """A bf16 tensor with an odd number of elements must not stand before a float32 one."""
    source = save_tiny(hybrid_config(), tmp_path / "source")
    beside = {"mtp.odd": torch.ones(3, dtype=torch.uint8), "mtp.wide": torch.arange(3, dtype=torch.float64)}
    stored = load_file(source / "model.safetensors")
    save_file({**stored, **beside}, source / "model.safetensors", metadata={"format": "pt"})
    name = "model.layers.0.linear_attn.A_log"
    dtypes = {name: torch.float32}
    weights = checkpoint.read(source, dtypes)
    saved = checkpoint.save(
        tmp_path / "model", source, checkpoint.stream(source, dtypes), {"version": "w"}, dtypes
    )
    found = load_file(saved / "model.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in beside.items())
    assert found[name].dtype == torch.float32
    assert content_id(checkpoint.read(saved, dtypes)) == content_id(weights)
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_weights_that_are_not_the_sources_are_not_saved(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "model"
    weights = a_model(source, 0)
    first = checkpoint.save(root, source, weights, {"version": "w1"})
    pairs = list(weights.items())
    name, tensor = pairs[0]
    bad = [
        (pairs[1:], f"tensor {name} was not given"),
        ([*pairs, pairs[0]], f"tensor {name}, .* came twice"),
        ([*pairs, ("x", tensor)], "tensor x"),
        ([(name, tensor.float()), *pairs[1:]], f"tensor {name}, torch.float32"),
        ([(name, tensor[:1]), *pairs[1:]], f"tensor {name}"),
    ]
    for given, message in bad:
        with pytest.raises(BadCheckpoint, match=message):
            checkpoint.save(root, source, given, {"version": "w2"})
        assert sorted(p.name for p in root.iterdir()) == ["current", "w1"]
        assert checkpoint.current(root) == first


def test_whatever_a_loader_needs_is_copied_and_nothing_that_is_weights_code_or_elsewhere(
    tmp_path: Path,
) -> None:
    source, outside = tmp_path / "source", tmp_path / "outside.json"
    a_model(source, 0)
    copied = {
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
        "chat_template.json",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer.model",
        "vocab.txt",
        "merges.txt",
        "generation_config.json",
        "LICENSE",
        "LICENSE.md",
        "README.md",
        "additional_chat_templates/tools.jinja",
        "linked.json",
    }
    left = {
        "pytorch_model.bin",
        "old.safetensors",
        "model.pt",
        "modeling_custom.py",
        "pytorch_model.bin.index.json",
        ".hidden.json",
        "secondnature.json",
        "sub/other.json",
    }
    for name in (copied | left) - {"linked.json"}:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    outside.write_text("secret")
    (source / "linked.json").symlink_to("tokenizer.json")
    (source / "away.json").symlink_to(outside)
    (source / "gone.json").symlink_to("nowhere.json")
    (source / "folder.json").mkdir()
    (source / "pickled.model").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"a": torch.ones(1)}, source / "zipped.model")
    with (source / "huge.json").open("wb") as file:
        file.truncate(100_000_001)
    os.mkfifo(source / "pipe.json")
    saved = checkpoint.save(tmp_path / "model", source, checkpoint.stream(source), {"version": "w1"})
    found = {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()}
    assert found == copied | {"config.json", "model.safetensors", "secondnature.json"}
    assert checkpoint.state(saved) == {"version": "w1"}
    assert not any(p.is_symlink() for p in saved.rglob("*"))
    assert all((p.stat().st_mode & 0o077) == 0 for p in saved.rglob("*"))


def test_a_model_in_the_cache_of_a_hub_is_copied_through_its_links(tmp_path: Path) -> None:
    """`snapshots/<revision>/` holds links to `blobs/<digest>`."""
    a_model(tmp_path / "plain", 0)
    (tmp_path / "plain" / "preprocessor_config.json").write_text('{"size": 3}')
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate((tmp_path / "plain").iterdir()):
        path.rename(blobs / f"{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    saved = checkpoint.save(tmp_path / "model", snapshot, checkpoint.stream(snapshot), {"version": "w1"})
    assert (saved / "preprocessor_config.json").read_text() == '{"size": 3}'
    assert content_id(checkpoint.stream(saved)) == content_id(checkpoint.stream(snapshot))


def dead_process() -> int:
    """The number of a process that is no more."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_what_crashes_left_is_removed_and_what_strangers_put_there_stays(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "model"
    weights = a_model(source, 0)
    first = checkpoint.save(root, source, weights, {"version": "w1"})
    dead, alive = dead_process(), os.getppid()
    (root / f".w5.{dead}.tmp").mkdir()
    (root / f".w5.{dead}.tmp" / "model.safetensors").write_bytes(b"half")
    (root / f".current.{dead}.tmp").symlink_to("w5")
    (root / f".current.{alive}.tmp").symlink_to("w6")
    (root / f".w7.{os.getpid()}.tmp").mkdir()  # of an earlier process with our number
    os.utime(root / f".w7.{os.getpid()}.tmp", (1_000_000, 1_000_000))
    (root / f".w8.{os.getpid()}.tmp").mkdir()  # ours, being written
    (root / "mine").mkdir()
    (root / "mine" / "notes.txt").write_text("mine")
    shutil.copytree(first, root / "backup")  # notes w1, but somebody named it
    (root / "elsewhere").symlink_to(source)
    (root / "file").write_text("mine")
    assert checkpoint.clean(root) == 3
    second = checkpoint.save(root, source, weights, {"version": "w2"})
    assert {p.name for p in root.iterdir()} == {
        f".current.{alive}.tmp",
        f".w8.{os.getpid()}.tmp",
        "mine",
        "backup",
        "elsewhere",
        "file",
        "w2",
        "current",
    }
    assert checkpoint.current(root) == second
    assert (root / "mine" / "notes.txt").read_text() == "mine"
    assert checkpoint.clean(tmp_path / "none") == 0
