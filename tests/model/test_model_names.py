"""vLLM's tensors under transformers' names: views of one memory, planned from headers, wrong ones refused.

The engine's side is laid out by vLLM's own rules (`tiny_models.engine_tensors`), apart from the product's table.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    VOCAB_SIZE,
    dense_config,
    engine_tensors,
    gpt2_config,
    hybrid_config,
    llama_config,
    read_weights,
    save_tiny,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3_5Config

from secondnature.errors import UnsupportedModel
from secondnature.model import load
from secondnature.model.names import Header, Part, plan, preflight, views
from secondnature.records import Example, OptimizerSettings
from secondnature.train.apollo import Apollo
from secondnature.train.prefix import self_test
from secondnature.train.step import train_step
from secondnature.weights.arena import Arena

HEADS = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}  # those that vLLM runs on a CPU
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "hybrid": lambda: hybrid_config(**HEADS),
    "hybrid_untied": lambda: hybrid_config(**HEADS, tie_word_embeddings=False),
    "dense": dense_config,
    "dense_tied": lambda: dense_config(tie_word_embeddings=True, vocab_size=128),
    "llama": lambda: llama_config(attention_bias=True, mlp_bias=True),
}
CONDITIONAL = "hybrid_conditional"
KINDS = [*CONFIGS, CONDITIONAL]
PADDED = 128


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("names")
    found = {name: save_tiny(make(), root / name) for name, make in CONFIGS.items()}
    # the published form: the text model's settings within those of a model that also sees; same text weights
    text = hybrid_config(**HEADS)
    whole = Qwen3_5Config(
        text_config=text.to_dict(),
        architectures=["Qwen3_5ForConditionalGeneration"],
        tie_word_embeddings=True,
    )
    found[CONDITIONAL] = root / CONDITIONAL
    whole.save_pretrained(found[CONDITIONAL])
    return found


def text_weights(directories: dict[str, Path], kind: str) -> dict[str, Tensor]:
    return read_weights(directories["hybrid" if kind == CONDITIONAL else kind])


def prefix_of(kind: str) -> str:
    return "language_model." if kind == CONDITIONAL else ""


def headers_of(tensors: dict[str, Tensor]) -> dict[str, Header]:
    return {name: Header.of(tensor) for name, tensor in tensors.items()}


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(2, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(0))


EXAMPLE = Example(context_ids=list(range(2, 22)), continuation_ids=[30, 31, 32, 33])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_logits_on_the_engines_memory(directories: dict[str, Path], kind: str) -> None:
    """To the bit; no parameter has a byte of its own, and a write from either side is seen on the other."""
    weights = text_weights(directories, kind)
    arena = Arena.create(engine_tensors(weights, prefix_of(kind)))
    parts = plan(directories[kind], headers_of(arena.tensors))
    given = views(parts, arena.tensors)
    model = load.build(directories[kind], given)
    wanted = load.build(directories["hybrid" if kind == CONDITIONAL else kind], weights)
    text = ids(2, 24)
    assert torch.equal(model(text).logits, wanted(text).logits)

    storage = {t.untyped_storage().data_ptr() for t in arena.tensors.values()}
    assert len(storage) == 1
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().data_ptr() in storage, name
        assert parameter.is_contiguous(), name
    covered = sum(p.numel() for p in model.parameters())
    padding = sum(t.numel() for t in arena.tensors.values()) - covered
    padded = [p for p in parts if "embed_tokens" in p.name or "lm_head" in p.name]
    assert padding == sum((PADDED - p.shape[0]) * p.shape[1] for p in padded)

    inside = dict(model.named_parameters())
    for part in parts:
        mine, theirs = inside[part.name].data, arena.tensors[part.tensor]
        rows = slice(part.row, part.row + part.shape[0])
        before = theirs.clone()
        mine.add_(1)
        assert torch.equal(theirs[rows], mine), part.name
        assert not torch.equal(theirs[rows], before[rows]), part.name
        theirs.copy_(before)
        assert torch.equal(mine, before[rows]), part.name
    assert torch.equal(model(text).logits, wanted(text).logits)
    self_test(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_writes_into_the_engine(directories: dict[str, Path], kind: str) -> None:
    """The same bits as the same step on the Hugging Face model's own tensors; the padding stays as it is."""
    weights = text_weights(directories, kind)
    original = engine_tensors(weights, prefix_of(kind))
    num_ids = len(weights["model.embed_tokens.weight"])
    tables = [n for n in original if "embed_tokens" in n or "lm_head" in n]
    for name in tables:
        original[name][num_ids:] = 7
    arena = Arena.create(original)
    parts = plan(directories[kind], headers_of(arena.tensors))
    weights = {n: (t.float() if n.endswith("A_log") else t) for n, t in weights.items()}
    plain = load.build(directories["hybrid" if kind == CONDITIONAL else kind], weights)
    inside = load.build(directories[kind], views(parts, arena.tensors))
    settings = OptimizerSettings(lr=1e-3, rank=4)
    for model in (plain, inside):
        result = train_step(model, Apollo(model, settings, seed=3), [EXAMPLE], writing=arena.writing)
        assert result.wrote
    wanted = dict(plain.named_parameters())
    for name, parameter in inside.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    stepped = engine_tensors({n: p.detach() for n, p in wanted.items()}, prefix_of(kind))
    for name in tables:
        stepped[name][num_ids:] = 7
    for name, tensor in arena.tensors.items():
        assert torch.equal(tensor, stepped[name]), name
    moved = [n for n, t in arena.tensors.items() if not torch.equal(t, original[n])]
    assert len(moved) > len(original) / 2


