"""All that teaches one server, put together: the same around the local engine and inside vLLM (server)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from secondnature.config import Settings
from secondnature.engines.base import Engine
from secondnature.engines.stamps import Clock
from secondnature.lessons.feedback import Feedback
from secondnature.lessons.home import Home
from secondnature.lessons.ledger import Ledger
from secondnature.lessons.log import Log
from secondnature.lessons.memory import Memory
from secondnature.lessons.own_answers import OwnAnswers
from secondnature.lessons.planner import Planner
from secondnature.lessons.prober import Prober
from secondnature.lessons.runner import Runner
from secondnature.lessons.trainer import Trainer
from secondnature.model import load
from secondnature.train.apollo import highest_rank
from secondnature.weights.arena import Arena
from secondnature.wire import Health, Layout, Wiring

__all__ = ["Teaching", "put_together"]


@dataclass
class Teaching:
    """All that changes the weights of one server, and what it is known by."""

    settings: Settings
    home: Home
    arena: Arena
    clock: Clock
    runner: Runner
    ledger: Ledger
    memory: Memory
    feedback: Feedback
    key: str
    correction_key: str
    model_name: str
    wiring: Callable[[], Wiring]
    """Looks at the running engine: does it compute with the arena's memory?"""

    def health(self) -> Health:
        """The answer of `/v1/health`."""
        stamp, trouble = self.clock.read(), self.runner.trouble
        return Health(
            status="degraded" if trouble else "ok",
            model=self.model_name,
            weights_version=stamp.version,
            trial=stamp.trial,
            trainer=self.runner.trainer.state,
            detail=trouble,
        )


def _card(directory: Path) -> dict[str, Any]:
    """The model's card (`card.json`), or nothing."""
    try:
        return json.loads((directory / "card.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}


def put_together(
    settings: Settings,
    *,
    home: Home,
    log: Log,
    arena: Arena,
    clock: Clock,
    directory: Path,
    engine: Engine,
    model: nn.Module,
    tokenizer: Any,
    context_limit: int,
    layout: Layout,
    model_name: str,
    wiring: Callable[[], Wiring],
) -> Teaching:
    """The runner and what it works with, not started yet.

    Args:
        directory: the model's; the trainer builds the model of its config.json around the arena.
        engine: answers the probes.
        model: of that architecture; only names and shapes of its parameters are read.
        context_limit: tokens, prompt and answer together.
    """
    ledger, memory = Ledger(home.ledger_path), Memory()
    prober = Prober(engine, tokenizer, context_limit=context_limit)
    planner = Planner(
        tokenizer,
        vocab_size=load.read_config(directory).get_text_config(decoder=True).vocab_size,
        context_limit=context_limit,
        highest_rank=highest_rank(model),
        default_lr=_card(directory).get("teaching", {}).get("lr"),
    )
    runner = Runner(
        settings=settings,
        log=log,
        ledger=ledger,
        arena=arena,
        clock=clock,
        trainer=Trainer(
            arena,
            directory,
            threads=settings.train_threads,
            share=settings.share,
            log_path=home.path / "trainer.log",
            layout=layout,
        ),
        prober=prober,
        planner=planner,
        own_answers=OwnAnswers(prober, tokenizer, context_limit=context_limit),
    )
    given, correcting = (
        key.get_secret_value() if key is not None else None
        for key in (settings.api_key, settings.correction_key)
    )
    return Teaching(
        settings,
        home,
        arena,
        clock,
        runner,
        ledger,
        memory,
        Feedback(ledger, memory, planner, log),
        home.key(given),
        home.key(correcting, "correction_key"),
        model_name,
        wiring,
    )
