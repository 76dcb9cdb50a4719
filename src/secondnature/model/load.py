"""A Hugging Face causal language model whose parameters are somebody else's memory (engine and trainer).

`plan` reads the headers of the safetensors files and checks them against the config; `build` makes the model with
its parameters on the meta device, where nothing is allocated or initialised, and puts the given tensors (views of
the arena) in the place of every parameter. Buffers (rotary frequencies, scales) are real from the start, made by
the model's own constructors; those that a checkpoint stores (a router's correction) are read from it. Plan,
validate, apply: what is missing, mis-shaped or left on meta is an error that names the tensor. Nothing is
downloaded, no code of a model directory is run, nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import re
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from secondnature.errors import BadCheckpoint, SecondnatureError, UnsupportedModel
from secondnature.model import limits, text_part
from secondnature.model.files import DTYPES, Header, headers, quantization, raw_config
from secondnature.model.pieces import Piece, TensorSpec, claimed, parameter_names, pieces
from secondnature.model.upcast import compute_at_use

__all__ = [
    "TensorSpec",
    "build",
    "bystanders",
    "context_limit",
    "fingerprint",
    "named_fault",
    "plan",
    "read_config",
    "shapes",
    "skeleton",
]

_OTHER_HEADS = (
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForPreTraining",
)
"""How architectures end that no answer can be generated with."""
_NEVER_READ = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"^mtp\.")
"""Keys that transformers reads for no model: buffers that older versions stored, heads that only guess ahead."""
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
_BLOCK_ELEMENTS = 2**22


@contextlib.contextmanager
def named_fault(directory: Path, step: str) -> Generator[None]:
    """Whatever a library raises in here becomes an error that names the directory, its kind of model and the step.

    Raises:
        UnsupportedModel: in the place of what is no error of ours.
        BadCheckpoint: in the place of what the disk says.
    """
    try:
        yield
    except SecondnatureError:
        raise
    except OSError as e:
        raise BadCheckpoint(f"{directory}: {step}: {e.strerror or e}", "mend the disk or the files") from e
    except Exception as e:
        try:
            kind = raw_config(directory).get("model_type")
        except SecondnatureError:
            kind = None
        said = str(e).splitlines()
        raise UnsupportedModel(
            f"{directory} (model_type {kind!r}): {step}: {type(e).__name__}: {said[0] if said else ''}",
            "mend config.json if it is wrong; else this architecture cannot be served yet",
        ) from e


def read_config(directory: Path) -> PretrainedConfig:
    """The model's config, from `config.json` alone.

    Raises:
        BadCheckpoint: no readable config.json.
        UnsupportedModel: transformers does not know the architecture, or cannot use what the config says.
    """
    raw = raw_config(directory)
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # noqa: BLE001  (the library checks fields with exceptions of its own kinds)
        raise UnsupportedModel(
            f"{directory / 'config.json'}: model_type {raw.get('model_type')!r} cannot be read: "
            f"{' '.join(str(e).split())[:300]}",
            "expected a causal language model that this transformers version knows",
        ) from None


def _language_config(directory: Path, config: PretrainedConfig) -> PretrainedConfig:
    """The config of the part that answers: of a model that also sees, the text part, where it can stand alone.

    Raises:
        UnsupportedModel: it is another kind of model.
    """
    raw = raw_config(directory)
    architectures = [str(a) for a in raw.get("architectures") or []]
    wrong = [a for a in architectures if a.endswith(_OTHER_HEADS)]
    if wrong or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{directory}: {', '.join(architectures) or type(config).__name__} is not a causal language model",
            "expected a model that continues text (...ForCausalLM)",
        )
    text: Any = config.get_text_config(decoder=True)
    if text is config or not _speaks(text):
        return config
    # the whole model's word counts, too; where the files hold both and they differ, they are two (`_sorted`)
    text.tie_word_embeddings = any(getattr(c, "tie_word_embeddings", False) for c in (text, config))
    return text


def _speaks(config: PretrainedConfig) -> bool:
    """Whether a causal language model can be made from it."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or config.model_type in text_part.KINDS


