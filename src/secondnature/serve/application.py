"""What the servers of both engines have in common: the teaching parts put together, their routes, errors, guards.

The local engine adds its completions to this application; inside vLLM it stands beside vLLM's own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from torch import nn

from secondnature import __version__
from secondnature.config import Settings
from secondnature.data.ledger import Ledger
from secondnature.errors import BadInput, NotFound, SecondnatureError
from secondnature.model import load
from secondnature.records import describe_errors
from secondnature.serve import routes
from secondnature.serve.clock import Clock
from secondnature.serve.generation import Generator
from secondnature.serve.guards import LOOPBACK_HOSTS, LOOPBACK_NAMES, Guards, error_body
from secondnature.serve.home import Home
from secondnature.serve.judge import Judge
from secondnature.serve.keeper import Keeper
from secondnature.serve.log import Log
from secondnature.serve.planner import Planner
from secondnature.serve.rehearsal import Rehearsal
from secondnature.serve.trainer import Trainer
from secondnature.train.apollo import highest_rank
from secondnature.weights.arena import Arena
from secondnature.wire import Health, Layout, Wiring

LOG = logging.getLogger("secondnature")


@dataclass
class Teaching:
    """All that changes the weights of one server, and what it is known by."""

    settings: Settings
    home: Home
    arena: Arena
    clock: Clock
    keeper: Keeper
    ledger: Ledger
    memory: routes.Memory
    key: str
    model_name: str
    wiring: Callable[[], Wiring]
    """Looks at the running engine: does it compute with the arena's memory?"""

    def health(self) -> Health:
        """The answer of `/v1/health`."""
        stamp = self.clock.read()
        return Health(
            status="degraded" if self.keeper.trouble else "ok",
            model=self.model_name,
            weights_version=stamp.version,
            trial=stamp.trial,
            trainer=self.keeper.trainer.state,
            detail=self.keeper.trouble,
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
    engine: Generator,
    model: nn.Module,
    tokenizer: Any,
    context_limit: int,
    layout: Layout,
    model_name: str,
    wiring: Callable[[], Wiring],
) -> Teaching:
    """The keeper and what it works with, not started yet.

    Args:
        directory: the model's; the trainer builds the model of its config.json around the arena.
        engine: answers the probes.
        model: of that architecture; only names and shapes of its parameters are read.
        context_limit: tokens, prompt and answer together.
    """
    ledger = Ledger(home.ledger_path)
    judge = Judge(engine, tokenizer, context_limit=context_limit)
    keeper = Keeper(
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
        judge=judge,
        planner=Planner(
            tokenizer,
            vocab_size=load.read_config(directory).get_text_config(decoder=True).vocab_size,
            context_limit=context_limit,
            highest_rank=highest_rank(model),
            default_lr=_card(directory).get("teaching", {}).get("lr"),
        ),
        rehearsal=Rehearsal(judge, tokenizer, context_limit=context_limit),
    )
    given = settings.api_key.get_secret_value() if settings.api_key else None
    return Teaching(
        settings,
        home,
        arena,
        clock,
        keeper,
        ledger,
        routes.Memory(),
        home.key(given),
        model_name,
        wiring,
    )


def application(teaching: Teaching) -> FastAPI:
    """The teaching routes, the errors they answer and the guards before them; more routers may be added."""
    app = FastAPI(title="secondnature", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(routes.router(teaching.keeper, teaching.ledger, teaching.memory, teaching.clock))

    @app.get("/v1/health", responses=routes.ERRORS)
    def health() -> Health:  # pyright: ignore[reportUnusedFunction]
        """Is it well, and what does it serve?"""
        return teaching.health()

    @app.get("/v1/wiring", responses=routes.ERRORS)
    def wiring() -> Wiring:  # pyright: ignore[reportUnusedFunction]
        """Does the engine compute with the memory that lessons are written into? Looks at it anew each time."""
        return teaching.wiring()

    _speak_errors(app)
    settings = teaching.settings
    inference = settings.inference_key.get_secret_value() if settings.inference_key else None
    app.add_middleware(
        Guards,
        key=teaching.key,
        inference_key=inference,
        hosts=LOOPBACK_NAMES if settings.host in LOOPBACK_HOSTS else None,
        max_body_bytes=settings.max_body_bytes,
        requests_per_minute=settings.requests_per_minute,
    )
    return app


def _speak_errors(app: FastAPI) -> None:
    """Every error is `{"error": {type, message, hint}}`, never a traceback."""

    @app.exception_handler(SecondnatureError)
    def ours(_: Request, error: SecondnatureError) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        return JSONResponse(error_body(error), error.status)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        found = BadInput(describe_errors(error.errors()), "see /openapi.json or docs/reference/routes.md")
        return JSONResponse(error_body(found), found.status)

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        if error.status_code == 404:
            found: SecondnatureError = NotFound(f"no route {request.url.path[:200]}", "see /openapi.json")
        else:
            found = BadInput(
                f"{request.method} {request.url.path[:200]}: {error.detail}", "see /openapi.json"
            )
        return JSONResponse(error_body(found), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    def unforeseen(request: Request, error: Exception) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        LOG.error("%s %s", request.method, request.url.path, exc_info=error)
        found = SecondnatureError("internal error", "please report it, with the server's log")
        return JSONResponse(error_body(found), 500)
