"""Measure everything that docs/benchmarks.md says, and write it: `make bench`.

    python benchmarks/run.py [--quick] [--only NAME ...] [--model DIR] [--output DIR]
    python benchmarks/run.py --vllm [...]    # those inside vLLM instead, in its environment: `make bench-vllm`
    python benchmarks/run.py --render        # only write the page again from results.json

Figures go to results.json, the page is made from that file alone. With `--only` the others keep their last
figures (with their own date). `--quick` is a smoke test: it needs `--output`, so that its figures never reach
the page.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["KINETO_LOG_LEVEL"], os.environ["TORCH_CPP_LOG_LEVEL"] = "9", "ERROR"  # the profiler is talkative

KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**35)}
"""glibc gives no memory back: or a contender would pay for pages that the one before it, far larger, returned. On a
virtual machine that made steps of the same work three times as slow, and not all of them alike."""
if __name__ == "__main__":
    if not KEEP.items() <= os.environ.items():
        os.execve(
            sys.executable, [sys.executable, *sys.argv], os.environ | KEEP
        )  # read when a process begins
    for name in KEEP:
        del os.environ[name]  # servers that are started here run as users start them

ROOT = Path(__file__).parents[1]
NAMES = (
    *("serving", "engine", "step", "training", "optimizer", "growth", "rounding", "undo", "memory"),
    *("projections", "flatness"),
)
VLLM = (
    *("vllm_write", "vllm_serving", "vllm_reload"),
    *("vllm_checkpoint", "vllm_crash", "vllm_cost"),
)
"""Those that run in vLLM's environment."""
REAL = ("real",)
"""Of a model that is no part of the project: with `--only`."""
RANDOM = ("training", "optimizer", "growth")
"""Benchmarks that make models of the size they want."""
PEERS = {"training": "trl", "optimizer": "apollo_torch"}
"""Modules without which a benchmark has nobody to compare with."""
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def _packages() -> list[str]:
    """What the figures depend on, peers where they are installed."""
    peers = [name.replace("_", "-") for name in PEERS.values() if importlib.util.find_spec(name)]
    if importlib.util.find_spec("vllm"):
        peers += importlib.metadata.packages_distributions()["vllm"][:1]
    return ["secondnature", "torch", "transformers", "numpy", *peers]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", cpu, re.M)
    flags = re.search(r"^flags\s*: (.*)$", cpu, re.M)
    known = flags[1].split() if flags else []
    memory = re.search(r"^MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(), re.M)
    versions = {n: importlib.metadata.version(n) for n in _packages()}
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [f for f in FLAGS if f in known],
        "memory_bytes": int(memory[1]) * 1024 if memory else 0,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_seconds() -> tuple[float, float]:
    """CPU time that the whole machine has used, and this program with its ended children."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    user, nice, system, _, _, irq, softirq, steal = fields
    all_of_it = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    ours = os.times()
    return all_of_it, ours.user + ours.system + ours.children_user + ours.children_system


def source() -> str:
    """The commit that is checked out."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _short(found: Any) -> Any:
    """The same with six significant digits."""
    if isinstance(found, dict):
        return {k: _short(v) for k, v in found.items()}
    if isinstance(found, list):
        return [_short(v) for v in found]
    return float(f"{found:.6g}") if isinstance(found, float) else found


def run(name: str, model: Path, *, quick: bool) -> dict[str, Any]:
    """Measure one: what was found, when, on what and how undisturbed."""
    import transformers
    from common import Settings

    transformers.logging.set_verbosity_error()  # it warns of kernels that no CPU has
    transformers.logging.disable_progress_bar()
    print(f"{name} ...", file=sys.stderr, flush=True)
    begun, (all_before, ours_before) = time.monotonic(), _cpu_seconds()
    measured = importlib.import_module(name).measure(Settings(model, quick))
    seconds, (all_after, ours_after) = time.monotonic() - begun, _cpu_seconds()
    others = ((all_after - all_before) - (ours_after - ours_before)) / seconds / len(os.sched_getaffinity(0))
    print(f"{name}: {seconds:.0f} s, others used {others:.0%} of the CPUs", file=sys.stderr, flush=True)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": source(),
        "seconds": round(seconds, 1),
        "others_cpu": round(max(0.0, others), 4),
        "machine": machine(),
        "model": "random" if name in RANDOM else "embedded" if model.name == "weights" else model.name,
        "measured": _short(measured),
    }


def main() -> int:
    """The command; exit status 1 if a request failed or had no stamp."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="smoke test: small and few, figures mean nothing"
    )
    parser.add_argument(
        "--only", nargs="+", choices=(*NAMES, *VLLM, *REAL), metavar="NAME", help="not all of them"
    )
    parser.add_argument("--vllm", action="store_true", help="those inside vLLM; run it in vLLM's environment")
    parser.add_argument("--model", type=Path, help="a directory, or smollm2 (default: the embedded model)")
    parser.add_argument("--output", type=Path, help="where results.json and benchmarks.md go")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the page again")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind: no server is left behind
    if options.quick and options.output is None:
        parser.error("--quick needs --output: its figures are not for the page")
    chosen = options.only or (VLLM if options.vllm else NAMES)
    results_path = (options.output or ROOT / "benchmarks") / "results.json"
    page_path = (options.output or ROOT / "docs") / "benchmarks.md"
    from page import figures, render

    results: dict[str, Any] = json.loads(results_path.read_text()) if results_path.is_file() else {}
    if not options.render:
        from secondnature import embedded

        model = (options.model or embedded.path()).resolve()
        if options.model == Path("smollm2"):
            from secondnature.model import gguf

            model = gguf.directory_of(gguf.smollm2()).resolve()
        if not (model / "config.json").is_file():
            parser.error(f"{model}: no model there (no config.json)")
        if not set(chosen).isdisjoint(VLLM) and not importlib.util.find_spec("vllm"):
            parser.error("vLLM is not installed here; run `make bench-vllm`")
        missing = [n for n in chosen if n in PEERS and not importlib.util.find_spec(PEERS[n])]
        if missing and not options.quick:
            parser.error(f"{', '.join(missing)}: peers are not installed here; run `make bench`")
        results_path.parent.mkdir(parents=True, exist_ok=True)
        for name in chosen:
            results[name] = run(name, model, quick=options.quick)
            results_path.write_text(json.dumps(results, indent=1) + "\n")
    page_path.write_text(render(results))
    for name, svg in figures(results).items():
        (page_path.parent / "figures").mkdir(exist_ok=True)
        (page_path.parent / "figures" / name).write_text(svg)
    print(f"{page_path}, {results_path}")
    wrong = 0
    for name in ("serving", "vllm_serving"):
        served = results.get(name, {}).get("measured")
        if served and (served["failed"] or served["stamped"] != served["requests"]):
            print(f"{name}: {served['failed']} failed, {served['stamped']} of {served['requests']} stamped")
            wrong = 1
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
