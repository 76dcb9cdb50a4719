"""One training step of a large model on a GPU, in place: time by parts, peak memory, share of what the card can do.

    python benchmarks/gpu.py --preset 27b --json gpu.json      # needs about 70 GB of GPU memory
    python benchmarks/gpu.py --preset tiny --device cpu        # does the script run?

The model has the shape of Qwen3.5-27B's text part (its config.json) and random weights: time and memory do not
depend on their values. bf16 weights, computed with in bf16; no second copy of any weight. Not part of `make bench`,
which runs without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3_5TextConfig

from secondnature.model.load import build
from secondnature.model.recompute import recomputed
from secondnature.model.upcast import collect
from secondnature.records import Example, OptimizerSettings
from secondnature.train.apollo import Apollo
from secondnature.train.device import prepare
from secondnature.train.guard import check_tensors
from secondnature.train.prefix import Prefix, continuation_logps, freeze
from secondnature.train.step import train_step

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 512},
    "2b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "vocab_size": 248320},
    "27b": {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 64, "vocab_size": 248320},
}
HEADS: dict[str, dict[str, Any]] = {
    "tiny": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2}
    | {"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "2b": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16}
    | {"linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
    "27b": {"num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16}
    | {"linear_num_value_heads": 48, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
}


def random_model(preset: str, device: str, directory: Path) -> nn.Module:
    """A hybrid of this shape around random bf16 tensors on the device."""
    config = Qwen3_5TextConfig(**PRESETS[preset], **HEADS[preset], tie_word_embeddings=False)
    config.save_pretrained(directory)
    from secondnature.model.load import skeleton

    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, "architectures": ["Qwen3_5ForCausalLM"]}))
    generator = torch.Generator(device).manual_seed(0)
    weights: dict[str, Tensor] = {}
    for name, parameter in skeleton(directory).named_parameters():
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        if name.endswith("A_log"):
            weight.uniform_(0, math.log(16), generator=generator)
        elif name.endswith("dt_bias"):
            weight.uniform_(-6.0, -2.0, generator=generator)
        elif parameter.ndim == 1:
            weight.fill_(1.0 if name.endswith("linear_attn.norm.weight") else 0.0)
        else:
            weight.normal_(0, 0.02, generator=generator)
        weights[name] = weight
    return build(directory, weights, compute_dtype=torch.bfloat16)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall clock of `work`, the device waited for."""
    wait(device)
    begun = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begun


def ceilings(device: str) -> dict[str, float]:
    """What the card does at best: copied bytes per second (read and written), bf16 FLOP per second."""
    if device != "cuda":
        return {"bytes_per_s": math.nan, "flop_per_s": math.nan}
    source, target = (torch.randn(2**29, device=device) for _ in range(2))
    copy = min(seconds(partial(target.copy_, source), device) for _ in range(8))
    moved = 2.0 * source.numel() * source.element_size()
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = min(seconds(partial(torch.mm, a, b), device) for _ in range(10))
    del a, b, source, target
    torch.cuda.empty_cache()
    return {"bytes_per_s": moved / copy, "flop_per_s": 2.0 * 8192**3 / product}


def kernel_times(device: str, ceiling: dict[str, float]) -> list[dict[str, Any]]:
    """The factored update alone, on the largest matrix of a layer, for several tiles."""
    if device != "cuda":
        return []
    from secondnature.train import kernels

    tiles = [
        (16, 256, 32, 4),
        (32, 64, 32, 4),
        (32, 128, 32, 4),
        (64, 64, 32, 4),
        (64, 64, 64, 4),
        (64, 64, 64, 8),
    ]
    found: list[dict[str, Any]] = []
    target = (torch.randn(17408, 5120, device=device) * 0.02).bfloat16()
    key: dict[str, Any] = {"decay": 0.0, "seed": 0, "name": "w", "step": 1}
    for num_tokens in (64, 512):
        left, right = (torch.randn(num_tokens, n, device=device).bfloat16() for n in target.shape)
        scale = torch.full((17408,), 1e-7, device=device)
        work = partial(kernels.add_factored_, target, left, right, scale, **key)
        for a, b, s, warps in tiles:
            tile = {"TILE_A": a, "TILE_B": b, "TILE_S": s, "num_warps": warps}
            kernels._FEW_TOKENS = kernels._MANY_TOKENS = tile  # pyright: ignore[reportPrivateUsage]
            work()
            taken = min(seconds(work, device) for _ in range(5))
            floor = 4.0 * target.numel() / ceiling["bytes_per_s"]
            row = {
                "tokens": num_tokens,
                "tile": [a, b, s, warps],
                "seconds": taken,
                "of_bandwidth": floor / taken,
            }
            found.append(row)
            print(f"  {row}", file=sys.stderr, flush=True)

    def best(num_tokens: int) -> dict[str, int]:
        rows = [f for f in found if f["tokens"] == num_tokens]
        fastest = min(rows, key=lambda f: f["seconds"])["tile"]
        return dict(zip(("TILE_A", "TILE_B", "TILE_S", "num_warps"), fastest, strict=True))

    kernels._FEW_TOKENS, kernels._MANY_TOKENS = best(64), best(512)  # pyright: ignore[reportPrivateUsage]
    return found


def examples(num_context: int, num_answer: int, count: int, vocab_size: int) -> list[Example]:
    """`count` answers to one context, random tokens."""
    generator = torch.Generator().manual_seed(1)
    context, *answers = (
        torch.randint(0, vocab_size, (n,), generator=generator).tolist()
        for n in (num_context, *[num_answer] * count)
    )
    return [Example(context_ids=context, continuation_ids=answer) for answer in answers]


