"""`GET /ping`, with which RunPod's load balancer asks whether a gateway can take work; it needs no key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from comfy_worker.errors import WorkerError

PATH = "/ping"
_MAX_AGE_S = 1.0


class CachedReadiness:
    """Whether jobs can run, checked once a second at most, however often it is asked for."""

    def __init__(self, check: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Take a check that raises a `WorkerError` while jobs cannot run."""
        self._check = check
        self._last: tuple[float, int] | None = None
        self._running: asyncio.Future[int] | None = None

    async def status(self) -> int:
        """Return 200 if jobs can run, 204 while ComfyUI or the database does not answer."""
        if self._last is not None and time.monotonic() - self._last[0] < _MAX_AGE_S:
            return self._last[1]
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(self._run_check())
        return await asyncio.shield(self._running)

    async def _run_check(self) -> int:
        try:
            await self._check()
            status = 200
        except WorkerError:
            status = 204
        self._last = (time.monotonic(), status)
        return status


class PingOnly:
    """Serves `/ping` alone, on the port of PORT_HEALTH, which may be open to others than the API's."""

    def __init__(self, app: ASGIApp) -> None:
        """Take the whole application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "http" and scope["path"] == PATH:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await Response(status_code=404, headers={"Connection": "close"})(scope, receive, send)
        else:
            await send({"type": "websocket.close"})
