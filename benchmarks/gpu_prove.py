# pyright: reportMissingImports=false
"""One copy of the weights on one card: vLLM's engine here, a trainer in another process. A lesson, and its undo.

    python benchmarks/gpu_prove.py [MODEL] [--graphs] [--steps 12] [--backend TRITON_ATTN] [--json FILE]

Prints one line for each thing that must hold and each figure, and ends with 1 if something does not hold. On a null
GPU (`NULLGPU=1`: memory, copies and IPC are real, kernels do nothing) wiring, counters, processes and the undo's
bytes are judged, numbers are not. `gpu_battery.sh` runs it; tests/gpu run it on a null GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NULL = bool(os.environ.get("NULLGPU"))
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process
if NULL:  # the kernel that counts sampled tokens does nothing there: a request of the V2 runner never ends
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")

import torch  # noqa: E402  (after the variables that vLLM reads)
from gpu_findings import Findings  # noqa: E402

EMBEDDED = Path(__file__).parents[1] / "src" / "secondnature" / "embedded" / "weights"
CONTEXT = [5 + (7 * i + i * i // 3) % 80 for i in range(40)]
ANSWER = [5 + (11 * i + 3) % 80 for i in range(12)]
LR = 3e-4


# ------------------------------------------------------------------------------------------ the trainer's process
def trainer() -> None:
    """Answer lines of JSON: `score` gives log-probabilities, `step` makes a step, `rush` writes until killed."""
    from secondnature.engines.vllm.share import attach
    from secondnature.records import Example, OptimizerSettings
    from secondnature.train.apollo import Apollo
    from secondnature.train.device import prepare
    from secondnature.train.prefix import continuation_logps, freeze, self_test
    from secondnature.train.run import model_in
    from secondnature.train.step import train_step

    def say(answer: Any) -> None:
        print(json.dumps(answer), flush=True)

    shared = attach(sys.stdin.readline())
    arena = shared.arena
    prepare()
    model = model_in(arena, shared.directory, "vllm")
    try:
        difference: Any = self_test(model)
    except Exception as e:  # noqa: BLE001  (where kernels do nothing it may say anything)
        difference = repr(e)[:300]
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    theirs = {t.untyped_storage().data_ptr() for t in arena.tensors.values()}
    say({"self_test": difference, "zero_copy": mine <= theirs, "parameters": len(list(model.parameters()))})
    optimizer = Apollo(model, OptimizerSettings(lr=LR), track=False)
    for line in sys.stdin:
        what, context, answer = json.loads(line)
        begun = time.perf_counter()
        if what == "score":
            with torch.no_grad():
                say(continuation_logps(model, freeze(model, context), [answer])[0].tolist())
        elif what == "rush":
            with arena.writing():
                say("writing")
                tensor = next(iter(arena.tensors.values()))
                while True:
                    tensor.add_(1)
        else:
            example = Example(context_ids=context, continuation_ids=answer)
            try:
                result = train_step(model, optimizer, [example], writing=arena.writing, learned_loss=0.0)
                done: dict[str, Any] = {"loss": result.loss, "error": None}
            except Exception as e:  # noqa: BLE001  (told to the other side)
                done = {"loss": None, "error": repr(e)[:300]}
            peak = torch.cuda.max_memory_allocated()
            seconds = round(time.perf_counter() - begun, 4)
            say({**done, "seconds": seconds, "writes": arena.writes, "peak_bytes": peak})


class Trainer:
    """That process, from the engine's side."""

    def __init__(self, manifest: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "trainer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._write(manifest)
        self.started = self.hear()

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def say(self, what: str) -> None:
        self._write(json.dumps([what, CONTEXT, ANSWER]))

    def hear(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                return json.loads(line)
        raise SystemExit(f"the trainer ended with {self.process.wait()}")

    @property
    def answered(self) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


# ------------------------------------------------------------------------------------------- the engine's process
class Engine:
    """vLLM, and what it says of one context."""

    def __init__(self, model: str, options: argparse.Namespace) -> None:
        from vllm import LLM

        self.llm: Any = LLM(
            model,
            skip_tokenizer_init=True,
            enforce_eager=not options.graphs,
            kv_cache_memory_bytes=256 << 20,
            max_model_len=1024,
            max_num_seqs=8,
            max_num_batched_tokens=1024,
            attention_config={"backend": options.backend},
            additional_config={"gdn_prefill_backend": "triton"},
            disable_log_stats=True,
        )

    def _ask(self, ids: list[int], **sampling: Any) -> Any:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, detokenize=False, **sampling)
        return self.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0]

    def score(self) -> list[float]:
        """Log-probabilities of the answer's tokens."""
        found = self._ask(CONTEXT + ANSWER, max_tokens=1, prompt_logprobs=0).prompt_logprobs[len(CONTEXT) :]
        pairs = zip(found, ANSWER, strict=True)
        return [at[t].logprob if t in at else next(iter(at.values())).logprob for at, t in pairs]

    def say(self, num_tokens: int = 24) -> tuple[list[int], list[float]]:
        """What follows the context, token by token: the way of graphs."""
        out = self._ask(CONTEXT, max_tokens=num_tokens, logprobs=1, ignore_eos=True).outputs[0]
        return list(out.token_ids), [round(next(iter(at.values())).logprob, 6) for at in out.logprobs]

    def seconds_per_token(self, num_tokens: int = 16) -> float:
        begun = time.perf_counter()
        self.say(num_tokens)
        return (time.perf_counter() - begun) / num_tokens


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(seconds)
    last = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    return {"p50_ms": round(1e3 * statistics.median(ordered), 3), "p99_ms": round(1e3 * last, 3)}