_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def _parameters_on_meta() -> Generator[None]:
    """Parameters that this thread's modules register have no memory; buffers are real."""
    owner = threading.get_ident()

    def hollow(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != owner:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        handle = register_module_parameter_registration_hook(hollow)  # pyright: ignore[reportArgumentType]
        try:
            yield
        finally:
            handle.remove()


def skeleton(directory: Path) -> nn.Module:
    """The model with every parameter on the meta device; buffers are real, tied parameters are one object.

    Raises:
        BadCheckpoint, UnsupportedModel: as `read_config`; or it is no causal language model.
    """
    whole = read_config(directory)
    config = _language_config(directory, whole)
    last: Exception | None = None
    for attention in ("sdpa", "eager"):
        try:
            with _parameters_on_meta():
                model = _made(copy.deepcopy(config), attention)
        except Exception as e:  # noqa: BLE001  (constructors meet what the config says with any exception)
            last = last or e
            continue
        model.tie_weights()
        model.__dict__["_is_part"] = config is not whole
        return model.eval()
    said = str(last).splitlines()
    if not _speaks(config):
        raise UnsupportedModel(
            f"{directory}: {type(config).__name__} is not a causal language model: {said[0] if said else ''}",
            "expected an architecture that AutoModelForCausalLM can make",
        )
    raise UnsupportedModel(
        f"{directory} (model_type {config.model_type!r}): making the model: {type(last).__name__}: "
        f"{said[0] if said else ''}",
        "mend config.json if it is wrong; else this architecture cannot be served yet",
    )


def _made(config: PretrainedConfig, attention: str) -> Any:
    if config.model_type in text_part.KINDS:
        return text_part.TextPart(config, attention=attention)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=False
    )


@dataclass(frozen=True)
class _Layout:
    """What the files hold, sorted."""

    specs: list[TensorSpec]
    buffers: dict[str, Piece]
    """Buffers that the model wants from its checkpoint: stored, never trained."""
    beside: dict[str, Path]
    """Every key that is no parameter's, and its file."""


def plan(directory: Path) -> list[TensorSpec]:
    """Every parameter of the model in `directory` and where it is stored; reads headers only.

    (But for parameters that the config ties and the files hold apart: whether they are equal is looked up.)

    Raises:
        BadCheckpoint: a tensor is missing, has another shape than the config says, or belongs to no parameter.
        UnsupportedModel: the architecture or a dtype cannot be used.
    """
    return _layout(directory).specs


def bystanders(directory: Path) -> dict[str, Path]:
    """What a checkpoint holds beside the language model's parameters (a vision tower, say): key -> file.

    Raises: as `plan`.
    """
    return _layout(directory).beside


def _layout(directory: Path, model: nn.Module | None = None) -> _Layout:
    quantised = quantization(raw_config(directory))
    model = skeleton(directory) if model is None else model
    files = headers(directory)
    try:
        return _sorted(directory, model, files)
    except (BadCheckpoint, UnsupportedModel):
        if quantised is None:
            raise
        raise UnsupportedModel(
            f"{directory}: the weights are quantised ({quantised}); expected plain bfloat16, float16 or float32",
            "quantised weights cannot be trained in place: serve the model as it was before",
        ) from None


