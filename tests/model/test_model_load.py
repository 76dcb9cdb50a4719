"""Models around shared memory: the same logits as transformers', every fault named by its tensor."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    CONFIGS,
    VOCAB_SIZE,
    dense_config,
    gpt2_config,
    llama_config,
    read_weights,
    save_tiny,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from secondnature.errors import BadCheckpoint, BadInput, UnsupportedModel
from secondnature.model.chat import encode_answer, encode_chat, read_tokenizer
from secondnature.model.load import build, context_limit, fingerprint, plan
from secondnature.model.upcast import collect, compute_dtype
from secondnature.records import Message

REALDATA = os.environ.get("SECONDNATURE_REALDATA")
needs_realdata = pytest.mark.skipif(REALDATA is None, reason="SECONDNATURE_REALDATA is not set")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    configs = {name: make() for name, make in CONFIGS.items()} | {"llama": llama_config()}
    return {name: save_tiny(config, root / name) for name, config in configs.items()}


KINDS = [*CONFIGS, "llama"]


def oracle(directory: Path) -> nn.Module:
    """transformers' own loading, in fp32: all bf16 values are exact in it."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(2, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_logits_as_transformers_in_fp32(directories: dict[str, Path], kind: str) -> None:
    """Also token by token on transformers' own cache, as an engine decodes."""
    model, wanted = build(directories[kind], read_weights(directories[kind])), oracle(directories[kind])
    assert compute_dtype(model) is torch.float32
    text = ids(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(text).logits, wanted(text).logits, rtol=0, atol=1e-6)
        caches = DynamicCache(config=model.config), DynamicCache(config=wanted.config)  # pyright: ignore[reportArgumentType]
        for part in (text[:, :20], text[:, 20:21], text[:, 21:22]):
            found, right = (
                m(part, past_key_values=c, use_cache=True).logits
                for m, c in zip((model, wanted), caches, strict=True)
            )
            torch.testing.assert_close(found, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_fp32_and_equal_autograds(directories: dict[str, Path], kind: str) -> None:
    """Tied parameters are used twice and have one gradient: the sum."""
    model, wanted = build(directories[kind], read_weights(directories[kind])), oracle(directories[kind])
    text = ids(2, 24)
    wanted(text, labels=text).loss.backward()
    with collect(model) as gradients:
        model(text, labels=text).loss.backward()
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    for name, parameter in wanted.named_parameters():
        assert parameter.grad is not None
        assert gradients[name].dtype is torch.float32
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_no_wide_copy_of_a_matrix_is_kept_for_backward(directories: dict[str, Path], kind: str) -> None:
    """What autograd saves of a large parameter is the bf16 tensor itself."""
    model = build(directories[kind], read_weights(directories[kind]))
    matrices = {tuple(p.shape) for p in model.parameters() if p.ndim == 2 and min(p.shape) > 16}
    matrices |= {shape[::-1] for shape in matrices}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with collect(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(ids(1, 7))
    own = {p.data_ptr() for p in model.parameters()}
    assert any(t.data_ptr() in own for t in saved)
    wide = [t for t in saved if t.dtype is torch.float32 and tuple(t.shape) in matrices]
    assert not wide


def test_every_parameter_is_the_given_memory(directories: dict[str, Path]) -> None:
    weights = read_weights(directories["hybrid"])
    model = build(directories["hybrid"], weights)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == {
        n: t.data_ptr() for n, t in weights.items()
    }
    everywhere = dict(model.named_parameters(remove_duplicate=False))
    assert everywhere["lm_head.weight"] is everywhere["model.embed_tokens.weight"]
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    text = ids(1, 5)
    before = model(text).logits
    weights["model.norm.weight"].add_(0.5)
    assert not torch.equal(before, model(text).logits), "a write into the memory is a write into the model"


def test_bf16_compute_converts_nothing(directories: dict[str, Path]) -> None:
    weights = read_weights(directories["dense"])
    model = build(directories["dense"], weights, compute_dtype=torch.bfloat16)
    assert model(ids(1, 5)).logits.dtype is torch.bfloat16
    norm: Any = model.get_submodule("model.norm")
    assert norm.weight.data_ptr() == weights["model.norm.weight"].data_ptr()
    with collect(model) as gradients:
        model(ids(1, 5)).logits.float().sum().backward()
    assert {g.dtype for g in gradients.values()} == {torch.float32}


def test_build_names_the_tensor_at_fault(directories: dict[str, Path]) -> None:
    directory = directories["dense"]
    name = "model.layers.1.mlp.up_proj.weight"

    def with_tensor(tensor: Tensor | None, key: str = name) -> dict[str, Tensor]:
        weights = read_weights(directory)
        if tensor is None:
            del weights[key]
        else:
            weights[key] = tensor
        return weights

    with pytest.raises(BadCheckpoint, match=f"tensor {name} was not given"):
        build(directory, with_tensor(None))
    with pytest.raises(BadCheckpoint, match=rf"tensor {name} has shape \(2, 2\); the config says \(80, 48\)"):
        build(directory, with_tensor(torch.zeros(2, 2)))
    with pytest.raises(BadCheckpoint, match="tensor nobody belongs to no parameter"):
        build(directory, with_tensor(torch.zeros(1), "nobody"))
    with pytest.raises(UnsupportedModel, match=f"tensor {name} is torch.int8"):
        build(directory, with_tensor(torch.zeros(80, 48, dtype=torch.int8)))
    with pytest.raises(BadCheckpoint, match=f"tensor {name} has no memory"):
        build(directory, with_tensor(torch.zeros(80, 48, device="meta")))


def test_plan_reads_headers_and_names_the_fault(directories: dict[str, Path], tmp_path: Path) -> None:
    specs = plan(directories["hybrid"])
    weights = read_weights(directories["hybrid"])
    assert [(s.name, s.shape) for s in specs] == [(n, tuple(t.shape)) for n, t in weights.items()]
    assert {s.dtype for s in specs} == {torch.bfloat16}
    assert not any(s.name == "lm_head.weight" for s in specs), "tied: once, under its first name"

    def changed(**changes: Tensor | None) -> Path:
        tensors = load_file(directories["dense"] / "model.safetensors")
        for key, tensor in changes.items():
            if tensor is None:
                del tensors[key]
            else:
                tensors[key] = tensor
        shutil.copy(directories["dense"] / "config.json", tmp_path)
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    with pytest.raises(BadCheckpoint, match=r"tensor model\.norm\.weight is missing"):
        plan(changed(**{"model.norm.weight": None}))
    with pytest.raises(BadCheckpoint, match=r"tensor model\.norm\.weight has shape \(3,\); .* \(48,\)"):
        plan(changed(**{"model.norm.weight": torch.zeros(3)}))
    with pytest.raises(UnsupportedModel, match=r"tensor model\.norm\.weight is I8"):
        plan(changed(**{"model.norm.weight": torch.zeros(48, dtype=torch.int8)}))
    with pytest.raises(BadCheckpoint, match="tensor stranger belongs to no parameter"):
        plan(changed(stranger=torch.zeros(3)))


def test_files_that_are_no_model_are_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"config\.json: No such file"):
        plan(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadCheckpoint, match="not JSON"):
        plan(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "never_heard_of"}')
    with pytest.raises(UnsupportedModel, match="knows no model_type 'never_heard_of'"):
        plan(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UnsupportedModel, match="not a causal language model"):
        plan(tmp_path)
    shutil.copy(directories["dense"] / "config.json", tmp_path)
    with pytest.raises(BadCheckpoint, match=r"no model\.safetensors"):
        plan(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(BadCheckpoint, match="not a whole safetensors file"):
        plan(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../x"}}))
    with pytest.raises(BadCheckpoint, match="outside the directory"):
        plan(tmp_path)


def test_several_files_and_names_without_prefix(directories: dict[str, Path], tmp_path: Path) -> None:
    """Sharded checkpoints; and GPT-2's original names, which leave the model's prefix out."""
    tensors = load_file(directories["gpt2"] / "model.safetensors")
    names = sorted(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    index = {}
    for file, part in shards.items():
        save_file({n.removeprefix("transformer."): tensors[n] for n in part}, tmp_path / file)
        index |= {n.removeprefix("transformer."): file for n in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    shutil.copy(directories["gpt2"] / "config.json", tmp_path)
    found, wanted = read_weights(tmp_path), read_weights(directories["gpt2"])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_limits_and_fingerprints(directories: dict[str, Path], tmp_path: Path) -> None:
    assert context_limit(directories["gpt2"]) == 256
    assert context_limit(dense_config(max_position_embeddings=77)) == 77
    first = fingerprint(directories["gpt2"])
    assert fingerprint(save_tiny(gpt2_config(), tmp_path / "same", seed=9)) == first, "values do not count"
    assert fingerprint(save_tiny(gpt2_config(n_layer=2), tmp_path / "other")) != first


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """A byte-level tokenizer with ChatML and two merges, one of which crosses the border of an answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {c: i for i, c in enumerate(sorted(alphabet))}
    vocabulary |= {"hi": len(vocabulary), "Ċyes": len(vocabulary) + 1, "es": len(vocabulary) + 2}
    vocabulary |= {"yes": len(vocabulary)}
    merges = [("h", "i"), ("e", "s"), ("y", "es"), ("Ċ", "yes")]
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    fast.save_pretrained(tmp_path)
    return read_tokenizer(tmp_path)


PROMPT = [Message(role="system", content="be brief"), Message(role="user", content="hi")]


def test_an_answer_is_the_templates_own_rendering_up_to_its_end(tokenizer: Any) -> None:
    answer = Message(role="assistant", content="hi there")
    context, continuation = encode_answer(tokenizer, PROMPT, answer)
    assert context == encode_chat(tokenizer, PROMPT)
    whole = encode_chat(tokenizer, [*PROMPT, answer], add_generation_prompt=False)
    assert whole[: len(context) + len(continuation)] == [*context, *continuation]
    assert tokenizer.decode(continuation) == "hi there<|im_end|>"
    as_dicts = [m.model_dump() for m in PROMPT]
    assert encode_answer(tokenizer, as_dicts, answer.model_dump()) == (context, continuation)


def test_an_answer_whose_tokens_cross_the_border_is_encoded_alone(tokenizer: Any) -> None:
    context, continuation = encode_answer(tokenizer, PROMPT, Message(role="assistant", content="yes"))
    assert context == encode_chat(tokenizer, PROMPT)
    assert tokenizer.convert_ids_to_tokens(continuation) == ["yes", "<|im_end|>"]


def test_a_model_without_chat_template_says_so(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = None
    with pytest.raises(BadInput, match="no chat template"):
        encode_chat(tokenizer, PROMPT)
    with pytest.raises(BadCheckpoint, match=r"no tokenizer\.json"):
        read_tokenizer(tmp_path / "nowhere")


@needs_realdata
def test_a_model_that_nobody_here_made() -> None:
    """craftgpt-chat: fp32 file, tied head, 64 positions, a template that writes no end of turn."""
    directory = Path(str(REALDATA)) / "models" / "craftgpt-chat"
    assert {s.dtype for s in plan(directory)} == {torch.float32}
    assert context_limit(directory) == 64
    weights = read_weights(directory)
    model, wanted = build(directory, weights), oracle(directory)
    with torch.no_grad():
        for name, parameter in wanted.named_parameters():
            parameter.copy_(weights[name])
        text = ids(1, 30)
        torch.testing.assert_close(model(text).logits, wanted(text).logits, rtol=0, atol=3e-5)
    tokenizer = read_tokenizer(directory)
    prompt = [Message(role="user", content="how are you today?")]
    context, continuation = encode_answer(
        tokenizer, prompt, Message(role="assistant", content="i am fine, thanks.")
    )
    assert continuation[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(context) + tokenizer.decode(continuation[:-1]) == (
        "[INST] how are you today?[/INST] i am fine, thanks."
    )