def prove(options: argparse.Namespace) -> Findings:
    """All of it."""
    from secondnature.engines.vllm.share import attach
    from secondnature.weights.content import content_id

    found = Findings("PROOF")
    note = found.note
    note("card", torch.cuda.get_device_name())
    begun = time.perf_counter()
    engine = Engine(options.model, options)
    note("engine started (s)", round(time.perf_counter() - begun, 1))
    (manifest,) = engine.llm.collective_rpc("secondnature_manifest")
    wiring = json.loads(engine.llm.collective_rpc("secondnature_wiring")[0])
    note("wiring", wiring, wiring["tensors"] == wiring["aliased"] and not wiring["problems"])
    cache = engine.llm.llm_engine.engine_core.engine_core.secondnature_cache()
    note("prefix cache", cache, cache == "salted")
    arena = attach(manifest).arena
    original = {name: tensor.to("cpu", copy=True) for name, tensor in arena.tensors.items()}
    begun = time.perf_counter()
    first = content_id(arena.tensors)
    note("content id (s)", round(time.perf_counter() - begun, 3))
    same = content_id(original) == first
    note("content id is that of the bytes", same, same)
    before = engine.score(), engine.say()
    alone = [engine.seconds_per_token() for _ in range(4 if NULL else 30)]
    note("a token, nobody training", percentiles(alone))

    them = Trainer(manifest)
    ok = them.started["zero_copy"] and (NULL or not isinstance(them.started["self_test"], str))
    note("trainer", them.started, ok)
    them.say("score")
    difference = max(abs(a - b) for a, b in zip(them.hear(), before[0], strict=True))
    note("trainer's and engine's log-probabilities differ by", round(difference, 4), NULL or difference < 0.3)
    steps, beside = lesson(engine, them, options.steps, found)
    note("a token, while training", percentiles(beside))
    writes = [s["writes"] for s in steps]
    note("writes after each step", writes, writes == [[i + 1, i + 1] for i in range(options.steps)])
    rises = steps[-1]["served"] > sum(before[0]) / len(ANSWER)
    note("the served log-probability rises", rises, NULL or rises)
    taught = engine.say(len(ANSWER))[0] == ANSWER
    note("the taught answer is generated", taught)
    changed = content_id(arena.tensors) != first
    note("weights changed", changed, NULL or changed)
    if NULL:  # no kernel changed anything: a copy does, for the undo to undo
        name, tensor = next(iter(arena.tensors.items()))
        tensor.copy_(original[name] + 1)
        changed = content_id(arena.tensors) != first
        note("a copy from the host arrives", changed, changed)
    undo("undo", engine, arena, original, first, before, found)

    them.say("rush")
    them.hear()
    time.sleep(0.5)
    os.kill(them.process.pid, signal.SIGKILL)  # in the middle of a write
    them.process.wait()
    begun_, done = arena.writes
    note("a killed writer leaves the epoch odd", [begun_, done], begun_ == done + 1)
    arena.close_torn_write()
    undo("undo after a killed trainer", engine, arena, original, first, before, found)
    return found


def lesson(
    engine: Engine, them: Trainer, num_steps: int, found: Findings
) -> tuple[list[dict[str, Any]], list[float]]:
    """Steps, while the engine goes on answering: what each said, and the seconds of a token meanwhile."""
    steps: list[dict[str, Any]] = []
    beside: list[float] = []
    for _ in range(num_steps):
        them.say("step")
        while True:
            beside.append(engine.seconds_per_token(8))
            if them.answered:
                break
        now = engine.score()
        steps.append({**them.hear(), "served": round(sum(now) / len(now), 4)})
        print(f"STEP {json.dumps(steps[-1])}", flush=True)
    errors = [s["error"] for s in steps if s["error"] is not None]
    found.note("steps that failed", errors, not errors)
    found.note("a step (s)", round(statistics.median(s["seconds"] for s in steps), 4))
    found.note("losses", [s["loss"] for s in steps])
    found.note("trainer's peak memory (bytes)", steps[-1]["peak_bytes"])
    return steps, beside


def undo(
    name: str,
    engine: Engine,
    arena: Any,
    original: dict[str, torch.Tensor],
    first: str,
    before: Any,
    found: Findings,
) -> None:
    """The weights of before, from the host: to the byte, and so the answers."""
    from secondnature.weights.content import content_id

    begun = time.perf_counter()
    arena.write(original)
    found.note(f"{name} (s)", round(time.perf_counter() - begun, 3))
    same = content_id(arena.tensors) == first
    found.note(f"{name}: bytes as before", same, same)
    same = (engine.score(), engine.say()) == before
    found.note(f"{name}: answers as before, to the last digit", same, NULL or same)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(EMBEDDED))
    parser.add_argument("--graphs", action="store_true", help="torch.compile and CUDA graphs")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--backend", default="TRITON_ATTN")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = prove(options)
    if options.json:
        about = {"null": NULL, "graphs": options.graphs, "backend": options.backend}
        options.json.write_text(
            json.dumps({**about, "broken": found.broken, **found.values}, indent=1) + "\n"
        )
    print(f"VERDICT {'broken: ' + ', '.join(found.broken) if found.broken else 'holds'}", flush=True)
    return bool(found.broken)


if __name__ == "__main__":
    if sys.argv[1:] == ["trainer"]:
        trainer()
    else:
        raise SystemExit(main())
