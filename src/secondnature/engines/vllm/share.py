"""The engine's weights as memory in which the trainer can write (vLLM's worker; API server).

At start, when the model is loaded, the headers of all parameters are checked against the plan of names: what cannot
be trained is refused before anything is touched. On CPUs each parameter is then copied into its place in an arena,
and the Parameter object is pointed there: the objects stay the same, so whatever has hold of them computes with the
shared memory, and the memory that they had before is given back. On a GPU the parameters stay where they lie, and
their own allocations are shared (`weights.cuda`). Nothing here imports vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secondnature.errors import ConfigError, UnsupportedModel, WeightsError
from secondnature.model import names
from secondnature.model.load import fingerprint
from secondnature.weights import attach as opening
from secondnature.weights.arena import Arena
from secondnature.weights.cuda import DeviceArena

__all__ = ["Shared", "attach", "share"]

FORMAT = "secondnature-vllm/1"


@dataclass(frozen=True)
class Shared:
    """The weights of a running engine, as seen from one process."""

    arena: Arena
    """The tensors have the engine's names."""
    directory: Path
    """Of the model: its config.json says what the trainer builds around the arena."""

    def manifest(self) -> str:
        """What `attach` needs, as JSON: the model, its fingerprint, and what lies where in whose memory."""
        about = {"format": FORMAT, "model": str(self.directory), "fingerprint": fingerprint(self.directory)}
        return json.dumps({**about, "arena": json.loads(self.arena.manifest())})


@torch.no_grad()
def share(
    model: nn.Module, directory: Path, *, world_size: int = 1, quantization: str | None = None
) -> Shared:
    """Make all parameters of the engine's model an arena; the Parameter objects stay.

    `directory` is the model's; `world_size` and `quantization` are the engine's. Call it before the first request.

    Raises:
        UnsupportedModel: the weights cannot be trained in place; nothing was moved. Or the engine keeps a tensor
            beside its parameters that would no longer follow them.
        WeightsError: no memory; or, on a GPU, memory that cannot be shared.
    """
    parameters = dict(model.named_parameters())
    headers = {name: names.Header.of(parameter) for name, parameter in parameters.items()}
    device = names.device_of(parameters)
    names.plan(directory, headers, device=device, world_size=world_size, quantization=quantization)
    if device == "cuda":
        return Shared(DeviceArena.adopt({n: p.data for n, p in parameters.items()}), directory)
    return Shared(_moved(model, parameters), directory)


def _moved(model: nn.Module, parameters: dict[str, nn.Parameter]) -> Arena:
    """All parameters in an arena of host memory."""
    before = {p.untyped_storage().data_ptr(): name for name, p in parameters.items()}
    for where, tensor in _others(model):
        name = before.get(tensor.untyped_storage().data_ptr())
        if name is not None:
            raise UnsupportedModel(
                f"the engine keeps {where}, which is the memory of its parameter {name}; it would not follow it",
                "this version of vLLM is not supported",
            )
    arena = Arena.reserve({name: parameter.data for name, parameter in parameters.items()})
    for name, parameter in parameters.items():  # one by one: the memory of each is given back at once
        parameter.data = arena.fill(name, parameter.data)
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() != arena.tensors[name].data_ptr() or parameter is not parameters[name]:
            raise UnsupportedModel(
                f"the engine's parameter {name} did not move", "this version of vLLM is not supported"
            )
    return arena


def _others(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the model's modules that are no parameters: buffers and plain attributes, with their names."""
    for path, module in model.named_modules():
        for name, value in (*module._buffers.items(), *vars(module).items()):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.numel():
                yield f"{path}.{name}", value


def attach(manifest: str) -> Shared:
    """Map the weights of the engine that wrote this manifest: no byte is copied.

    Raises:
        WeightsError: it is no such manifest, the engine is gone, or the model's config has changed since.
        BadCheckpoint: the model's config can no longer be read.
    """
    try:
        about: dict[str, Any] = json.loads(manifest)
        found, directory, print_ = about["format"], Path(about["model"]), about["fingerprint"]
        inner = json.dumps(about["arena"])
    except (ValueError, KeyError, TypeError) as e:
        raise WeightsError(f"not a manifest of vLLM's weights: {e!r}", "restart the server") from None
    if found != FORMAT:
        raise WeightsError(f"manifest has format {found!r}; expected {FORMAT!r}", "restart the server")
    if fingerprint(directory) != print_:
        raise WeightsError(
            f"{directory}: config.json is no longer that of the model which is being served",
            "restart the server",
        )
    return Shared(opening.attach(inner), directory)


def model_directory(made: Any) -> Path:
    """Where the files of the model lie that vLLM serves. Raises ConfigError."""
    name = str(made.model_config.model)
    if Path(name).is_dir():
        return Path(name).absolute()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=made.model_config.revision, local_files_only=True))
    except Exception as e:  # noqa: BLE001  (whatever the hub's client finds wrong)
        raise ConfigError(
            f"{name}: no model directory, and not whole in the hub's cache ({type(e).__name__})",
            "download it first, and give vLLM the directory",
        ) from None
