"""What people have under the name of a model: what cannot be served is refused by what it is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import TEMPLATES, tokenizer_for
from safetensors.torch import load_file, save_file
from tiny_models import dense_config, llama_config, read_weights, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, JambaConfig

from secondnature.engines.local import self_test as engine_test
from secondnature.errors import BadCheckpoint, SecondnatureError, UnsupportedModel
from secondnature.model.chat import read_tokenizer
from secondnature.model.limits import context_limit
from secondnature.model.load import build, fingerprint, named_fault, plan, read_config
from secondnature.weights import checkpoint

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(dense_config(), tmp_path_factory.mktemp("files") / "model")


@pytest.fixture
def model(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


def configure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(directory / "model.safetensors")), directory / "model.safetensors")


def packed(tensors: Tensors) -> Tensors:
    """As GPTQ and its kind: integers under other names."""
    found: Tensors = {}
    for key, tensor in tensors.items():
        if key.endswith("_proj.weight"):
            found[key.removesuffix("weight") + "qweight"] = torch.zeros(4, 4, dtype=torch.int32)
        else:
            found[key] = tensor
    return found


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised .gptq, 4 bits."),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised .awq, 4 bits."),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantised .mxfp4."),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "bitsandbytes, 4 bits",
        ),
        ({"quantization": {"bits": 4, "group_size": 32}}, "quantised .mlx, 4 bits."),
    ],
)
def test_quantised_weights_are_called_that(model: Path, about: dict[str, Any], words: str) -> None:
    rewrite(model, packed)
    configure(model, **about)
    with pytest.raises(UnsupportedModel, match=words):
        plan(model)


def test_plain_weights_are_served_whatever_the_config_says_of_them(model: Path, tmp_path: Path) -> None:
    """And the export does not say it any more: a loader would quantise what is not."""
    configure(model, quantization_config={"quant_method": "fp8"}, auto_map={"AutoConfig": "code.Config"})
    saved = checkpoint.save(tmp_path / "out", model, checkpoint.stream(model), {"version": "w1"})
    written = json.loads((saved / "config.json").read_text())
    assert "quantization_config" not in written
    assert "auto_map" not in written


def missing_file(directory: Path) -> None:
    names = {"model.embed_tokens.weight": "one.safetensors", "model.norm.weight": "two.safetensors"}
    (directory / "model.safetensors").rename(directory / "one.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def pointer(directory: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n"
    (directory / "model.safetensors").write_text(text)


def adapter(directory: Path) -> None:
    (directory / "config.json").unlink()
    about = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (directory / "adapter_config.json").write_text(json.dumps(about))


def adapter_beside(directory: Path) -> None:
    about = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (directory / "adapter_config.json").write_text(json.dumps(about))


def gguf_folder(directory: Path) -> None:
    (directory / "config.json").unlink()
    (directory / "tiny.gguf").write_bytes(b"GGUF")


def no_directory_rights(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("a file")


def classifier(directory: Path) -> None:
    configure(directory, architectures=["Qwen3ForSequenceClassification"])


def headless(directory: Path) -> None:
    configure(directory, architectures=["Qwen3Model"])
    rewrite(directory, lambda tensors: {k: t for k, t in tensors.items() if not k.startswith("lm_head")})


def a_string_for_a_number(directory: Path) -> None:
    configure(directory, num_hidden_layers="3")


def nonsense(directory: Path) -> None:
    configure(directory, num_attention_heads=0)


def own_code(directory: Path) -> None:
    configure(directory, model_type="mine", auto_map={"AutoConfig": "modeling_mine.Config"})


def nameless(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "model_type"}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (missing_file, r"two\.safetensors is missing \(1 of the 2 files"),
        (pointer, "a pointer of git-lfs, not the weights"),
        (adapter, "an adapter of org/base"),
        (adapter_beside, "an adapter of org/base lies beside the model .*merge it into the model"),
        (gguf_folder, r"serve the file itself: .*tiny\.gguf"),
        (no_directory_rights, r"config\.json: Not a directory"),
        (classifier, "Qwen3ForSequenceClassification is not a causal language model"),
        (headless, "a model without a head"),
        (a_string_for_a_number, r"field 'num_hidden_layers'.*\(mend config\.json\)"),
        (nonsense, "model_type 'qwen3'"),
        (own_code, r"model_type 'mine' is made by code in the directory \(auto_map\), which is never run"),
        (nameless, r"no model_type \(say in config\.json what kind"),
    ],
)
def test_what_is_there_is_named(model: Path, spoil: Callable[[Path], None], words: str) -> None:
    spoil(model)
    with pytest.raises((BadCheckpoint, UnsupportedModel)) as caught, named_fault(model, "reading its files"):
        plan(model)
    assert re.search(words, str(caught.value))


def test_whatever_a_library_raises_names_directory_kind_and_step(model: Path) -> None:
    with (
        pytest.raises(UnsupportedModel, match=r"'qwen3'.: trying it: ZeroDivisionError"),
        named_fault(model, "trying it"),
    ):
        _ = 1 / 0
    with pytest.raises(BadCheckpoint, match=r"trying it: No space"), named_fault(model, "trying it"):
        raise OSError(28, "No space left on device")
    with pytest.raises(SecondnatureError, match=r"^as it was$"), named_fault(model, "trying it"):
        raise SecondnatureError("as it was")


def test_a_weight_that_is_no_number_is_named(model: Path) -> None:
    weights = read_weights(model)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    with pytest.raises(BadCheckpoint, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        engine_test.self_test(build(model, weights))


def test_a_text_that_is_another_one_where_it_is_read_on_is_refused(tmp_path: Path) -> None:
    """transformers' scan of Mamba 1 begins anew with each piece."""
    config = JambaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        num_experts_per_tok=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        initializer_range=0.3,
    )
    built = build(save_tiny(config, tmp_path), checkpoint.read(tmp_path))
    with pytest.raises(UnsupportedModel, match=r"in two pieces.*would be another text"):
        engine_test.self_test(built)


