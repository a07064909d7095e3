"""`GET /ping`, by which a load balancer of RunPod finds out whether a gateway can be given work; it has no key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from comfy_worker.errors import WorkerError

PATH = "/ping"
_AGE_S = 1.0


class Readiness:
    """Whether jobs can run, as a load balancer asks for it; however often it asks, it is found out once a second."""

    def __init__(self, check: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Take what raises an error of ours while jobs cannot run."""
        self._check = check
        self._known: tuple[float, int] | None = None
        self._asking: asyncio.Future[int] | None = None

    async def status(self) -> int:
        """Return 200 if jobs can run, 204 while ComfyUI or the database does not answer."""
        if self._known is not None and time.monotonic() - self._known[0] < _AGE_S:
            return self._known[1]
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> int:
        try:
            await self._check()
            status = 200
        except WorkerError:
            status = 204
        self._known = (time.monotonic(), status)
        return status


class OnlyPing:
    """An application that has no other path: for the port of PORT_HEALTH, which others may reach than the API's."""

    def __init__(self, app: ASGIApp) -> None:
        """Take the whole application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and scope["path"] == PATH:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await Response(status_code=404, headers={"Connection": "close"})(scope, receive, send)
        else:
            await send({"type": "websocket.close"})
