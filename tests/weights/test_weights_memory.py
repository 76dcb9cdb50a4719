"""No step holds a second copy of the weights: a delta, a replay and a checkpoint beside an arena of 200 MB.

Beside one on a GPU too, played by files: what a step adds is bounded by the largest tensor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from secondnature.model.load import shapes

CODE = """
import json, sys
import torch
from pathlib import Path
from fake_gpu import fake_gpu
from secondnature.weights import checkpoint, delta
from secondnature.weights.arena import Arena
from secondnature.weights.content import content_id
from secondnature.weights.cuda import DeviceArena

def kilobytes(key):
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))

def measured(step):
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = kilobytes("VmRSS")
    result = step()
    return result, kilobytes("VmHWM") - before

source, work = Path(sys.argv[1]), Path(sys.argv[2])
specs = checkpoint.specs(source)
if sys.argv[3] == "gpu":
    card = fake_gpu(work)
    gpu = card.__enter__()
    place = lambda s: gpu.allocate(torch.Size(s.shape).numel() * s.dtype.itemsize).view(s.dtype).view(s.shape)
    arena = DeviceArena.adopt({name: place(spec) for name, spec in specs.items()})
else:
    arena = Arena.reserve(specs)
largest = max(tensor.nbytes for tensor in arena.tensors.values())

def start():
    for name, tensor in checkpoint.stream(source):
        arena.fill(name, tensor)
    return content_id(arena.tensors)

base, at_start = measured(start)
for tensor in arena.tensors.values():
    tensor.view(-1)[::3] += 0.01

def write():
    return delta.write(work / "delta", checkpoint.stream(source), arena.tensors, like=base)

written, to_write = measured(write)
assert written.base == base
link = delta.Link(delta.open_(work / "delta", written.sha256), written.base, written.result)

def replay():
    arena.write(delta.replayed(checkpoint.stream(source), [link]))

_, to_replay = measured(replay)

def save():
    chain = delta.replayed(checkpoint.stream(source), [link])
    return checkpoint.save(work / "model", source, chain, {"version": written.result})

saved, to_save = measured(save)
assert content_id(checkpoint.stream(saved)) == written.result
print(json.dumps({"model": arena.nbytes, "largest": largest,
    "start": at_start * 1024 - arena.nbytes, "write": to_write * 1024,
    "replay": to_replay * 1024, "save": to_save * 1024}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["host", "gpu"])
def test_every_step_stays_far_below_a_copy(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=7,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    source, work = tmp_path / "source", tmp_path / "work"
    work.mkdir()
    config.save_pretrained(source)
    torch.manual_seed(0)
    weights = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes(source).items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(source), str(work), where],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    model, largest = found.pop("model"), found.pop("largest")
    assert model > 190_000_000
    with capsys.disabled():
        print(
            "\n  peak beside the arena, of the largest tensor:",
            {k: round(v / largest, 1) for k, v in found.items()},
        )
    assert all(-0.01 * model < peak < 4 * largest for peak in found.values()), found