def _sorted(directory: Path, model: nn.Module, files: Mapping[str, Header]) -> _Layout:
    claims = claimed(model, files)
    specs: list[TensorSpec] = []
    known: set[str] = set()
    for names in parameter_names(model).values():
        shape = tuple(model.get_parameter(names[0]).shape)
        held = {n: pieces(n, shape, claims[n], files) for n in names if n in claims}
        if not held:
            raise _missing(directory, names[0])
        known.update(p.key for parts in held.values() for p in parts)
        first, *others = held
        apart = [n for n in others if not _equal(held[first], held[n])]
        specs.append(TensorSpec(names[0], shape, held[first][0].dtype, held[first]))
        specs += [TensorSpec(n, shape, held[n][0].dtype, held[n]) for n in apart]
    buffers: dict[str, Piece] = {}
    for name in model.state_dict().keys() - {n for names in parameter_names(model).values() for n in names}:
        if name not in claims:
            raise _missing(directory, name)
        (buffers[name],) = pieces(name, tuple(model.get_buffer(name).shape), claims[name], files)
    beside = {k: header.file for k, header in files.items() if k not in known}
    strangers = [k for k in beside if k not in {p.key for p in buffers.values()} and not _not_read(model, k)]
    if strangers:
        raise BadCheckpoint(
            f"{beside[strangers[0]]}: tensor {strangers[0]} belongs to no parameter of the model"
            + (f" (and {len(strangers) - 1} more)" if len(strangers) > 1 else ""),
            "config.json and the weights belong to different models",
        )
    return _Layout(specs, buffers, beside)


def _missing(directory: Path, name: str) -> BadCheckpoint:
    architectures = ", ".join(map(str, raw_config(directory).get("architectures") or []))
    if architectures.endswith("Model"):
        return BadCheckpoint(
            f"{directory}: tensor {name} is missing; the files are of {architectures}, a model without a head",
            "expected a model that continues text (...ForCausalLM)",
        )
    return BadCheckpoint(f"{directory}: tensor {name} is missing", "is the checkpoint complete?")


def _not_read(model: Any, key: str) -> bool:
    """Whether transformers, too, leaves this tensor of the files alone."""
    patterns = [*_NEVER_READ, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])]
    if any(re.search(pattern, key) for pattern in patterns):
        return True
    if not model.__dict__["_is_part"]:
        return False
    text = ("model.language_model.", "language_model.", "model.layers.", "model.embed_tokens.", "model.norm.")
    return not key.startswith((*text, "lm_head."))


def _equal(one: Sequence[Piece], other: Sequence[Piece]) -> bool:
    """Whether two tensors of the files are the same once they are rounded to bf16; read block by block."""
    if len(one) != 1 or len(other) != 1:
        return False
    return _equal_files(_seen(one[0]), _seen(other[0]))


def _seen(piece: Piece) -> tuple[Path, str, int, int]:
    found = piece.file.stat()
    return piece.file, piece.key, found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=16)
def _equal_files(one: tuple[Path, str, int, int], other: tuple[Path, str, int, int]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_rounded(*one[:2]), _rounded(*other[:2]), strict=True))


