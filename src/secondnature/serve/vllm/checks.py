# pyright: reportMissingImports=false
"""What cannot be served and trained is refused before anything is loaded (vLLM's API server).

Called when vLLM has resolved its configuration and started nothing yet. In the API server the home is opened, and
so locked, at the same moment: a second server on it ends here.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any, Literal

from secondnature import config
from secondnature.config import Settings
from secondnature.engines.vllm.share import model_directory
from secondnature.errors import BadCheckpoint, ConfigError, SecondnatureError, UnsupportedModel, WeightsError
from secondnature.lessons.home import Home
from secondnature.serve.vllm import card

__all__ = ["Opened", "check", "install", "opened"]


class Opened:
    """The home of this server, locked, and the settings in force."""

    def __init__(self, settings: Settings, home: Home) -> None:
        self.settings = settings
        self.home = home


_OPENED: list[Opened] = []


def opened() -> Opened:
    """What `install`'s check opened in this process. Raises ConfigError: it was never asked to."""
    if not _OPENED:
        raise ConfigError(
            "vLLM's configuration was never checked", "start it with `secondnature serve --engine vllm`"
        )
    return _OPENED[0]


def install() -> None:
    """Check every configuration that vLLM makes from now on; later calls change nothing."""
    from vllm.engine.arg_utils import EngineArgs

    if hasattr(EngineArgs, "secondnature"):
        return
    EngineArgs.secondnature = True
    create = EngineArgs.create_engine_config

    @functools.wraps(create)
    def create_and_check(self: Any, usage_context: Any = None, **kwargs: Any) -> Any:
        from vllm.platforms import current_platform

        try:
            _check_arguments(self)
            if current_platform.is_cuda():
                card.plan_memory(self)
            made = create(self, usage_context, **kwargs)
            check(made)
            if getattr(usage_context, "name", "") == "OPENAI_API_SERVER":
                _open(made, self)
        except SecondnatureError as e:
            raise SystemExit(f"secondnature: {e.type}: {e}") from None
        return made

    EngineArgs.create_engine_config = create_and_check


def _open(made: Any, arguments: Any) -> None:
    """Lock the home, as an API server."""
    count = int(getattr(arguments, "_api_process_count", 1))
    if count > 1:
        raise ConfigError(
            f"{count} API servers share the engine; expected 1: one of them has to lead the lessons",
            "start it with --api-server-count 1",
        )
    settings = config.load()
    if not _OPENED:
        _OPENED.append(Opened(settings, Home(settings.home)))


Refusal = tuple[bool, str, str]
"""(is it so, what was found, what to do)."""


def _refuse(*refusals: Refusal) -> None:
    for wrong, found, hint in refusals:
        if wrong:
            raise ConfigError(f"vLLM cannot be trained in place as configured: {found}", hint)


def _sleeps(where: Any) -> Refusal:
    return (
        bool(where.enable_sleep_mode),
        "sleep mode is on: its memory cannot be shared",
        "leave --enable-sleep-mode out",
    )


def _check_files(directory: Path) -> None:
    """Are there weights that we read? Raises BadCheckpoint."""
    if not list(directory.glob("*.safetensors")):
        raise BadCheckpoint(
            f"{directory}: no safetensors; expected the weights that vLLM serves",
            "pickled weights (.bin, .pt) are never read: export with save_pretrained",
        )


def _check_arguments(arguments: Any) -> None:
    """What vLLM, too, would refuse while it makes its configuration, at length and without a hint: said before it.

    Raises:
        ConfigError, UnsupportedModel, BadCheckpoint: as `check`.
    """
    from vllm.platforms import current_platform

    from secondnature.model import names

    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        _refuse((True, f"it runs on {current_platform.device_name}", "expected CPUs, or a GPU with CUDA"))
    _refuse(_sleeps(arguments))
    if current_platform.is_cuda():
        _refuse(*card.refusals(arguments, os.environ))
    directory = Path(str(arguments.model))
    if not directory.is_dir():
        return
    spread = arguments.tensor_parallel_size * arguments.pipeline_parallel_size * arguments.data_parallel_size
    names.preflight(directory, device=_device(), world_size=spread, quantization=arguments.quantization)
    _check_files(directory)


