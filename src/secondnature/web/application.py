"""What the servers of both engines have in common: the teaching parts put together, their routes, errors, guards.

The local engine adds its completions to this application; inside vLLM it stands beside vLLM's own.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from secondnature import __version__
from secondnature.engines.base import Engine as AnyEngine
from secondnature.engines.local.engine import Engine
from secondnature.errors import BadInput, NotFound, SecondnatureError
from secondnature.lessons.teaching import Teaching
from secondnature.records import describe_errors
from secondnature.web import completions
from secondnature.web import teaching as routes
from secondnature.web.guards import LOOPBACK_HOSTS, LOOPBACK_NAMES, Faults, Guards, Keys, error_body
from secondnature.web.in_band import InBand, Layer
from secondnature.web.metrics import exposition
from secondnature.wire import Health, Wiring

UNWELL: dict[int | str, dict[str, Any]] = {
    503: {"description": "Degraded; `detail` says why", "model": Health}
}


def application(teaching: Teaching, engine: AnyEngine | None = None) -> FastAPI:
    """The teaching routes, the errors they answer and the guards before them; more routers may be added.

    Args:
        engine: whose trouble `/v1/health` tells, too; None: another server's, which tells of it itself.
    """
    app = FastAPI(title="secondnature", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(routes.router(teaching.runner, teaching.feedback, teaching.clock))

    # on the loop, for it only looks: it answers also while every thread of the pool waits for a lesson
    @app.get("/v1/health", responses=routes.ERRORS | UNWELL)
    async def health(response: Response) -> Health:  # pyright: ignore[reportUnusedFunction]
        """Is it well, and what does it serve? 503 where it is not well; the body says why."""
        return _health(teaching, engine, response)

    @app.get("/v1/wiring", responses=routes.ERRORS)
    def wiring() -> Wiring:  # pyright: ignore[reportUnusedFunction]
        """Does the engine compute with the memory that lessons are written into? Looks at it anew each time."""
        return teaching.wiring()

    settings = teaching.settings
    inference = settings.inference_key.get_secret_value() if settings.inference_key else None
    if settings.in_band and engine is not None:  # added before the guards, it stands behind them
        app.add_middleware(Layer, in_band=InBand(teaching.feedback, teaching.model_name))
    app.add_middleware(
        Guards,
        keys=Keys(talk=inference, correct=teaching.correction_key, teach=teaching.key),
        hosts=LOOPBACK_NAMES if settings.host in LOOPBACK_HOSTS else None,
        max_body_bytes=settings.max_body_bytes,
        requests_per_minute=settings.requests_per_minute,
    )
    _speak_errors(app)
    return app


def local_application(teaching: Teaching, engine: Engine, tokenizer: Any) -> FastAPI:
    """The whole server: completions and what teaches."""
    app = application(teaching, engine)
    app.include_router(
        completions.router(engine, tokenizer, teaching.memory, teaching.clock, teaching.model_name)
    )

    @app.get("/health", responses=UNWELL)
    async def health(response: Response) -> Health:  # pyright: ignore[reportUnusedFunction]
        """As `/v1/health`."""
        return _health(teaching, engine, response)

    @app.get("/metrics")
    def metrics() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Counters for Prometheus."""
        text = exposition(engine, teaching.runner, teaching.clock)
        return Response(text, media_type="text/plain; version=0.0.4")

    return app


def _health(teaching: Teaching, engine: AnyEngine | None, response: Response) -> Health:
    found = teaching.health()
    trouble = "; ".join(x for x in (engine.trouble if engine is not None else "", found.detail) if x)
    if trouble:
        response.status_code = 503
        return found.model_copy(update={"status": "degraded", "detail": trouble})
    return found


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

    app.add_middleware(Faults)
