"""The arena between two processes with torch's own CUDA IPC."""

from __future__ import annotations

from null_gpu import NullGpu

OWNER = """
import json, os, subprocess, sys
import torch
from secondnature.weights.attach import attach, counters
from secondnature.weights.content import content_id
from secondnature.weights.cuda import DeviceArena

torch.manual_seed(0)
host = {"a": torch.randn(512, 300).bfloat16(), "b": torch.randn(7, 5), "c": torch.randn(64).bfloat16()}
arena = DeviceArena.adopt({name: tensor.cuda() for name, tensor in host.items()})
first = content_id(arena.tensors)
assert first == content_id(host)
own = attach(arena.manifest())
assert all(own.tensors[name] is tensor for name, tensor in arena.tensors.items())

def other(code, **variables):
    return subprocess.run([sys.executable, "-c", code], input=arena.manifest(), text=True, capture_output=True,
        env={**os.environ, **variables}, timeout=200)
"""

WRITER = """
import sys, torch
from secondnature.weights.attach import attach, counters
manifest = sys.stdin.read()
assert counters(manifest).writes == (0, 0)
assert not torch.cuda.is_initialized()
arena = attach(manifest)
with arena.writing():
    arena.tensors["a"].copy_(torch.full((512, 300), 3.0))
    assert counters(manifest).writes == (1, 0)
"""


def test_another_process_writes_and_an_undo_restores_the_bytes(null_gpu: NullGpu) -> None:
    code = f"""{OWNER}
done = other({WRITER!r})
assert done.returncode == 0, done.stderr
assert arena.writes == (1, 1)
assert bool((arena.tensors["a"].cpu() == 3).all()), arena.tensors["a"].cpu()
assert content_id(arena.tensors) != first
arena.write(host)
assert content_id(arena.tensors) == first
assert arena.writes == (2, 2)
print("all of it")
"""
    done = null_gpu.run("python3", "-c", code)
    assert "all of it" in done.stdout, done.stdout


def test_who_sees_another_card_is_refused(null_gpu: NullGpu) -> None:
    code = f"""{OWNER}
reader = "import sys; from secondnature.weights.attach import attach; attach(sys.stdin.read())"
print(other(reader, NULLGPU_UUID="7").stderr)
"""
    done = null_gpu.run("python3", "-c", code)
    assert "WeightsError: the weights lie on GPU" in done.stdout, done.stdout
    assert "give server and trainer the same CUDA_VISIBLE_DEVICES" in done.stdout


def test_a_device_that_fails_leaves_the_epoch_odd(null_gpu: NullGpu) -> None:
    fault = null_gpu.folder / "fault"
    code = f"""{OWNER}
from pathlib import Path
from secondnature.errors import WeightsError
from secondnature.train.device import is_lost
fault = Path({str(fault)!r})
try:
    with arena.writing():
        arena.tensors["b"].copy_(torch.zeros(7, 5))
        fault.touch()
except WeightsError as e:
    print("said:", e)
assert arena.writes == (1, 0)
assert is_lost()
fault.unlink()
arena.close_torn_write()
arena.write(host)
assert arena.writes == (2, 2)
assert content_id(arena.tensors) == first
"""
    done = null_gpu.run("python3", "-c", code, variables={"NULLGPU_FAULT": str(fault)})
    assert "said: the GPU failed while weights were written: CUDA error" in done.stdout, done.stdout
    assert done.returncode == 0, done.stdout


def test_what_came_from_another_process_cannot_be_an_arena(null_gpu: NullGpu) -> None:
    foreign = """
import sys
from secondnature.weights.attach import attach
from secondnature.weights.cuda import DeviceArena
DeviceArena.adopt(attach(sys.stdin.read()).tensors)
"""
    done = null_gpu.run("python3", "-c", f"{OWNER}\nprint(other({foreign!r}).stderr)")
    assert "WeightsError: tensor a: its memory cannot be shared" in done.stdout, done.stdout


def test_a_tensor_on_the_host_is_refused(null_gpu: NullGpu) -> None:
    done = null_gpu.run("python3", "-c", f'{OWNER}\nDeviceArena.adopt({{**arena.tensors, "d": host["a"]}})')
    assert "WeightsError: tensor d: its memory is on cpu; expected a GPU's" in done.stdout, done.stdout


def test_nothing_holds_a_second_copy_in_host_memory(null_gpu: NullGpu) -> None:
    """Of 134 MB on the card: content id, delta and undo take a few times the largest tensor of the host."""
    code = """
import gc
from pathlib import Path
import torch
from secondnature.weights import delta
from secondnature.weights.content import content_id
from secondnature.weights.cuda import DeviceArena

def kilobytes(key):
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))

class Spec:
    shape, dtype = (4096, 1024), torch.bfloat16

def one(i):
    return torch.full((4096, 1024), float(i)).bfloat16()

names = [f"layer{i:02}" for i in range(16)]
arena = DeviceArena.reserve_on(torch.device("cuda", 0), {name: Spec for name in names})
for i, name in enumerate(names):
    arena.fill(name, one(i))
first = content_id(arena.tensors)

def measured(step):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    result = step()
    return result, (kilobytes("VmHWM") - before) * 1024

largest = 4096 * 1024 * 2
with arena.writing():
    arena.tensors["layer03"].copy_(one(50))
found = {}
_, found["id"] = measured(lambda: content_id(arena.tensors))
path = Path("FOLDER") / "delta"
before = ((n, one(i)) for i, n in enumerate(names))
written, found["delta"] = measured(lambda: delta.write(path, before, arena.tensors))
assert written.base == first
_, found["undo"] = measured(lambda: arena.write((n, one(i)) for i, n in enumerate(names)))
assert content_id(arena.tensors) == first
print(arena.nbytes, {k: round(v / largest, 1) for k, v in found.items()})
assert arena.nbytes > 100_000_000 and all(x < 8 * largest for x in found.values()), found
""".replace("FOLDER", str(null_gpu.folder))
    done = null_gpu.run("python3", "-c", code)
    assert done.returncode == 0, done.stdout
    print(done.stdout)
