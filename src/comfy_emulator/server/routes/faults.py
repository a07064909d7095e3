"""`/_emulator/…`, with which tests control the faults; ComfyUI has no such routes."""

from __future__ import annotations

from aiohttp import web
from pydantic import ValidationError

from comfy_emulator.faults import Faults
from comfy_emulator.server.request import abort_connection, emulator_of

CONTROL_PREFIX = "/_emulator/"


def add_routes(router: web.UrlDispatcher) -> None:
    """Add the routes of this module."""
    router.add_get(f"{CONTROL_PREFIX}faults", get_faults)
    router.add_post(f"{CONTROL_PREFIX}faults", post_faults)
    router.add_delete(f"{CONTROL_PREFIX}faults", delete_faults)
    router.add_post(f"{CONTROL_PREFIX}drop_websockets", post_drop_websockets)
    router.add_post(f"{CONTROL_PREFIX}die", post_die)


async def get_faults(request: web.Request) -> web.Response:
    """Return all faults."""
    return web.json_response(emulator_of(request).faults.model_dump())


async def post_faults(request: web.Request) -> web.Response:
    """Set the faults in the body, and leave the others."""
    faults = emulator_of(request).faults
    try:
        faults.update(Faults.model_validate_json(await request.read()))
    except ValidationError as error:
        return web.Response(status=400, text=str(error))
    return web.json_response(faults.model_dump())


async def delete_faults(request: web.Request) -> web.Response:
    """Switch all faults off."""
    faults = emulator_of(request).faults
    faults.clear()
    return web.json_response(faults.model_dump())


async def post_drop_websockets(request: web.Request) -> web.Response:
    """Drop all WebSockets now, without a close frame."""
    emulator_of(request).websockets.abort_all()
    return web.Response()


async def post_die(request: web.Request) -> web.Response:
    """End the emulator now, without a response."""
    emulator_of(request).die()
    return abort_connection(request)