def test_the_plan_is_pure_and_says_where_everything_lies(directories: dict[str, Path]) -> None:
    headers = headers_of(engine_tensors(text_weights(directories, CONDITIONAL), "language_model."))
    parts = plan(directories[CONDITIONAL], headers)
    assert [p.name for p in parts] == list(load.shapes(directories[CONDITIONAL]))
    by_name = {p.name: p for p in parts}
    z = by_name["model.layers.0.linear_attn.in_proj_z.weight"]
    qkv = by_name["model.layers.0.linear_attn.in_proj_qkv.weight"]
    assert z.tensor == qkv.tensor == "language_model.model.layers.0.linear_attn.in_proj_qkvz.weight"
    assert (qkv.row, z.row) == (0, qkv.shape[0])
    assert by_name["model.layers.0.linear_attn.A_log"].dtype is torch.float32
    assert by_name["model.embed_tokens.weight"].shape == (VOCAB_SIZE, 48)
    order = [by_name[f"model.layers.3.self_attn.{k}_proj.weight"] for k in "qkv"]
    assert [p.row for p in order] == [0, order[0].shape[0], order[0].shape[0] + order[1].shape[0]]


def without(headers: dict[str, Header], name: str) -> dict[str, Header]:
    return {n: h for n, h in headers.items() if n != name}


def changed(headers: dict[str, Header], name: str, **changes: Any) -> dict[str, Header]:
    return headers | {name: replace(headers[name], **changes)}


QKV = "model.layers.3.self_attn.qkv_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda h: without(h, QKV), f"no tensor {QKV}.*found 53 tensors, expected 54.*same model"),
        (lambda h: without(h, EMBEDDING), f"no tensor {EMBEDDING}"),
        (lambda h: {}, f"no tensor {EMBEDDING} .found none at all"),
        (
            lambda h: h | {"model.layers.9.extra": h["model.norm.weight"]},
            "model.layers.9.extra belongs to no parameter",
        ),
        (lambda h: h | {"visual.x": h["model.norm.weight"]}, "visual.x belongs.*language-model-only"),
        (lambda h: h | {"lm_head.weight": h[EMBEDDING]}, "lm_head.weight belongs.*tied.*second copy"),
        (
            lambda h: changed(h, QKV, shape=(96, 48), stride=(48, 1)),
            rf"{QKV} has shape \(96, 48\); expected \(192, 48\)",
        ),
        (
            lambda h: changed(h, EMBEDDING, shape=(97, 48), stride=(48, 1)),
            rf"{EMBEDDING} has shape \(97, 48\); expected \(128, 48\)",
        ),
        (lambda h: changed(h, QKV, stride=(1, 192)), rf"{QKV} has strides \(1, 192\).*VLLM_PLUGINS"),
        (lambda h: changed(h, QKV, dtype=torch.int8), f"{QKV} is int8; expected bfloat16.*quantised"),
        (lambda h: changed(h, QKV, dtype=torch.float8_e4m3fn), f"{QKV} is float8_e4m3fn; expected bfloat16"),
        (lambda h: changed(h, QKV, dtype=torch.float32), f"{QKV} is float32; expected bfloat16"),
        (
            lambda h: {n: replace(x, dtype=torch.float32) for n, x in h.items()},
            "float32; expected bfloat16 .a GatedDeltaNet, on a CPU",
        ),
        (lambda h: changed(h, EMBEDDING, dtype=torch.float16), "float16; expected bfloat16.*--dtype"),
    ],
)
def test_wrong_tensors_are_refused_by_name(
    directories: dict[str, Path],
    spoil: Callable[[dict[str, Header]], dict[str, Header]],
    message: str,
) -> None:
    good = headers_of(engine_tensors(text_weights(directories, "hybrid")))
    assert plan(directories["hybrid"], good)
    with pytest.raises(UnsupportedModel, match=message) as caught:
        plan(directories["hybrid"], spoil(good))
    assert caught.value.hint


