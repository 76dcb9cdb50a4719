# pyright: reportMissingImports=false
"""What training inside a GPU engine's memory rests on: vLLM's operators, shared memory, and their rates.

    python benchmarks/gpu_facts.py [--json FILE]

One line for each fact; ends with 1 if one that must hold does not. On a null GPU (`NULLGPU=1`) copies are judged
and numbers that a kernel should have computed are not. `gpu_battery.sh` runs it first: where memory cannot be
shared, nothing else is worth its time.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_findings import Findings
from torch import Tensor
from torch.nn.functional import rms_norm, silu

NULL = bool(os.environ.get("NULLGPU"))
SIZE = 1024 if NULL else 4096
LIMIT = 0.01
"""Relative difference of an operator from torch's, bf16."""


# -------------------------------------------------------------------------------------------------- the operators
def operators(facts: Findings) -> None:
    """vLLM's, against torch's in fp32: "no kernel image" here means that its libraries lack this card's code."""
    import vllm._C_stable_libtorch  # noqa: F401  (registers them)

    torch.manual_seed(0)
    x = torch.randn(7, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(512, device="cuda", dtype=torch.bfloat16)

    def compare(name: str, found: Tensor, expected: Tensor) -> None:
        difference = float((found.float() - expected).norm() / expected.norm())
        facts.note(f"operator {name} differs by", f"{difference:.1e}", NULL or difference < LIMIT)

    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, 1e-6)
    compare("rms_norm", out, rms_norm(x.float(), (512,), weight.float(), 1e-6))
    half = torch.empty(7, 256, device="cuda", dtype=torch.bfloat16)
    torch.ops._C.silu_and_mul(half, x)
    compare("silu_and_mul", half, silu(x[:, :256].float()) * x[:, 256:].float())
    added, residual = x.clone(), torch.randn_like(x)
    total = added.float() + residual.float()
    torch.ops._C.fused_add_rms_norm(added, residual, weight, 1e-6)
    compare("fused_add_rms_norm", added, rms_norm(total, (512,), weight.float(), 1e-6))
    if importlib.util.find_spec("vllm.vllm_flash_attn._vllm_fa3_C") is None:
        facts.note("FlashAttention 3", "not installed")
        return
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    q, k, v = (torch.randn(64, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    ends = torch.tensor([0, 64], device="cuda", dtype=torch.int32)
    lengths: dict[str, Any] = {
        "max_seqlen_q": 64,
        "max_seqlen_k": 64,
        "cu_seqlens_q": ends,
        "cu_seqlens_k": ends,
    }
    found = flash_attn_varlen_func(q, k, v, causal=True, fa_version=3, **lengths)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) / 8
    hidden = torch.ones(64, 64, device="cuda", dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    compare("FlashAttention 3", found, torch.einsum("hqk,khd->qhd", weights, v.float()))


# ---------------------------------------------------------------------------------------------- the other process
def other() -> None:
    """Map the arena of the first line, then do what each line says."""
    from secondnature.weights.attach import attach

    arena = attach(sys.stdin.readline())
    tensor = arena.tensors["w"]
    print("mapped", flush=True)
    parent = os.getppid()
    for line in sys.stdin:
        what, *rest = line.split()
        answer = "done"
        if what == "fill":  # by a kernel
            with arena.writing():
                tensor.fill_(float(rest[0]))
        elif what == "host":  # as an undo writes
            with arena.writing():
                tensor.copy_(torch.full(tensor.shape, float(rest[0]), dtype=tensor.dtype))
        elif what == "read":
            answer = str(float(tensor.view(-1)[-1].cpu()))
        elif what == "rush":  # writes without rest, until it is killed
            with arena.writing():
                print("writing", flush=True)
                while os.getppid() == parent:
                    tensor.add_(1)
        print(answer, flush=True)


class Other:
    """That process, from here."""

    def __init__(self, manifest: str) -> None:
        begun = time.perf_counter()
        words = [sys.executable, __file__, "other"]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.say(manifest)
        heard = self.hear()
        if heard != "mapped":
            raise SystemExit(f"another process could not map the memory: it said {heard!r}")
        self.started_s = time.perf_counter() - begun

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def do(self, text: str) -> str:
        self.say(text)
        return self.hear()


# -------------------------------------------------------------------------------------------------- shared memory
def sharing(facts: Findings) -> None:
    """What another process writes arrives, also in a graph that was captured before."""
    from secondnature.errors import WeightsError
    from secondnature.weights import ipc
    from secondnature.weights.cuda import DeviceArena

    w = torch.ones(SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
    arena = DeviceArena.adopt({"w": w, "small": torch.ones(64, device="cuda", dtype=torch.bfloat16)})
    exported = json.loads(arena.manifest())["storages"]
    facts.note("segments: size, offset of each", [[s["size"], s["offset"]] for s in exported])
    free = torch.cuda.mem_get_info()[0]
    them = Other(arena.manifest())
    facts.note("another process: start, import torch, map (s)", round(them.started_s, 2))
    facts.note("memory of its context (MiB)", (free - torch.cuda.mem_get_info()[0]) >> 20)
    them.do("fill 3")
    found = float(w[-1, -1].cpu())
    facts.note("a kernel's write arrives", found, NULL or found == 3)
    them.do("host 4")
    found = float(w.cpu()[-1, -1])
    facts.note("a copy from the host arrives", found, found == 4)
    facts.note("writes begun and done", list(arena.writes), arena.writes == (2, 2))
    graphs(facts, w, them)
    os.kill(them.process.pid, signal.SIGKILL)  # in the middle of a write
    them.process.wait()
    begun, done = arena.writes
    facts.note("a killed writer leaves the epoch odd", [begun, done], begun == done + 1)
    arena.close_torn_write()
    w.fill_(7)
    found = float((w.float() @ w.float())[0, 0].cpu()) / SIZE
    facts.note("after that the owner computes", found, NULL or found == 49)
    them = Other(arena.manifest())
    them.do("host 8")
    found = float(w.cpu()[0, 0])
    facts.note("a second process maps and writes", found, found == 8)
    try:
        ipc.open_(exported[0])
        facts.note("the owner opens its own handle", "no error")
    except WeightsError as e:
        facts.note("the owner opens its own handle", e.message)
    them.process.kill()
    them.process.wait()


def graphs(facts: Findings, w: Tensor, them: Other) -> None:
    """A captured graph computes with what was written since; its time beside a writer that never rests."""
    x = torch.ones(8, SIZE, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            y = x @ w
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x @ w
    found: list[float] = []
    for value in (1, 2, 5):
        them.do(f"fill {value}")
        graph.replay()
        torch.cuda.synchronize()
        found.append(float(y[0, 0].cpu()) / SIZE)
    facts.note("a graph replayed after writes of 1, 2, 5 computes with", found, NULL or found == [1, 2, 5])

    def replay_ms(count: int = 200) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            graph.replay()
        torch.cuda.synchronize()
        return round((time.perf_counter() - begun) / count * 1e3, 4)

    alone = replay_ms()
    them.do("rush")
    time.sleep(0.3)
    facts.note("one replay alone, and beside a writer (ms)", [alone, replay_ms()])


def rates(facts: Findings) -> None:
    """What an undo and a content id cost."""
    from secondnature.weights import content

    n = 1 << (26 if NULL else 29)
    host, device = torch.empty(n, dtype=torch.uint8), torch.empty(n, dtype=torch.uint8, device="cuda")

    def gb_per_s(work: Callable[[], Any]) -> float:
        work()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return round(n / (time.perf_counter() - begun) / 1e9, 2)

    facts.note("host to device, pageable (GB/s)", gb_per_s(lambda: device.copy_(host)))
    facts.note("device to host, pageable (GB/s)", gb_per_s(lambda: host.copy_(device)))
    facts.note("sha256, one thread (GB/s)", gb_per_s(lambda: hashlib.sha256(host.numpy().data).digest()))
    name = f"content id of a tensor on the card, {content.MAX_THREADS} threads (GB/s)"
    facts.note(name, gb_per_s(lambda: content.tensor_digest("w", device)))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    facts = Findings("FACT")
    facts.note("card", torch.cuda.get_device_name())
    facts.note("torch", torch.__version__)
    operators(facts)
    sharing(facts)
    rates(facts)
    if options.json:
        found = {"null": NULL, "broken": facts.broken, **facts.values}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return bool(facts.broken)


if __name__ == "__main__":
    if sys.argv[1:] == ["other"]:
        other()
    else:
        raise SystemExit(main())
