"""Which model a config makes: transformers' own class, or a text part, with nothing in its parameters (any engine).

Parameters are on the meta device, where nothing is allocated or initialised; buffers (rotary frequencies, scales)
are real, made by the model's own constructors. Of a model that also sees, it is the part that answers. Only
config.json is read; nothing is downloaded, no code of the directory is run.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
)

from secondnature.errors import BadCheckpoint, SecondnatureError, UnsupportedModel
from secondnature.model import text_part
from secondnature.model.files import raw_config
from secondnature.model.pieces import parameter_names

__all__ = ["named_fault", "read_config", "shapes", "skeleton"]

_OTHER_HEADS = (
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForPreTraining",
)
"""How architectures end that no answer can be generated with."""


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
    raw, path = raw_config(directory), directory / "config.json"
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise _unknown(path, kind, has_code="auto_map" in raw)
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # noqa: BLE001  (the library checks fields with exceptions of its own kinds)
        raise UnsupportedModel(
            f"{path}: transformers cannot use it: {' '.join(str(e).split())[:300]}", "mend config.json"
        ) from None


def _unknown(path: Path, kind: object, *, has_code: bool) -> UnsupportedModel:
    """Of a model_type that transformers does not know."""
    if kind is None:
        return UnsupportedModel(f"{path}: no model_type", "say in config.json what kind of model it is")
    if has_code:
        return UnsupportedModel(
            f"{path}: model_type {kind!r} is made by code in the directory (auto_map), which is never run",
            "expected a causal language model that transformers knows by itself",
        )
    return UnsupportedModel(
        f"{path}: transformers {transformers.__version__} knows no model_type {kind!r}",
        "upgrade transformers if the model is newer",
    )


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


def shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model, by the first of its names, and its shape; only config.json is read.

    Raises:
        BadCheckpoint, UnsupportedModel: as `read_config`; or it is no causal language model.
    """
    model = skeleton(directory)
    return {names[0]: tuple(model.get_parameter(names[0]).shape) for names in parameter_names(model).values()}
