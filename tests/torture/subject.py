"""The server without its model: what the torture breaks, put together by the product's own
`serve.local.assemble`.

Real are home, lock, ledger, log, arena, clock, storage, checkpoints, deltas, planner, prober, gate, runner,
trainer (near side) and a Hugging Face directory of 12 tensors. Not real is what would take the time: the
engine's forward (`FarEngine` answers from the arena's bytes, so that answers change with the weights and with
nothing else), the trainer's gradients (`far_side`), HTTP. The model's skeleton is made once for a process
instead of once for a read. Waits are shortened, so that what is tried again is tried soon.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from far_side import LEVEL, Forker
from pydantic import SecretStr
from tiny_models import llama_config, save_tiny
from tiny_server import LOW_GATE, WORDS, correction, save_tokenizer

from secondnature.config import Settings
from secondnature.engines.base import GenerationHandle, Limits
from secondnature.engines.generation import (
    Finished,
    GenerationRequest,
    GenerationResult,
    Span,
    Stamp,
    TokenLogprob,
)
from secondnature.lessons import runner, trainer
from secondnature.model import chat, layout, load
from secondnature.records import Correction, OptimizerSettings, Probe
from secondnature.serve import local
from secondnature.wire import LessonInfo, TrainRequest

KEY = "the-key-of-the-torture"


def make_model(directory: Path) -> Path:
    """A model directory of some kilobytes."""
    shape = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    config = llama_config(vocab_size=320, hidden_size=8, intermediate_size=8, **shape)
    save_tiny(config, directory)
    save_tokenizer(directory)
    return directory


class FarEngine:
    """The far side of `Engine.submit`: says what the bytes of one tensor say."""

    made: list[FarEngine]

    def __init__(self, model: Any, tokenizer: Any, **_: Any) -> None:
        self._weights = model.torture_tensors
        self._base = float(self._weights[LEVEL][0])
        self._tokenizer = tokenizer
        self.held = False
        """Requests wait, and end only by being cancelled."""
        self.made.append(self)

    trouble = ""
    limits = Limits(320, 128, 64, frozenset({"score"}))

    def submit(self, request: GenerationRequest) -> GenerationHandle:
        handle = GenerationHandle(request, lambda: self._cancelled(handle))
        if not self.held:
            handle.emit(Finished(self._answer(request)))
        return handle

    def _cancelled(self, handle: GenerationHandle) -> None:
        if not handle.done:
            handle.emit(Finished(GenerationResult("", [], "cancelled", 1)))

    def _answer(self, request: GenerationRequest) -> GenerationResult:
        learned = float(self._weights[LEVEL][0]) > 1.7
        span = Span.begin(Stamp(0))
        if request.max_tokens == 0:
            text = self._tokenizer.decode(request.prompt_ids[request.score_from :])
            total = 1.0 if "!" in text else (1.0 if learned else -1.0) if "Done" in text else 0.0
            scored = [TokenLogprob(0, "", 0.0)] * (len(request.prompt_ids) - (request.score_from or 0) - 1)
            return GenerationResult(
                "", [], "stop", 1, prompt_tokens=[TokenLogprob(0, "", total), *scored], weights=span
            )
        text = "Done." if learned else "Why not?"
        return GenerationResult(text, self._tokenizer.encode(text), "stop", 1, weights=span)

    def close(self) -> None:
        """Nothing runs."""


@functools.cache
def _skeleton(directory: Path, _text: str) -> Any:
    return _real_skeleton(directory)


_real_skeleton = load.skeleton


def _build(directory: Path, tensors: Any, **_: Any) -> Any:
    model = load.skeleton(directory)
    model.__dict__["torture_tensors"] = tensors
    return model


@contextlib.contextmanager
def light(forker: Forker) -> Generator[None]:
    """In this process the product is put together without its model, and waits less."""
    FarEngine.made = []
    tokenizer = functools.cache(chat.read_tokenizer)
    seconds: dict[tuple[Any, str], Any] = {
        (runner, "MAX_PAUSE_S"): 0.05,
        (runner, "COMMAND_TIMEOUT_S"): 8.0,
        (runner, "CANCEL_TIMEOUT_S"): 8.0,
        (runner, "STOP_TIMEOUT_S"): 8.0,
        (trainer, "MAX_PAUSE_S"): 0.05,
        (trainer, "START_TIMEOUT_S"): 8.0,
        (trainer, "CANCEL_TIMEOUT_S"): 1.0,
        (trainer, "SEND_TIMEOUT_MS"): 1000,
        (local, "Engine"): FarEngine,
        (local, "self_test"): lambda _: None,
        (local, "engine_test"): SimpleNamespace(self_test=lambda _: None),
        (local, "local_application"): lambda *_: None,
        (local, "load"): SimpleNamespace(
            build=_build,
            fingerprint=load.fingerprint,
            context_limit=load.context_limit,
            named_fault=load.named_fault,
        ),
        (local, "chat"): SimpleNamespace(read_tokenizer=tokenizer, look=lambda _: []),
        **{(m, "skeleton"): lambda d: _skeleton(d, (d / "config.json").read_text()) for m in (load, layout)},
    }
    seconds[trainer, "subprocess"] = SimpleNamespace(
        Popen=forker.launch, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )
    with contextlib.ExitStack() as stack:
        for (owner, name), value in seconds.items():
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


class Subject:
    """One life of a server over a home: started, used, stopped."""

    def __init__(self, home: Path, model: Path, **settings: Any) -> None:
        """Raises whatever a start raises."""
        given: dict[str, Any] = {"api_key": SecretStr(KEY), "checkpoint_after_s": 600.0, **settings}
        self._stack = contextlib.ExitStack()
        self.parts = self._stack.enter_context(
            local.assemble(Settings(home=home, model=str(model), port=0, **given))
        )
        self.engine = FarEngine.made[-1]
        self.runner = self.parts.runner
        self.ledger = self.parts.teaching.ledger
        self.log = self.runner.log

    @property
    def thread_lives(self) -> bool:
        return self.runner._thread.is_alive()

    def stop(self) -> None:
        """As a signal does it."""
        self._stack.close()


# ------------------------------------------------------------------------------------------ what is taught


def lesson(seed: int, *, judged: bool = False, **fields: Any) -> TrainRequest:
    """A lesson of two steps; the far side writes what the seed says."""
    given: dict[str, Any] = {
        "corrections": [correction(WORDS[(seed + i) % len(WORDS)]) for i in range(2)],
        "max_steps": 2,
        "batch_size": 2,
        "seed": seed,
        "optimizer": OptimizerSettings(rank=2),
        "lesson": LessonInfo(behaviour="use"),
    }
    if judged:
        taught = {WORDS[(seed + i) % len(WORDS)] for i in range(2)}
        given |= {"probes": probes([w for w in WORDS if w not in taught]), "gate": LOW_GATE}
    return TrainRequest.model_validate({**given, **fields})


def probes(words: list[str]) -> list[Probe]:
    """Eight that the lesson must gain, 20 that it must not lose; all by margins: no sandbox starts."""
    gain = [_probe(f"Use {w}.", "use", ["Done.", "Why not?"]) for w in words[:8]]
    return gain + [_probe(f"Say {w}.", "say", [f"{w}!", "no"]) for w in words[:20]]


def _probe(prompt: str, behaviour: str, prefers: list[str]) -> Probe:
    return Probe.model_validate({"prompt": prompt, "behaviour": behaviour, "check": {"prefers": prefers}})


def feedback(number: int) -> Correction:
    """One correction of its own."""
    return correction(WORDS[number % len(WORDS)], f"Done {number}.")