def _device() -> Literal["cpu", "cuda"]:
    from vllm.platforms import current_platform

    return "cpu" if current_platform.is_cpu() else "cuda"


def check(made: Any) -> None:
    """Can the model be served and trained as this `VllmConfig` says?

    Raises:
        UnsupportedModel, BadCheckpoint: the model, its dtype, or how it is spread or packed.
        ConfigError: an option that would change weights, or compute with others, behind the log's back.
        WeightsError: not enough memory for the arena.
    """
    from vllm import envs

    from secondnature.model import names

    model, parallel = made.model_config, made.parallel_config
    refusals = (
        (made.lora_config is not None, "LoRA adapters are enabled", "leave --enable-lora out"),
        (made.speculative_config is not None, "speculative decoding is on", "leave --speculative-config out"),
        (
            made.kv_transfer_config is not None,
            "keys and values are kept outside the engine, where lessons cannot invalidate them",
            "leave --kv-transfer-config and --kv-offloading-size out",
        ),
        (
            getattr(made, "weight_transfer_config", None) is not None,
            "vLLM's own weight transfer is on: it would change weights without a lesson",
            "leave --weight-transfer-config out",
        ),
        _sleeps(model),
        (
            bool(envs.VLLM_SERVER_DEV_MODE),
            "VLLM_SERVER_DEV_MODE is set: its routes change weights without a lesson and without a key",
            "unset VLLM_SERVER_DEV_MODE",
        ),
        (
            str(getattr(model, "model_impl", "auto")).rsplit(".", 1)[-1].lower() == "transformers",
            "--model-impl transformers is set; expected vLLM's own model",
            "leave --model-impl out",
        ),
        (
            model.runner_type != "generate",
            f"the model is run for {model.runner_type}; lessons teach one that generates",
            "leave --runner out",
        ),
        (
            _sees(made),
            "the model also reads images",
            "start it with --language-model-only: text is trained, images cannot be served meanwhile",
        ),
    )
    _refuse(*refusals)
    directory = model_directory(made)
    names.preflight(
        directory,
        device=_device(),
        dtype=model.dtype,
        world_size=parallel.world_size * parallel.data_parallel_size,
        quantization=model.quantization,
    )
    _check_files(directory)
    if _device() == "cpu":
        _check_attention(made)
        _check_memory(directory, model.dtype.itemsize)


MAX_QUERIES_PER_KEY = 16
"""In vLLM's attention on CPUs: with more, its worker ends at the first batch (cpu_attn_impl.hpp)."""


def _sees(made: Any) -> bool:
    """A model with images, and images are not switched off."""
    multimodal = made.model_config.multimodal_config
    return multimodal is not None and not getattr(multimodal, "language_model_only", False)


def _check_attention(made: Any) -> None:
    """Has vLLM a kernel for such heads? It finds out when it is asked. Raises UnsupportedModel."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    found, known = int(made.model_config.get_head_size()), CPUAttentionBackend.get_supported_head_sizes()
    if found not in known:
        raise UnsupportedModel(
            f"the attention's heads are {found} wide; on CPUs vLLM expects one of {', '.join(map(str, known))}",
            "serve it with the local engine (`secondnature serve`)",
        )
    queries = int(made.model_config.hf_text_config.num_attention_heads)
    group = queries // int(made.model_config.get_total_num_kv_heads())
    if group > MAX_QUERIES_PER_KEY:
        raise UnsupportedModel(
            f"{group} heads of queries share one of keys; on CPUs vLLM expects {MAX_QUERIES_PER_KEY} at most",
            "serve it with the local engine (`secondnature serve`)",
        )


def _check_memory(directory: Path, itemsize: int) -> None:
    """While the weights move, one of them is there twice. Raises WeightsError."""
    from secondnature.model.load import shapes

    sizes = [math.prod(shape) * itemsize for shape in shapes(directory).values()]
    needed, free = sum(sizes) + max(sizes), _free_bytes()
    if free < needed:
        raise WeightsError(
            f"the weights need {needed:,} bytes (one copy, and the largest matrix twice while it moves); "
            f"{free:,} bytes of memory are free",
            "free memory, raise the container's limit, or serve a smaller model",
        )


def _free_bytes() -> int:
    """Memory that this process may still take: the machine's, or what its container leaves."""
    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return free