def run_both(model: nn.Module, prefix: Prefix, continuations: list[list[int]]) -> Tensor:
    """Forward and backward of all answers; their loss."""
    logps = continuation_logps(model, prefix, continuations)
    loss = -torch.stack([x.mean() for x in logps]).mean()
    loss.backward()
    return loss.detach()


def show(work: Callable[[], object], device: str) -> None:
    """Print where the time of `work` goes, on the device and on the processor that feeds it."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=kinds) as trace:
        work()
        wait(device)
    events = trace.key_averages()
    for by in (f"self_{device}_time_total", "self_cpu_time_total"):
        print(events.table(sort_by=by, row_limit=12, max_name_column_width=50), flush=True)


def measure_step(
    model: nn.Module, batch: list[Example], optimizer: Apollo, device: str, repeats: int, recompute: bool
) -> dict[str, Any]:
    """The parts, each timed alone, and the whole step, in seconds; the peak of allocated memory in bytes."""
    continuations = [e.continuation_ids for e in batch]
    parts: dict[str, list[float]] = {"prefill": [], "forward_backward": [], "guard": [], "update": []}
    losses: list[Any] = []
    for _ in range(repeats + 1):
        prefix: list[Any] = []
        parts["prefill"].append(
            seconds(lambda p=prefix: p.append(freeze(model, batch[0].context_ids)), device)
        )
        with collect(model, factored=optimizer.factored) as gradients:
            with recomputed(model) if recompute else contextlib.nullcontext():

                def both(prefix: Prefix = prefix[0]) -> None:
                    losses.append(run_both(model, prefix, continuations))

                parts["forward_backward"].append(seconds(both, device))
            parts["guard"].append(seconds(lambda g=gradients: check_tensors(g, "the gradient"), device))
        parts["update"].append(seconds(lambda g=gradients: optimizer.step(g), device))
        del prefix, gradients
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def whole() -> None:
        losses.append(train_step(model, optimizer, batch, learned_loss=0.0, recompute=recompute).loss)

    taken = [seconds(whole, device) for _ in range(repeats + 1)][1:]
    return {
        "context": len(batch[0].context_ids),
        "answers": len(batch),
        "answer": len(batch[0].continuation_ids),
        "seconds": {k: statistics.median(v[1:]) for k, v in parts.items()},
        "step_seconds": statistics.median(taken),
        "step_all": taken,
        "losses": [float(x) for x in losses],
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if device == "cuda" else None,
    }


def limits(
    found: dict[str, Any], num_matrix: float, num_all: float, ceiling: dict[str, float]
) -> dict[str, float]:
    """The least seconds of each part, if every product ran at the card's rate and every byte moved once.

    A parameter of a matrix costs 2 FLOP per token forward, 4 backward; the embedding costs none.
    """
    answer_tokens = found["answers"] * found["answer"]
    flop, moved = ceiling["flop_per_s"], ceiling["bytes_per_s"]
    return {
        "prefill": max(2 * num_matrix * found["context"] / flop, 2 * num_all / moved),
        "forward_backward": max(6 * num_matrix * answer_tokens / flop, 4 * num_all / moved),
        "update": max(2 * num_matrix * answer_tokens / flop, 4 * num_all / moved),
    }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="27b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep-activations", action="store_true", help="do not recompute them in backward")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-tiles", action="store_true", help="do not time the kernel alone")
    parser.add_argument("--profile", action="store_true", help="print where one step's time goes")
    options = parser.parse_args()
    device, rank = options.device, options.rank if options.preset != "tiny" else 8
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("found no CUDA device; --preset tiny --device cpu tries the script")
    prepare()  # as the trainer does
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    fla = importlib.util.find_spec("fla") is not None
    found: dict[str, Any] = {"preset": options.preset, "card": card, "rank": rank, "torch": torch.__version__}
    found["delta_rule"] = "flash-linear-attention" if fla else "transformers' reference"
    found["ceilings"] = ceilings(device)
    print(card, found["ceilings"], file=sys.stderr, flush=True)
    found["kernel"] = [] if options.no_tiles else kernel_times(device, found["ceilings"])
    with tempfile.TemporaryDirectory() as directory:
        begun = time.perf_counter()
        model = random_model(options.preset, device, Path(directory))
    parameters = dict(model.named_parameters())
    found["parameters"] = sum(p.numel() for p in parameters.values())
    found["weight_bytes"] = sum(p.numel() * p.element_size() for p in parameters.values())
    print(
        f"{found['parameters'] / 1e9:.2f}B parameters, {time.perf_counter() - begun:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    optimizer = Apollo(model, OptimizerSettings(lr=1e-5, rank=rank), track=False)
    vocab_size = PRESETS[options.preset]["vocab_size"]
    num_matrix = sum(p.numel() for n, p in parameters.items() if p.ndim == 2 and "embed_tokens" not in n)
    found["steps"] = []
    for count in (8, 1):
        batch = examples(options.context, 64, count, vocab_size)
        step = measure_step(model, batch, optimizer, device, options.repeats, not options.keep_activations)
        step["limit"] = limits(step, num_matrix, found["parameters"], found["ceilings"])
        step["of_limit"] = sum(step["limit"].values()) / step["step_seconds"]
        found["steps"].append(step)
        print(json.dumps(step), file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    state = optimizer.state_dict()[0]
    found["state_bytes"] = sum(t.numel() * t.element_size() for t in state.values())
    if options.profile:
        batch = examples(options.context, 64, 8, vocab_size)
        with collect(model, factored=optimizer.factored) as gradients, recomputed(model):
            prefix = freeze(model, batch[0].context_ids)
            show(lambda: run_both(model, prefix, [e.continuation_ids for e in batch]), device)
        show(lambda: optimizer.step(gradients), device)
    text = json.dumps(found, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