def _rounded(file: Path, key: str) -> Iterator[Tensor]:
    with safe_open(file, framework="pt") as stored:
        part = stored.get_slice(key)
        num, *rest = part.get_shape()
        step = max(1, _BLOCK_ELEMENTS // max(1, torch.Size(rest).numel()))
        for start in range(0, num, step):
            yield part[start : start + step].to(torch.bfloat16)


def shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model, by the first of its names, and its shape; only config.json is read.

    Raises:
        BadCheckpoint, UnsupportedModel: as `read_config`; or it is no causal language model.
    """
    model = skeleton(directory)
    return {names[0]: tuple(model.get_parameter(names[0]).shape) for names in parameter_names(model).values()}


def build(
    directory: Path, weights: Mapping[str, Tensor], *, compute_dtype: torch.dtype | None = None
) -> nn.Module:
    """The model of `directory` around the given tensors, which are not copied.

    Read are its config.json and, where the model wants buffers from its checkpoint, those. Every parameter is a
    view of `weights[name]` (names as in `plan`; a tied parameter needs one of its names, and is untied by more), so
    that a write into that memory is a write into the model. Weights are computed with in `compute_dtype`, cast at
    use (`model/upcast.py`); None: float32 on CPUs, the weights' own dtype elsewhere. The model is in eval mode.

    Raises:
        BadCheckpoint: a tensor is missing, mis-shaped or superfluous.
        UnsupportedModel: the architecture, a dtype or a buffer cannot be handled.
    """
    model = skeleton(directory)
    replaced: dict[str, nn.Parameter] = {}
    groups = list(parameter_names(model).values())
    for names in groups:
        given = [n for n in names if n in weights]
        if not given:
            raise BadCheckpoint(f"tensor {names[0]} was not given", "is the checkpoint complete?")
        for name in given:
            _check_given(name, weights[name], tuple(model.get_parameter(names[0]).shape))
            replaced[name] = nn.Parameter(weights[name], requires_grad=False)
        replaced |= {n: replaced[given[0]] for n in names if n not in given}
    strangers = sorted(set(weights) - set(replaced))
    if strangers:
        raise BadCheckpoint(
            f"tensor {strangers[0]} belongs to no parameter of the model", "wrong model directory?"
        )
    for path, module in model.named_modules():
        for name, old in module._parameters.items():
            if old is not None:
                module._parameters[name] = replaced[f"{path}.{name}" if path else name]
    first = replaced[groups[0][0]]
    device = first.device
    _fill_buffers(directory, model, device)
    compute_at_use(model, compute_dtype or (torch.float32 if device.type == "cpu" else first.dtype))
    _check_wiring(model, weights)
    return model


def _check_given(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    """Raises BadCheckpoint, UnsupportedModel: it cannot be the parameter of this shape."""
    if tuple(tensor.shape) != wanted:
        raise BadCheckpoint(f"tensor {name} has shape {tuple(tensor.shape)}; the config says {wanted}")
    if tensor.dtype not in DTYPES.values():
        raise UnsupportedModel(f"tensor {name} is {tensor.dtype}; expected bfloat16 or float32")
    if tensor.is_meta:
        raise BadCheckpoint(f"tensor {name} has no memory (meta device)", "give real tensors")


def _fill_buffers(directory: Path, model: nn.Module, device: torch.device) -> None:
    """Buffers that a checkpoint stores get its values; all of them move to the weights' device."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = model.state_dict().keys() - parameters.keys()
    stored = _layout(directory, model).buffers if wanted else {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            found = stored.get(f"{path}.{name}" if path else name)
            value = buffer
            if found is not None:
                with safe_open(found.file, framework="pt") as file:
                    value = file.get_tensor(found.key).to(buffer.dtype)
            module._buffers[name] = value.to(device)
        for name, value in vars(module).items():  # some keep a constant as a plain attribute
            if isinstance(value, Tensor) and value.device != device:
                setattr(module, name, value.to(device))


def _check_wiring(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Nothing on meta, every parameter the very memory that was given."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            raise UnsupportedModel(f"parameter {name} has no memory")
        if name in weights and parameter.data_ptr() != weights[name].data_ptr():
            raise UnsupportedModel(
                f"parameter {name} is not the memory it was given", "is it tied to another one?"
            )
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise UnsupportedModel(f"buffer {name} has no memory")


def context_limit(source: Path | PretrainedConfig) -> int:
    """How many tokens the model can read, prompt and answer together."""
    return limits.context_limit(read_config(source) if isinstance(source, Path) else source)


def fingerprint(directory: Path) -> str:
    """f2- and 64 hex digits that name the architecture, whatever version of transformers reads it.

    Over config.json as it is written, names and shapes of the parameters, and the values of stored buffers.
    """
    config = {k: v for k, v in raw_config(directory).items() if k not in _VOLATILE}
    model = skeleton(directory)
    shapes = [[n, list(p.shape)] for n, p in model.named_parameters()]
    text = json.dumps([config, shapes], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode())
    if len(model.state_dict()) > len(dict(model.named_parameters(remove_duplicate=False))):
        for name, piece in sorted(_layout(directory, model).buffers.items()):
            with safe_open(piece.file, framework="pt") as stored:
                value: Tensor = stored.get_tensor(piece.key)
            digest.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return "f2-" + digest.hexdigest()
