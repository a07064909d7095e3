"""What every request passes before it reaches a door: headers, log, key, rate, size."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from comfy_worker.errors import WorkerError
from comfy_worker.gateway.api_keys import Guard
from comfy_worker.gateway.callers import Caller, acting
from comfy_worker.gateway.errors import WrongKey
from comfy_worker.gateway.http.error_responses import error_response
from comfy_worker.gateway.http.hosts import check_host, network_of
from comfy_worker.gateway.http.limits import RateLimits
from comfy_worker.gateway.http.request_bodies import HAS_KEY, paced
from comfy_worker.gateway.http.stream_limits import StreamLimits, begins_at_once, is_stream, opening
from comfy_worker.gateway.http.wrong_keys import WrongKeys
from comfy_worker.gateway.jobs.signed_links import SIGNED_PATHS

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/live", "/ping"})
"""Whoever asks these learns only that something listens, and whether it can work."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "Cache-Control": "no-store",
}
_LONGEST_LOGGED = 300
"""Characters of a path that the log has; whoever sends it need not have a key."""


class RequestLogMiddleware:
    """Adds the security headers to every answer and writes one line a request, without its query, to the log."""

    def __init__(self, app: ASGIApp) -> None:
        """Stand around an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            milliseconds = (time.perf_counter() - began) * 1000
            log.info("%s %s %d %.1f ms", scope["method"], _logged(scope), status, milliseconds, extra=_about(scope))


def _logged(scope: Scope) -> str:
    """Return a path as it was sent, so that no line break is in it; without its first slash it is no local path."""
    path: str = scope.get("raw_path", b"").decode("latin-1").partition("?")[0]
    return path.lstrip("/")[:_LONGEST_LOGGED]


def _about(scope: Scope) -> dict[str, str]:
    """Return what a line in the log has besides: the job that the request is about, and whose key it came with."""
    state = scope.get("state", {})
    about = {"job_id": scope.get("path_params", {}).get("job_id") or state.get("job_id"), "key": state.get("key")}
    return {name: value for name, value in about.items() if value}


class AuthMiddleware:
    """Lets in who has a key, uses it not too often and sends not too much."""

    def __init__(
        self, app: ASGIApp, guard: Guard, limits: RateLimits, streams: StreamLimits, wrong_keys: WrongKeys
    ) -> None:
        """Stand around an application."""
        self._app = app
        self._guard = guard
        self._limits = limits
        self._streams = streams
        self._wrong_keys = wrong_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            check_host(Headers(scope=scope).get("host"))
            caller = await self._admit(scope)
            paced_receive = paced(scope, receive) if scope["type"] == "http" else receive
            held = self._streams.take(caller.name) if caller and is_stream(scope) else nullcontext()
        except WorkerError as error:
            await _refuse(scope, receive, send, error)
            return
        with acting(caller), held:
            if not begins_at_once(scope):
                await self._app(scope, paced_receive, send)
                return
            async with opening(send) as send_first:
                await self._app(scope, paced_receive, send_first)

    async def _admit(self, scope: Scope) -> Caller | None:
        """Return who makes a request, None if it needs no key."""
        path = scope["path"]
        if path in OPEN_PATHS or (_has_files(path) and _is_signed(scope)):
            return None
        try:
            caller = self._guard.admit(scope.get("method", "GET"), Headers(scope=scope))
        except WrongKey:
            self._wrong_keys.count(network_of((scope.get("client") or ("",))[0]))
            raise
        if caller.owner:
            # For the line that the log has of this request.
            scope.setdefault("state", {})["key"] = caller.name
        scope.setdefault("state", {})[HAS_KEY] = True
        await self._limits.count(caller.name, path)
        return caller


def _has_files(path: str) -> bool:
    return any(path.startswith(f"{prefix}/") for prefix in SIGNED_PATHS)


def _is_signed(scope: Scope) -> bool:
    return "signature" in parse_qs(scope["query_string"].decode("latin-1"))


async def _refuse(scope: Scope, receive: Receive, send: Send, error: WorkerError) -> None:
    response = error_response(error, scope["path"])
    if "text/html" in Headers(scope=scope).get("accept", "") and error.http_status == 401:
        # A person at a browser is asked for the key, as the password.
        response.headers["WWW-Authenticate"] = 'Basic realm="comfy-worker"'
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(response)
    else:
        await response(scope, receive, send)
