"""The HTTP application: its parts put together, its errors made answers, its doors guarded."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from limits import parse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from comfy_worker import __version__
from comfy_worker.errors import InternalError, InvalidInput, WorkerError
from comfy_worker.gateway.api import events, operations
from comfy_worker.gateway.api.catalog import routes as catalog
from comfy_worker.gateway.api.dependencies import Dependencies
from comfy_worker.gateway.api.generate import routes as generate
from comfy_worker.gateway.api.runpod import routes as runpod
from comfy_worker.gateway.api.runpod import webhook
from comfy_worker.gateway.api.task import routes as tasks
from comfy_worker.gateway.api.workflow import batch, models, video
from comfy_worker.gateway.api.workflow import routes as workflow
from comfy_worker.gateway.api_keys import Guard, Keys
from comfy_worker.gateway.container import Gateway
from comfy_worker.gateway.errors import NotFound
from comfy_worker.gateway.http.docs_page import add_docs
from comfy_worker.gateway.http.error_responses import error_body
from comfy_worker.gateway.http.limits import RateLimits
from comfy_worker.gateway.http.middleware import AuthMiddleware, RequestLogMiddleware, answer_error
from comfy_worker.gateway.http.request_bodies import Unread
from comfy_worker.gateway.http.stream_limits import StreamLimits
from comfy_worker.gateway.http.wrong_keys import WrongKeys
from comfy_worker.gateway.jobs.metrics import GatewayCollector, make_registry
from comfy_worker.gateway.modifiers import Modifiers
from comfy_worker.gateway.openapi import describe, methods_at
from comfy_worker.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

_CODES = {405: "method_not_allowed", 416: "range_not_satisfiable"}


def create_app(settings: GatewaySettings, keys: Keys) -> FastAPI:
    """Return the application; it begins to run jobs when it is started.

    Its `state.let_go` is to be called when it is told to end: answers that wait for a job end at once then.

    Raises:
        InvalidInput: a setting is not sound, or another gateway uses the same database.
    """
    registry = make_registry()
    gateway = Gateway(settings)
    registry.register(GatewayCollector(gateway.store, gateway.service.backends, settings.backends))
    limits = RateLimits(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(gateway.start)
        yield
        await run_in_threadpool(gateway.stop)
        await limits.close()

    app = FastAPI(title="comfy-worker", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.let_go = gateway.let_go
    gateway.when_taken_over = _end_process
    modifiers = Modifiers(settings.modifiers_dir, [settings.workflows_dir])
    parts = Dependencies(gateway.service, gateway.assets, gateway.links, settings, gateway.library, modifiers)
    app.include_router(runpod.router(parts))
    app.include_router(tasks.router(parts))
    app.include_router(catalog.router(parts))
    app.include_router(workflow.router(parts))
    app.include_router(models.router(parts))
    app.include_router(video.router(parts))
    app.include_router(batch.router(parts))
    app.include_router(events.router(gateway.service))
    app.include_router(generate.router(parts))
    app.include_router(operations.router(parts, registry))
    if settings.engine == "runpod":
        app.include_router(webhook.router(gateway.callbacks, gateway.on_runpod_webhook))
    describe(app)
    add_docs(app)
    _answer_errors(app)
    _guard(app, settings, keys, limits)
    return app


def _end_process() -> None:
    """End in good order, as if somebody had asked for it."""
    os.kill(os.getpid(), signal.SIGTERM)


def _guard(app: FastAPI, settings: GatewaySettings, keys: Keys, limits: RateLimits) -> None:
    """Put what every request passes around the application; what is added last is the outermost."""
    origins = settings.allowed_origins
    app.add_middleware(
        AuthMiddleware,
        guard=Guard(keys, origins),
        limits=limits,
        streams=StreamLimits(settings.max_streams_per_key),
        wrong_keys=WrongKeys(parse(settings.rate_limit_wrong_keys) if settings.rate_limit_wrong_keys else None),
    )
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=[
                "Authorization",
                "Content-Type",
                "Idempotency-Key",
                "Last-Event-ID",
                "X-Return-Outputs-As-Base64",
                "X-Include-ComfyUI-Response",
            ],
            expose_headers=["Retry-After"],
        )
    app.add_middleware(RequestLogMiddleware)
    app.add_middleware(Unread)


def _answer_errors(app: FastAPI) -> None:
    app.add_exception_handler(WorkerError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_bug)


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, WorkerError), "registered for these"  # noqa: S101
    return answer_error(error, request.url.path)


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError), "registered for these"  # noqa: S101
    problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
    return answer_error(InvalidInput(problems), request.url.path)


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException), "registered for these"  # noqa: S101
    if error.status_code == NotFound.http_status:
        return answer_error(NotFound("There is nothing at this path"), request.url.path)
    problem = {"error": str(error.detail), "code": _CODES.get(error.status_code, InvalidInput.code)}
    body = error_body(problem, request.url.path)
    response = JSONResponse(body, status_code=error.status_code, headers=error.headers)
    if error.status_code == 405 and (methods := methods_at(request.app, request.url.path)):
        # The framework names those of one route, and a path may have several.
        response.headers["Allow"] = ", ".join(methods)
    return response


async def _answer_bug(request: Request, error: Exception) -> JSONResponse:
    log.error("a request met a bug", exc_info=error)
    return answer_error(InternalError("The gateway failed because of a bug of its own"), request.url.path)
