"""Moving an engine's parameters into an arena: same objects, same values, one memory; shared with a process.

The engine's model is modules that hold tensors laid out as vLLM's; with vLLM itself: `make test-vllm`.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import engine_tensors, hybrid_config, read_weights, save_tiny
from torch import nn

from secondnature.engines.vllm.share import attach, share
from secondnature.errors import UnsupportedModel, WeightsError
from secondnature.model import names
from secondnature.model.load import build

QKV = "model.layers.3.self_attn.qkv_proj.weight"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = hybrid_config(linear_key_head_dim=64, linear_value_head_dim=64)
    return save_tiny(config, tmp_path_factory.mktemp("share"))


def engine_model(directory: Path) -> nn.Module:
    """Modules that hold what vLLM's hold."""
    root = nn.Module()
    for name, tensor in engine_tensors(read_weights(directory)).items():
        *path, leaf = name.split(".")
        module = root
        for step in path:
            if not hasattr(module, step):
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return root


def test_every_parameter_moves_and_stays_the_same_object(directory: Path) -> None:
    model = engine_model(directory)
    before = {n: (p, p.detach().clone(), p.data_ptr()) for n, p in model.named_parameters()}
    shared = share(model, directory)
    assert set(shared.arena.tensors) == set(before)
    for name, parameter in model.named_parameters():
        same, values, address = before[name]
        assert parameter is same, name
        assert torch.equal(parameter, values), name
        assert parameter.data_ptr() == shared.arena.tensors[name].data_ptr() != address, name
        assert parameter.stride() == values.stride(), name


def _write(manifest: str) -> None:
    """In the other process: the Hugging Face model on the engine's memory, one number of it changed."""
    shared = attach(manifest)
    tensors = shared.arena.tensors
    parts = names.plan(shared.directory, {n: names.Header.of(t) for n, t in tensors.items()})
    model = build(shared.directory, names.views(parts, tensors))
    with shared.arena.writing():
        model.get_submodule("model.layers.3.self_attn.k_proj")._parameters["weight"].data[0, 0] = 42.0  # pyright: ignore[reportOptionalMemberAccess]


def test_another_process_writes_and_the_engines_parameter_has_it(directory: Path) -> None:
    model = engine_model(directory)
    shared = share(model, directory)
    manifest = shared.manifest()
    assert json.loads(manifest)["model"] == str(directory)
    qkv = dict(model.named_parameters())[QKV]
    before = qkv.detach().clone()
    process = multiprocessing.get_context("spawn").Process(target=_write, args=(manifest,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    before[128, 0] = 42.0  # after 4 heads of queries with their gates, 16 wide
    assert torch.equal(qkv, before)
    assert shared.arena.writes == (1, 1)


def spoil_shape(model: Any) -> None:
    attention = model.get_submodule("model.layers.3.self_attn.qkv_proj")
    attention.weight = nn.Parameter(torch.empty(0, dtype=torch.bfloat16), requires_grad=False)


def spoil_alias(model: Any) -> None:
    attention = model.get_submodule("model.layers.3.self_attn.qkv_proj")
    attention.remembered = attention.weight.data[:5]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_shape, f"{QKV} has shape .0,.; expected .192, 48.*packed"),
        (spoil_alias, f"keeps model.layers.3.self_attn.qkv_proj.remembered.*parameter {QKV}"),
    ],
)
def test_what_cannot_be_shared_is_refused_and_nothing_moves(
    directory: Path, spoil: Any, message: str
) -> None:
    model = engine_model(directory)
    spoil(model)
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    with pytest.raises(UnsupportedModel, match=message):
        share(model, directory)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == before


def test_a_manifest_that_no_longer_holds_is_refused(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(directory, copy)
    shared = share(engine_model(copy), copy)
    manifest = shared.manifest()
    for wrong in ("{", "{}", manifest.replace("secondnature-vllm/1", "secondnature-vllm/9")):
        with pytest.raises(WeightsError, match="manifest"):
            attach(wrong)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(WeightsError, match=r"config\.json is no longer that of the model"):
        attach(manifest)
