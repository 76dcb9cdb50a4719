"""The local engine, put together: home, arena, engine, trainer, routes, one uvicorn (server process).

    python -m secondnature.serve.local        reads the same settings as `secondnature serve`

Start-up: lock the home, read checkpoint and kept deltas, fill the arena, and only then open the port.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from secondnature import __version__, config
from secondnature.config import Settings
from secondnature.data.ledger import Ledger
from secondnature.errors import BadInput, ConfigError, NotFound, SecondnatureError
from secondnature.model import load
from secondnature.records import describe_errors
from secondnature.serve import completions, routes
from secondnature.serve.clock import Clock
from secondnature.serve.engine import Engine
from secondnature.serve.guards import Guards, error_body
from secondnature.serve.home import Home
from secondnature.serve.judge import Judge
from secondnature.serve.keeper import Keeper
from secondnature.serve.log import Log
from secondnature.serve.metrics import exposition
from secondnature.serve.planner import Planner
from secondnature.serve.rehearsal import Rehearsal
from secondnature.serve.trainer import Trainer
from secondnature.train.apollo import highest_rank
from secondnature.train.prefix import self_test
from secondnature.weights import checkpoint
from secondnature.weights.arena import Arena, content_id
from secondnature.wire import Health

LOG = logging.getLogger("secondnature")
KEEP_ALIVE_S = 30
"""Idle connections are kept longer than clients keep them (httpx: 5 s), or a request may cross with the closing."""
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass
class Parts:
    """What a running server consists of."""

    settings: Settings
    home: Home
    arena: Arena
    clock: Clock
    engine: Engine
    keeper: Keeper
    key: str
    app: FastAPI


def model_directory(settings: Settings) -> Path:
    """Where the model lies. Raises ConfigError."""
    if settings.model == "embedded":  # data, not code: the room itself lies above this one
        directory = Path(str(importlib.resources.files("secondnature") / "embedded" / "weights"))
    else:
        directory = Path(settings.model).expanduser().absolute()
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"{directory}: no model there (no config.json)",
            "give a Hugging Face directory, or `--model embedded`",
        )
    return directory


def _card(directory: Path) -> dict[str, Any]:
    """The model's card (`card.json`), or nothing."""
    try:
        return json.loads((directory / "card.json").read_text())
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def assemble(settings: Settings) -> Generator[Parts]:
    """A whole server but for the port; taken apart again, in order, however this ends.

    Raises:
        ConfigError, HomeInUse, BadCheckpoint, BadDelta, UnsupportedModel: before anything is served or written.
    """
    torch.set_num_threads(settings.engine_threads)
    directory = model_directory(settings)
    base = checkpoint.read(directory)
    base_version = content_id(base)
    with contextlib.ExitStack() as stack:
        home = Home(settings.home)
        stack.callback(home.close)
        home.bind(directory, load.fingerprint(directory), base_version)
        log = Log(home, directory, base_version)
        weights = log.truth()
        arena = Arena.create(weights)
        clock = Clock(arena, content_id(weights))
        del base, weights
        model = load.build(directory, arena.tensors)
        self_test(model)
        tokenizer = load.read_tokenizer(directory)
        limit = load.context_limit(directory)
        engine = Engine(
            model,
            tokenizer,
            clock=clock,
            max_rows=settings.max_rows,
            max_waiting=settings.max_queue,
            threads=settings.engine_threads,
        )
        stack.callback(engine.close)
        ledger = Ledger(home.ledger_path)
        judge = Judge(engine, tokenizer, context_limit=limit)
        teaching = _card(directory).get("teaching", {})
        keeper = Keeper(
            settings=settings,
            log=log,
            ledger=ledger,
            arena=arena,
            clock=clock,
            trainer=Trainer(
                arena, directory, threads=settings.train_threads, log_path=home.path / "trainer.log"
            ),
            judge=judge,
            planner=Planner(
                tokenizer,
                vocab_size=engine.vocab_size,
                context_limit=limit,
                highest_rank=highest_rank(model),
                default_lr=teaching.get("lr"),
            ),
            rehearsal=Rehearsal(judge, tokenizer, context_limit=limit),
        )
        given = settings.api_key.get_secret_value() if settings.api_key else None
        parts = Parts(settings, home, arena, clock, engine, keeper, home.key(given), FastAPI())
        parts.app = application(
            parts, tokenizer, ledger, "embedded" if settings.model == "embedded" else directory.name
        )
        keeper.start()
        stack.callback(keeper.stop)
        yield parts


def application(parts: Parts, tokenizer: Any, ledger: Ledger, model_name: str) -> FastAPI:
    """The FastAPI application: routes, errors, guards."""
    app = FastAPI(title="secondnature", version=__version__, docs_url=None, redoc_url=None)
    memory = routes.Memory()
    app.include_router(completions.router(parts.engine, tokenizer, memory, parts.clock, model_name))
    app.include_router(routes.router(parts.keeper, ledger, memory, parts.clock))

    @app.get("/health")
    def health() -> Health:  # pyright: ignore[reportUnusedFunction]
        """Is it well, and what does it serve?"""
        stamp = parts.clock.read()
        return Health(
            status="degraded" if parts.keeper.trouble else "ok",
            model=model_name,
            weights_version=stamp.version,
            trial=stamp.trial,
            trainer=parts.keeper.trainer.state,
            detail=parts.keeper.trouble,
        )

    @app.get("/metrics")
    def metrics() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Counters for Prometheus."""
        return Response(
            exposition(parts.engine, parts.keeper, parts.clock), media_type="text/plain; version=0.0.4"
        )

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

    settings = parts.settings
    inference = settings.inference_key.get_secret_value() if settings.inference_key else None
    loopback = settings.host in ("127.0.0.1", "localhost", "::1")
    app.add_middleware(
        Guards,
        key=parts.key,
        inference_key=inference,
        hosts=LOOPBACK_NAMES if loopback else None,
        max_body_bytes=settings.max_body_bytes,
        requests_per_minute=settings.requests_per_minute,
    )
    return app


def main(settings: Settings) -> int:
    """Serve until a signal comes; the exit status."""
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    transformers.logging.set_verbosity_error()  # it warns of kernels that no CPU has
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn hands its signals on when it has stopped
        signal.signal(number, _leave)
    with assemble(settings) as parts:
        listener = _listen(settings)
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        options: dict[str, Any] = {"log_level": "warning", "lifespan": "off", "timeout_graceful_shutdown": 5}
        server = uvicorn.Server(uvicorn.Config(parts.app, timeout_keep_alive=KEEP_ALIVE_S, **options))
        parts.home.announce(url)
        LOG.info("%s (%s) at %s, home %s", settings.model, parts.clock.version, url, parts.home.path)
        server.run(sockets=[listener])
    return 0


def _leave(*_: object) -> None:
    """Unwind, so that everything is taken apart in order; a second signal does not interrupt that."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise SystemExit(0)


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as e:
        listener.close()
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}: {e.strerror or e}",
            "choose another --port (0: any)",
        ) from None
    return listener


if __name__ == "__main__":
    try:
        sys.exit(main(config.load()))
    except SecondnatureError as failure:
        sys.exit(f"{failure.type}: {failure}")
