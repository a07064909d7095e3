"""The aiohttp application with all routes."""

from __future__ import annotations

from aiohttp import web

from comfy_emulator.emulator import Emulator
from comfy_emulator.server.middleware import faults_middleware, origin_only_middleware
from comfy_emulator.server.request import EMULATOR
from comfy_emulator.server.routes import faults, files, jobs, models, prompts, system


def create_app(emulator: Emulator) -> web.Application:
    """Create the application that serves one emulator."""
    app = web.Application(
        client_max_size=emulator.config.max_upload_bytes, middlewares=[origin_only_middleware, faults_middleware]
    )
    app[EMULATOR] = emulator
    for routes in (system, models, prompts, files):
        for prefix in ("", "/api"):
            routes.add_routes(app.router, prefix)
    jobs.add_routes(app.router)
    if emulator.config.allow_faults:
        faults.add_routes(app.router)
    app.router.add_get("/", system.get_root)
    app.router.add_get("/{path:.*}", system.get_unknown)
    return app
