"""What happens to a request before its route: the check of its origin, and faults."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web

from comfy_emulator.faults import take_rule
from comfy_emulator.server.request import abort_connection, emulator_of
from comfy_emulator.server.routes.faults import CONTROL_PREFIX

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def origin_only_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse requests of other websites to a ComfyUI on the visitor's machine (`create_origin_only_middleware`)."""
    if "Host" in request.headers and "Origin" in request.headers and _is_cross_origin(request):
        return web.Response(status=403)
    if request.method == "OPTIONS":
        return web.Response()
    return await handler(request)


def _is_cross_origin(request: web.Request) -> bool:
    host = urlsplit("//" + request.headers["Host"].lower())
    origin = urlsplit(request.headers["Origin"].lower())
    if not _is_loopback(host.hostname):
        return False
    if host.port is None or origin.port is None:  # browsers omit default ports
        return host.hostname != origin.hostname
    return host.netloc != origin.netloc


def _is_loopback(hostname: str | None) -> bool:
    """Return whether a host is this machine; names other than `localhost` are not resolved, unlike in ComfyUI."""
    if hostname == "localhost":
        return True
    try:
        return hostname is not None and ipaddress.ip_address(hostname).is_loopback
    except ValueError:
        return False


@web.middleware
async def faults_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Apply the faults to a request, except to those that control the faults."""
    emulator = emulator_of(request)
    faults = emulator.faults
    if emulator.closing.is_set():
        return abort_connection(request)
    if request.path.startswith(CONTROL_PREFIX):
        return await handler(request)
    if faults.hang:
        await emulator.closing.wait()
        return abort_connection(request)
    slow = take_rule(faults.slow_answers, request.method, request.path)
    if slow is not None:
        await emulator.sleep(slow.seconds)
    failing = take_rule(faults.answer_status, request.method, request.path)
    if failing is not None:
        return web.Response(status=failing.status, text=f"{failing.status}, a fault of the emulator")
    lost = take_rule(faults.lost_answers, request.method, request.path)
    response = await handler(request)
    return response if lost is None else abort_connection(request)