def test_a_tokenizer_made_by_code_of_the_directory_is_refused_as_that(tmp_path: Path) -> None:
    tokenizer_for(TEMPLATES["chatml"]).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    about = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | about))
    (tmp_path / "tokenization_mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(
        BadCheckpoint, match=r"made by code in the directory \(auto_map\), which is never run"
    ):
        read_tokenizer(tmp_path)


def test_a_row_that_depends_on_the_others_is_refused(model: Path) -> None:
    """As LongRoPE does, which takes its frequencies by the longest row of a forward."""
    built = build(model, read_weights(model))
    norm = built.get_submodule("model.norm")

    def together(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 1.5 if len(output) > 1 else output

    norm.register_forward_hook(together)
    with pytest.raises(UnsupportedModel, match="who else asks"):
        engine_test.self_test(built)


@pytest.mark.parametrize("equal", [True, False])
def test_tied_in_the_config_and_two_in_the_files(tmp_path: Path, equal: bool) -> None:
    """Equal: one. Different: two, as transformers has it, and as the export has it again."""
    directory = save_tiny(llama_config(tie_word_embeddings=True), tmp_path / "model")

    def both(tensors: Tensors) -> Tensors:
        embedding = tensors["model.embed_tokens.weight"]
        return {**tensors, "lm_head.weight": embedding.clone() if equal else embedding.flip(0).contiguous()}

    rewrite(directory, both)
    weights = read_weights(directory)
    assert ("lm_head.weight" in weights) is not equal
    model = build(directory, weights)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=0, atol=1e-5)
    saved = checkpoint.save(tmp_path / "out", directory, weights, {"version": "w1"})
    assert ("lm_head.weight" in load_file(saved / "model.safetensors")) is not equal


def test_what_older_versions_stored_is_passed_over(model: Path, tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(model, lambda tensors: {**tensors, key: torch.ones(8)})
    assert key not in {spec.key for spec in plan(model)}
    saved = checkpoint.save(tmp_path / "out", model, checkpoint.stream(model), {"version": "w1"})
    assert key in load_file(saved / "model.safetensors"), "what is not ours is kept"


def test_a_fingerprint_is_of_what_is_written(model: Path) -> None:
    first = fingerprint(model)
    assert first.startswith("f2-")
    configure(model, transformers_version="9.9", torch_dtype="float32")
    assert fingerprint(model) == first
    configure(model, rope_theta=77.0)
    assert fingerprint(model) != first


def test_the_context_of_longrope_ends_where_its_frequencies_change(tmp_path: Path) -> None:
    rope = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    about = {"model_type": "phi3", "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
    about |= {"max_position_embeddings": 4096, "original_max_position_embeddings": 256, "rope_scaling": rope}
    about |= {"pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert context_limit(read_config(tmp_path)) == 256
    (tmp_path / "config.json").write_text(json.dumps({**about, "rope_scaling": None}))
    assert context_limit(read_config(tmp_path)) == 4096
