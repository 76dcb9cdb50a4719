"""What can be seen of this machine without a server, and without importing torch (process D)."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from secondnature.cli import vllm
from secondnature.errors import SandboxFailed

__all__ = ["Finding", "environment"]

MIN_FREE_BYTES = 5_000_000_000
NEEDED = {"torch": (2, 6), "transformers": (5, 7), "fastapi": (0, 115), "uvicorn": (0, 30)}
NOT_FOR_VLLM = ("torchvision", "torchaudio", "torchcodec")
"""vLLM's CPU build brings CUDA builds of these, which do not fit its torch."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    name: str
    level: Literal["ok", "warn", "fail"]
    found: str
    hint: str = ""


def environment(home: Path) -> list[Finding]:
    """What can be seen of this machine without a server."""
    version = platform.python_version()
    python = Finding("python", "ok" if sys.version_info >= (3, 11) else "fail", version)
    return [
        python,
        *map(_package, NEEDED),
        *_vllm(),
        _cores(),
        _bf16(),
        _shared_memory(),
        _sandbox(),
        _disk(home),
    ]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package(name: str) -> Finding:
    minimum = NEEDED[name]
    wanted = ".".join(map(str, minimum))
    found = _installed(name)
    if found is None:
        return Finding(name, "fail", f"missing; expected >= {wanted}", "pip install 'secondnature[engine]'")
    numbers = [int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit()]
    if tuple(numbers) < minimum:
        return Finding(name, "fail", f"{found}; expected >= {wanted}", "pip install 'secondnature[engine]'")
    return Finding(name, "ok", found)


def _vllm() -> list[Finding]:
    """Where it is installed: has it the version of the plug-in, and what does not fit it?"""
    found = vllm.installed()
    if found is None:
        return []
    if not vllm.supported(found):
        return [Finding("vllm", "fail", f"{found}; expected {vllm.SUPPORTED}.x", vllm.RECIPE)]
    beside = [name for name in NOT_FOR_VLLM if _installed(name) is not None]
    if beside and (_installed("torch") or "").endswith("+cpu"):
        return [
            Finding(
                "vllm", "warn", f"{found}, beside {', '.join(beside)}", f"pip uninstall {' '.join(beside)}"
            )
        ]
    return [Finding("vllm", "ok", found)]


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0))
    hint = "" if cores > 1 else "answers slow down while a lesson runs: engine and trainer share one core"
    return Finding("cores", "ok" if cores > 1 else "warn", str(cores), hint)


def _bf16() -> Finding:
    """Whether the processor multiplies bf16: the engine computes in fp32 unless it is told otherwise."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return Finding("bf16", "warn", "unknown: no /proc/cpuinfo")
    native = sorted({"amx_bf16", "avx512_bf16", "bf16"} & set(flags))
    if not native:
        return Finding("bf16", "ok", "no instructions: each weight is widened at use")
    faster = "compute_dtype bfloat16 answers faster here, near what fp32 answers"
    return Finding("bf16", "ok", f"{', '.join(native)}; {faster}")


def _shared_memory() -> Finding:
    """The arena needs an anonymous file whose pages are really there."""
    size = 1 << 20
    try:
        file = os.memfd_create("secondnature-doctor")
    except (AttributeError, OSError) as e:
        return Finding("memfd", "fail", f"{e}", "no server can start here: it needs Linux with memfd_create")
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as e:
        return Finding("memfd", "fail", f"{e.strerror}", "give this process more memory")
    finally:
        os.close(file)
    return Finding("memfd", "ok", "works")


def _sandbox() -> Finding:
    """Where generated code is judged."""
    from secondnature.evidence import walls

    try:
        standing = walls()
    except SandboxFailed as e:
        return Finding("sandbox", "fail", e.message, e.hint)
    as_root = "ROOT" in standing
    hint = "run the server as an ordinary user: code in probes runs with its rights" if as_root else ""
    return Finding("sandbox", "warn" if as_root else "ok", ", ".join(standing), hint)


def _disk(home: Path) -> Finding:
    there = next(p for p in (home, *home.parents) if p.exists())
    usage = shutil.disk_usage(there)
    found = f"{usage.free / 1e9:.1f} GB free at {home}"
    if not os.access(there, os.W_OK):
        return Finding("home", "fail", f"{there} cannot be written", "choose another --home")
    if usage.free < MIN_FREE_BYTES:
        return Finding("home", "warn", found, "a checkpoint needs room for two copies of the weights")
    return Finding("home", "ok", found)
