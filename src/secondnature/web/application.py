"""What the servers of both engines have in common: the teaching parts put together, their routes, errors, guards.

The local engine adds its completions to this application; inside vLLM it stands beside vLLM's own.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match

from secondnature import __version__
from secondnature.engines.base import Engine as AnyEngine
from secondnature.engines.local.engine import Engine
from secondnature.errors import BadInput, SecondnatureError
from secondnature.lessons.teaching import Teaching
from secondnature.model.defaults import SamplingDefaults
from secondnature.web import teaching as routes
from secondnature.web.completions import Completions
from secondnature.web.guards import INFERENCE_PATHS, LOOPBACK_HOSTS, LOOPBACK_NAMES, Faults, Guards, Keys
from secondnature.web.in_band import InBand, Layer
from secondnature.web.metrics import exposition
from secondnature.web.refusals import error_body, invalid, no_route
from secondnature.web.stamps import WEIGHTS_HEADERS
from secondnature.web.tools import IGNORED_HEADER
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
        has_route=lambda path: _has_route(app, path),
    )
    if settings.allowed_origins:  # outermost: browsers send no key in a preflight
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[*WEIGHTS_HEADERS, IGNORED_HEADER],
        )
    _speak_errors(app)
    return app


def local_application(
    teaching: Teaching, engine: Engine, tokenizer: Any, defaults: SamplingDefaults | None = None
) -> FastAPI:
    """The whole server: completions and what teaches.

    Args:
        defaults: how a request that does not say is sampled.
    """
    app = application(teaching, engine)
    completions = Completions(
        engine,
        tokenizer,
        teaching.memory,
        teaching.clock,
        teaching.model_name,
        aliases={"default", "secondnature", teaching.settings.model},
        defaults=defaults,
        ignore_tools=teaching.settings.ignore_tools,
    )
    app.include_router(completions.router())

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


def _has_route(app: FastAPI, path: str) -> bool:
    """Whether any method of any route answers at a path."""
    scope = {"type": "http", "path": path, "method": "GET", "root_path": "", "headers": []}
    return any(route.matches(scope)[0] is not Match.NONE for route in app.routes)


def _health(teaching: Teaching, engine: AnyEngine | None, response: Response) -> Health:
    found = teaching.health()
    trouble = "; ".join(x for x in (engine.trouble if engine is not None else "", found.detail) if x)
    if trouble:
        response.status_code = 503
        return found.model_copy(update={"status": "degraded", "detail": trouble})
    return found


def _speak_errors(app: FastAPI) -> None:
    """Every error is `{"error": {type, message, param, code, hint}}`, never a traceback."""

    @app.exception_handler(SecondnatureError)
    def ours(_: Request, error: SecondnatureError) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        return JSONResponse(error_body(error), error.status)

    @app.exception_handler(RequestValidationError)
    def wrong(request: Request, error: RequestValidationError) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        found = invalid(error.errors(), request.headers.get("content-type", ""))
        return JSONResponse(error_body(found), found.status)

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        if error.status_code == 404:
            found: SecondnatureError = no_route(request.url.path, INFERENCE_PATHS | {"/v1/models"})
        else:
            found = BadInput(
                f"{request.method} {request.url.path[:200]}: {error.detail}", "see /openapi.json"
            )
        return JSONResponse(error_body(found), error.status_code, headers=error.headers)

    app.add_middleware(Faults)
