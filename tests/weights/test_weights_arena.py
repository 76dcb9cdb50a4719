"""The arena: one copy, seen by another process; deltas that undo to the byte; checkpoints that swap whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import hybrid_config, save_tiny
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3_5Config

from secondnature.errors import BadCheckpoint, BadDelta, WeightsError
from secondnature.weights import checkpoint, delta
from secondnature.weights.arena import Arena, content_id


def some_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "a.weight": torch.randn(7, 5).to(torch.bfloat16),
        "b.weight": torch.randn(3, 1, 4).to(torch.bfloat16),
        "c": torch.randn(11).to(torch.bfloat16),
    }


def test_create_copies_the_values_and_aligns_them() -> None:
    weights = some_weights()
    arena = Arena.create(weights)
    assert content_id(arena.tensors) == content_id(weights)
    for tensor in arena.tensors.values():
        assert tensor.data_ptr() % 64 == 0
        assert tensor.is_contiguous()


def test_another_process_writes_into_the_same_memory() -> None:
    arena = Arena.create(some_weights())
    code = """
import sys, torch
from secondnature.weights.arena import Arena
arena = Arena.attach(sys.stdin.read())
with arena.writing():
    arena.tensors["a.weight"][0, 0] = 42.0
"""
    subprocess.run([sys.executable, "-c", code], input=arena.manifest(), text=True, check=True, timeout=120)
    assert float(arena.tensors["a.weight"][0, 0]) == 42.0
    assert arena.writes == (1, 1)


def test_the_write_counter_never_goes_back() -> None:
    arena = Arena.create(some_weights())
    before = {n: t.clone() for n, t in arena.tensors.items()}
    with arena.writing():
        assert arena.writes == (1, 0)
        arena.tensors["c"].zero_()
    arena.write(before)
    assert content_id(arena.tensors) == content_id(before)
    assert arena.writes == (2, 2)


def test_a_torn_write_is_settled() -> None:
    arena = Arena.create(some_weights())
    arena._header[1] = 5
    assert arena.writes == (5, 0)
    arena.settle()
    with arena.writing():
        assert arena.writes == (6, 5)


def test_attach_refuses_what_is_no_arena() -> None:
    with pytest.raises(WeightsError, match="manifest"):
        Arena.attach("{}")
    plan = json.loads(Arena.create(some_weights()).manifest())
    with pytest.raises(WeightsError, match="cannot map"):
        Arena.attach(json.dumps({**plan, "fd": 9999}))
    with pytest.raises(WeightsError, match="does not fit"):
        Arena.attach(json.dumps({**plan, "nbytes": plan["nbytes"] + 4096}))


def test_write_refuses_a_wrong_shape_before_writing_anything() -> None:
    arena = Arena.create(some_weights())
    before = content_id(arena.tensors)
    bad = {"c": torch.zeros(11, dtype=torch.bfloat16), "a.weight": torch.zeros(2, 2, dtype=torch.bfloat16)}
    with pytest.raises(WeightsError, match=r"a\.weight"):
        arena.write(bad)
    assert content_id(arena.tensors) == before


def test_content_id_sees_every_byte_name_and_shape() -> None:
    weights = some_weights()
    ids = {content_id(weights)}
    flipped = {n: t.clone() for n, t in weights.items()}
    flipped["c"].view(torch.int16)[3] ^= 1
    ids.add(content_id(flipped))
    ids.add(content_id({**weights, "c": weights["c"].reshape(11, 1)}))
    ids.add(content_id({("d" if n == "c" else n): t for n, t in weights.items()}))
    assert len(ids) == 4


def test_delta_is_the_lesson_and_its_undo(tmp_path: Path) -> None:
    before, after = some_weights(0), some_weights(1)
    after["b.weight"] = before["b.weight"].clone()
    after["c"][2] = float("nan")  # bits are bits
    sha = delta.write(delta.between(before, after), tmp_path / "d.safetensors")
    loaded = delta.read(tmp_path / "d.safetensors", sha)
    assert set(loaded.xor) == {"a.weight", "c"}
    weights = {n: t.clone() for n, t in before.items()}
    delta.apply_(weights, loaded)
    assert content_id(weights) == loaded.result == content_id(after)
    delta.apply_(weights, loaded)
    assert content_id(weights) == loaded.base == content_id(before)


def test_an_empty_delta_is_a_delta(tmp_path: Path) -> None:
    weights = some_weights()
    delta.write(delta.between(weights, weights), tmp_path / "d.safetensors")
    assert delta.read(tmp_path / "d.safetensors").xor == {}


def test_delta_refuses_damage_and_strangers(tmp_path: Path) -> None:
    before, after = some_weights(0), some_weights(1)
    path = tmp_path / "d.safetensors"
    sha = delta.write(delta.between(before, after), path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(BadDelta, match="checksum"):
        delta.read(path, sha)
    with pytest.raises(BadDelta):
        delta.read(tmp_path / "none")
    stranger = {"z": torch.zeros(4, dtype=torch.bfloat16)}
    weights = {n: t.clone() for n, t in before.items()}
    with pytest.raises(BadDelta, match="does not fit"):
        delta.apply_(stranger, delta.between(before, after))
    assert content_id(weights) == content_id(before)


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


def test_the_load_is_seen_by_the_other_process_and_is_never_negative() -> None:
    arena = Arena.create(some_weights())
    other = Arena.attach(arena.manifest())
    assert other.load == 0
    arena.load = 3
    assert other.load == 3
    arena.load = -1
    assert other.load == 0
    assert arena.writes == (0, 0)


def test_seen_as_other_names_and_cuts_of_the_same_memory() -> None:
    arena = Arena.create(some_weights())
    manifest = arena.manifest()
    whole = arena.tensors["a.weight"]
    arena.seen_as({"top": whole[:3], "rest": whole[3:]})
    assert arena.manifest() == manifest
    arena.write({"top": torch.ones(3, 5, dtype=torch.bfloat16)})
    attached = Arena.attach(manifest)
    assert attached.tensors["a.weight"][:3].eq(1).all()
    assert not attached.tensors["a.weight"][3:].eq(1).all()
    with pytest.raises(WeightsError, match="does not fit"):
        arena.write({"a.weight": whole})


def test_seen_as_refuses_copies() -> None:
    arena = Arena.create(some_weights())
    before = arena.tensors
    with pytest.raises(WeightsError, match="tensor x is no view"):
        arena.seen_as({"c": arena.tensors["c"], "x": arena.tensors["c"].clone()})
    assert arena.tensors is before
