"""The middleware of every request: log and security headers, key, rate limit, size."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from comfy_worker.errors import WorkerError
from comfy_worker.gateway.api_keys import Authenticator
from comfy_worker.gateway.callers import Caller, acting_as
from comfy_worker.gateway.errors import WrongKey
from comfy_worker.gateway.http.error_responses import error_response
from comfy_worker.gateway.http.hosts import check_host, network_of
from comfy_worker.gateway.http.limits import RateLimits
from comfy_worker.gateway.http.request_bodies import HAS_KEY, limit_body
from comfy_worker.gateway.http.stream_limits import StreamLimits, is_stream, limit_opening, responds_at_once
from comfy_worker.gateway.http.wrong_keys import WrongKeys
from comfy_worker.gateway.jobs.signed_links import SIGNED_PATHS

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/live", "/ping"})
"""They need no key: they only tell that the gateway is alive, and whether jobs can run."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "Cache-Control": "no-store",
}
_MAX_LOGGED_PATH = 300
"""Characters; a client without a key could otherwise fill the log."""


class RequestLogMiddleware:
    """Adds the security headers to every response, and logs a line for each request, without its query."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

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
            milliseconds = (time.perf_counter() - started) * 1000
            log.info(
                "%s %s %d %.1f ms", scope["method"], _logged_path(scope), status, milliseconds, extra=_log_fields(scope)
            )


def _logged_path(scope: Scope) -> str:
    """Return a path as it was sent, which has no line breaks, without the slash that would make it a local path."""
    path: str = scope.get("raw_path", b"").decode("latin-1").partition("?")[0]
    return path.lstrip("/")[:_MAX_LOGGED_PATH]


def _log_fields(scope: Scope) -> dict[str, str]:
    """Return the job that a request is about, and the name of its key."""
    state = scope.get("state", {})
    fields = {"job_id": scope.get("path_params", {}).get("job_id") or state.get("job_id"), "key": state.get("key")}
    return {name: value for name, value in fields.items() if value}


class AuthMiddleware:
    """Requires a valid key, and enforces the limits of requests, streams and bodies."""

    def __init__(
        self,
        app: ASGIApp,
        authenticator: Authenticator,
        limits: RateLimits,
        streams: StreamLimits,
        wrong_keys: WrongKeys,
    ) -> None:
        """Wrap an application."""
        self._app = app
        self._authenticator = authenticator
        self._limits = limits
        self._streams = streams
        self._wrong_keys = wrong_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or reject it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            check_host(Headers(scope=scope).get("host"))
            caller = await self._authenticate(scope)
            limited_receive = limit_body(scope, receive) if scope["type"] == "http" else receive
            counted = self._streams.open(caller.name) if caller and is_stream(scope) else nullcontext()
        except WorkerError as error:
            await _reject(scope, receive, send, error)
            return
        with acting_as(caller), counted:
            if not responds_at_once(scope):
                await self._app(scope, limited_receive, send)
                return
            async with limit_opening(send) as send_first:
                await self._app(scope, limited_receive, send_first)

    async def _authenticate(self, scope: Scope) -> Caller | None:
        """Return the caller, None if the request needs no key."""
        path = scope["path"]
        if path in OPEN_PATHS or (_has_files(path) and _is_signed(scope)):
            return None
        try:
            caller = self._authenticator.authenticate(scope.get("method", "GET"), Headers(scope=scope))
        except WrongKey:
            self._wrong_keys.count(network_of((scope.get("client") or ("",))[0]))
            raise
        if caller.owner:
            scope.setdefault("state", {})["key"] = caller.name
        scope.setdefault("state", {})[HAS_KEY] = True
        await self._limits.count(caller.name, path)
        return caller


def _has_files(path: str) -> bool:
    return any(path.startswith(f"{prefix}/") for prefix in SIGNED_PATHS)


def _is_signed(scope: Scope) -> bool:
    return "signature" in parse_qs(scope["query_string"].decode("latin-1"))


async def _reject(scope: Scope, receive: Receive, send: Send, error: WorkerError) -> None:
    response = error_response(error, scope["path"])
    if "text/html" in Headers(scope=scope).get("accept", "") and error.http_status == 401:
        # A browser then asks for the key, as the password.
        response.headers["WWW-Authenticate"] = 'Basic realm="comfy-worker"'
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(response)
    else:
        await response(scope, receive, send)