def test_an_untied_model_needs_its_head(directories: dict[str, Path]) -> None:
    headers = headers_of(engine_tensors(text_weights(directories, "dense")))
    with pytest.raises(UnsupportedModel, match=r"no tensor lm_head\.weight"):
        plan(directories["dense"], without(headers, "lm_head.weight"))


def test_float32_is_fine_without_a_delta_net(directories: dict[str, Path]) -> None:
    headers = headers_of(engine_tensors(text_weights(directories, "dense")))
    wide = {n: replace(h, dtype=torch.float32) for n, h in headers.items()}
    assert {p.dtype for p in plan(directories["dense"], wide)} == {torch.float32}


def test_what_the_engine_cannot_serve_is_refused_before_it_is_started(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    good = directories["hybrid"]
    assert preflight(good, dtype=torch.bfloat16).architectures == ["Qwen3_5ForCausalLM"]
    for found, message in (
        ({"world_size": 2}, "2 processes; expected 1.*--tensor-parallel-size 1"),
        ({"quantization": "fp8"}, "quantised .fp8.; expected plain"),
        ({"dtype": torch.float32}, "float32; expected bfloat16"),
        ({"dtype": torch.float16}, "float16; expected bfloat16"),
    ):
        with pytest.raises(UnsupportedModel, match=message):
            preflight(good, **found)  # pyright: ignore[reportArgumentType]
        if "dtype" not in found:
            with pytest.raises(UnsupportedModel, match=message):
                plan(good, {}, **found)  # pyright: ignore[reportArgumentType]
    assert preflight(good, dtype=torch.float32, device="cuda")

    for i, (config, message) in enumerate(
        (
            (hybrid_config(), "linear_key_head_dim 16, linear_value_head_dim 16.*both to be 64 or both 128"),
            (
                hybrid_config(linear_key_head_dim=64, linear_value_head_dim=128),
                "linear_key_head_dim 64, linear_value_head_dim 128",
            ),
            (gpt2_config(), "GPT2LMHeadModel; expected one of LlamaForCausalLM.*local engine"),
        )
    ):
        with pytest.raises(UnsupportedModel, match=message):
            preflight(save_tiny(config, tmp_path / str(i)))
    assert preflight(tmp_path / "0", device="cuda")

    quantised = json.loads((good / "config.json").read_text())
    quantised["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    path = tmp_path / "quantised"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(UnsupportedModel, match=r"quantised .gptq."):
        preflight(path)
    del quantised["quantization_config"], quantised["architectures"]
    (path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(UnsupportedModel, match=r"not given in config\.json"):
        preflight(path)


def test_views_are_refused_where_the_plan_does_not_fit(directories: dict[str, Path]) -> None:
    tensors = engine_tensors(text_weights(directories, "dense"))
    parts: list[Part] = plan(directories["dense"], headers_of(tensors))
    name = "model.layers.0.self_attn.qkv_proj.weight"
    for wrong in (None, tensors[name].float(), tensors[name][:10], tensors[name].T.contiguous().T):
        spoiled = {n: t for n, t in tensors.items() if n != name} | ({} if wrong is None else {name: wrong})
        with pytest.raises(UnsupportedModel, match=f"{name} is .*plan was made for another engine"):
            views(parts, spoiled)


def test_transformers_loads_what_the_plan_describes(directories: dict[str, Path]) -> None:
    """The views' names are those of transformers' own model."""
    model = AutoModelForCausalLM.from_pretrained(directories["hybrid"])
    headers = headers_of(engine_tensors(text_weights(directories, "hybrid")))
    assert {p.name for p in plan(directories["hybrid"], headers)} == {n for n, _ in model.named_parameters()}
