"""Are the weights that vLLM serves after a lesson those of the checkpoint that is exported? By its own numbers.

A lesson is kept and exported; then the log-probabilities of the same texts are asked of the server itself, of a
fresh vLLM on the exported checkpoint, of one without the plug-in (it packs the weights for other kernels, so it
differs before any lesson, too), and of one that was started on the first weights and told to reload the
exported ones with its own `reload_weights`. One request at a time, so that all are computed alike; one answer
to each prompt is greedy.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import PROMPTS, Settings, corrections, say
from vllm_process import NAME, Vllm, vllm
from vllm_serving import lesson

from secondnature.model.chat import encode_answer, read_tokenizer
from secondnature.records import Message, OptimizerSettings, Probe, read_jsonl
from secondnature.wire import TrainRequest

NUM_TEXTS = 50
ANSWER_TOKENS = 16
STEPS = 20
LR = 3e-4
EXAMPLES = Path(__file__).parents[1] / "examples" / "listening"


@dataclass(frozen=True)
class Said:
    """Of one text: the log-probabilities of its tokens, and the greedy answer to its prompt."""

    prompt: list[float]
    tokens: list[int]
    logprobs: list[float]


def texts(model: Path, count: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, prompt and an answer) in token ids: directions, some of them taught, and what else users ask."""
    tokenizer = read_tokenizer(model)
    pairs = [(c.prompt, c.chosen[0].content) for c in corrections() if c.chosen]
    pairs += [([Message(role="user", content=p)], "Yes, I will do that.") for p in PROMPTS]
    for probe in read_jsonl(EXAMPLES / "development.jsonl", Probe):
        if probe.check.prefers is not None:
            pairs.append((probe.prompt, probe.check.prefers[0]))
    pairs += [(p, "How about another one instead?") for p, _ in pairs]
    found: list[tuple[list[int], list[int]]] = []
    for prompt, answer in pairs[:count]:
        wanted = Message(role="assistant", content=answer)
        context, continuation = encode_answer(tokenizer, prompt, wanted)
        found.append((context, context + continuation))
    return found


def ask(server: Vllm, known: Sequence[tuple[list[int], list[int]]]) -> list[Said]:
    """One after another."""
    found: list[Said] = []
    for prompt, whole in known:
        body = {"model": NAME, "temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "prompt": whole}
        scored = server.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        told = [entry[str(t)]["logprob"] for entry, t in zip(scored[1:], whole[1:], strict=True)]
        body = {"model": NAME, "temperature": 0, "max_tokens": ANSWER_TOKENS, "logprobs": 0, "prompt": prompt}
        choice = server.post("/v1/completions", {**body, "return_token_ids": True})["choices"][0]
        found.append(Said(told, choice["token_ids"], choice["logprobs"]["token_logprobs"]))
    return found


def difference(some: Sequence[Said], others: Sequence[Said]) -> dict[str, Any]:
    """The largest differences, and how many greedy answers are the same token by token."""
    worst = answers = 0.0
    same = 0
    for a, b in zip(some, others, strict=True):
        worst = max([worst, *(abs(x - y) for x, y in zip(a.prompt, b.prompt, strict=True))])
        if a.tokens == b.tokens:
            same += 1
            answers = max([answers, *(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True))])
    if not math.isfinite(worst + answers):
        raise RuntimeError("a log-probability is no number")
    return {"texts": worst, "answers": answers, "same_answers": same}


def teach(server: Vllm, request: TrainRequest) -> str:
    """A lesson, kept; its id."""
    job = server.client.train(request).job
    while (status := server.client.status(job)).state in ("queued", "running", "on_trial"):
        time.sleep(0.05)
    if status.state != "kept":
        raise RuntimeError(f"the lesson is {status.state}: {status.error}")
    return status.lesson


def reload(server: Vllm, directory: Path) -> None:
    """vLLM's own way to other weights, as it is meant to be called, and with nothing stale left in its cache."""
    server.post("/pause", mode="keep")
    server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}})
    server.post("/reset_prefix_cache", reset_running_requests="true")
    server.post("/resume")


def measure(settings: Settings) -> dict[str, Any]:
    """Largest differences of log-probabilities between the server after its lesson and four others."""
    known = texts(settings.model, 6 if settings.quick else NUM_TEXTS)
    said: dict[str, list[Said]] = {}
    with tempfile.TemporaryDirectory(prefix="secondnature-bench-") as folder:
        exported = Path(folder) / "exported"
        with vllm(settings.model) as server:
            server.await_trainer()
            said["before"] = ask(server, known)
            steps = 3 if settings.quick else STEPS
            optimizer = OptimizerSettings(lr=LR)
            teach(server, lesson(max_steps=steps, keep=True).model_copy(update={"optimizer": optimizer}))
            said["served"] = ask(server, known)
            begun = time.monotonic()
            saved = server.client.checkpoint()
            export_s = time.monotonic() - begun
            shutil.copytree(saved.path, exported)
        for name, plugin in (("fresh", True), ("plain", False)):
            with vllm(exported, plugin=plugin) as server:
                said[name] = ask(server, known)
            say(f"{name}: {difference(said['served'], said[name])}")
        with vllm(settings.model, plugin=False) as server:
            said["plain_before"] = ask(server, known)
            reload(server, exported)
            said["reloaded"] = ask(server, known)
    pairs = {
        "fresh": ("served", "fresh"),
        "lesson": ("served", "before"),
        "packing_before": ("before", "plain_before"),
        "packing": ("served", "plain"),
        "reload": ("plain", "reloaded"),
        "reload_from_before": ("plain_before", "reloaded"),
    }
    return {
        "texts": len(known),
        "logprobs": sum(len(s.prompt) + len(s.logprobs) for s in said["served"]),
        "steps": steps,
        "export_s": export_s,
        "differences": {name: difference(said[a], said[b]) for name, (a, b) in pairs.items()},
    }
