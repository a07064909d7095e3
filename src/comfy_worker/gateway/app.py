"""The FastAPI application: routers, the services behind them, error handlers and middleware."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from limits import parse
from starlette.concurrency import run_in_threadpool

from comfy_worker import __version__
from comfy_worker.gateway.api import events, files, health, readme
from comfy_worker.gateway.api.catalog import routes as catalog
from comfy_worker.gateway.api.dependencies import Services
from comfy_worker.gateway.api.generate import routes as generate
from comfy_worker.gateway.api.runpod import routes as runpod
from comfy_worker.gateway.api.runpod import webhook
from comfy_worker.gateway.api.runpod.stream_cursors import make_cursors
from comfy_worker.gateway.api.task import routes as task
from comfy_worker.gateway.api.workflow import batch, models, video
from comfy_worker.gateway.api.workflow import routes as workflow
from comfy_worker.gateway.api_keys import Authenticator, Keys
from comfy_worker.gateway.container import Gateway
from comfy_worker.gateway.http.docs_page import add_docs
from comfy_worker.gateway.http.error_responses import add_error_handlers
from comfy_worker.gateway.http.limits import RateLimits
from comfy_worker.gateway.http.middleware import AuthMiddleware, RequestLogMiddleware
from comfy_worker.gateway.http.request_bodies import UnreadBodyMiddleware
from comfy_worker.gateway.http.stream_limits import StreamLimits
from comfy_worker.gateway.http.wrong_keys import WrongKeys
from comfy_worker.gateway.jobs.metrics import GatewayCollector, make_registry
from comfy_worker.gateway.modifiers import Modifiers
from comfy_worker.gateway.openapi import add_openapi
from comfy_worker.gateway.settings import GatewaySettings


def create_app(settings: GatewaySettings, keys: Keys) -> FastAPI:
    """Return the application; it begins to run jobs when it is started.

    Call `end_streams` of its `state.gateway` when it is about to stop.

    Raises:
        InvalidInput: a setting is invalid, or another gateway uses the same database.
    """
    gateway = Gateway(settings)
    gateway.on_takeover = _stop_process
    limits = RateLimits(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(gateway.start)
        yield
        await run_in_threadpool(gateway.stop)
        await limits.close()

    app = FastAPI(title="comfy-worker", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    _set_state(app, gateway, settings)
    _include_routers(app, settings)
    add_openapi(app)
    add_docs(app)
    add_error_handlers(app)
    _add_middleware(app, settings, keys, limits)
    return app


def _stop_process() -> None:
    """Stop gracefully, as on a signal from outside."""
    os.kill(os.getpid(), signal.SIGTERM)


def _set_state(app: FastAPI, gateway: Gateway, settings: GatewaySettings) -> None:
    """Set what the handlers' dependencies return."""
    jobs = gateway.service
    app.state.gateway = gateway
    modifiers = Modifiers(settings.modifiers_dir, [settings.workflows_dir])
    app.state.services = Services(jobs, gateway.assets, gateway.links, settings, gateway.library, modifiers)
    app.state.stream_cursors = make_cursors(settings)
    app.state.queue_counts = generate.QueueCounts(jobs)
    app.state.modifier_limiter = generate.modifier_limiter()
    app.state.model_names = models.make_model_names(jobs)
    app.state.nodes = catalog.make_nodes(jobs)
    app.state.readiness = health.Readiness(jobs)
    app.state.metrics_registry = make_registry()
    app.state.metrics_registry.register(GatewayCollector(gateway.store, jobs.backends, settings.backends))
    app.state.runpod_webhook = webhook.WebhookReceiver(gateway.callbacks, gateway.on_runpod_webhook)


def _include_routers(app: FastAPI, settings: GatewaySettings) -> None:
    app.include_router(runpod.router, tags=["Jobs"])
    app.include_router(
        runpod.router, prefix=runpod.ENDPOINT_PREFIX, tags=["Jobs of an endpoint"], dependencies=[runpod.CheckEndpoint]
    )
    for module in (task, catalog, workflow, models, video, batch, events, generate, readme, health, files):
        app.include_router(module.router)
    if settings.engine == "runpod":
        app.include_router(webhook.router)


def _add_middleware(app: FastAPI, settings: GatewaySettings, keys: Keys, limits: RateLimits) -> None:
    """Add the middleware; the last one added is the outermost."""
    origins = settings.allowed_origins
    app.add_middleware(
        AuthMiddleware,
        authenticator=Authenticator(keys, origins),
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
    app.add_middleware(UnreadBodyMiddleware)
