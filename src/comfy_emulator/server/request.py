"""What the routes share: the emulator of a request, and how to drop a connection."""

from __future__ import annotations

from aiohttp import web

from comfy_emulator.emulator import Emulator

EMULATOR: web.AppKey[Emulator] = web.AppKey("emulator", Emulator)


def emulator_of(request: web.Request) -> Emulator:
    """Return the emulator that serves a request."""
    return request.app[EMULATOR]


def abort_connection(request: web.Request) -> web.Response:
    """Drop the connection of a request; the returned response is never sent."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
