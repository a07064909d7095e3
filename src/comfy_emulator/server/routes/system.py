"""`/`, `/ws`, `/object_info`, `/system_stats` and `/features` (`server.py` of ComfyUI)."""

from __future__ import annotations

import os
import sys

from aiohttp import web

from comfy_emulator.comfyui_version import (
    COMFYUI_VERSION,
    PYTORCH_VERSION,
    REQUIRED_FRONTEND_VERSION,
    REQUIRED_TEMPLATES_VERSION,
)
from comfy_emulator.server.request import abort_connection, emulator_of

_PAGE = "<!doctype html><title>ComfyUI emulator</title><p>The API of a ComfyUI, without its editor."


def add_routes(router: web.UrlDispatcher, prefix: str) -> None:
    """Add the routes of this module, except the page, below `prefix`."""
    router.add_get(f"{prefix}/ws", websocket_handler)
    router.add_get(f"{prefix}/object_info", get_object_info)
    router.add_get(f"{prefix}/object_info/{{class_type}}", get_object_info_node)
    router.add_get(f"{prefix}/system_stats", get_system_stats)
    router.add_get(f"{prefix}/features", get_features)


async def get_root(request: web.Request) -> web.Response:
    """Return a page in place of the editor."""
    return web.Response(text=_PAGE, content_type="text/html")


async def get_unknown(request: web.Request) -> web.Response:
    """Respond like ComfyUI to a file that its editor lacks; other methods get a 405."""
    return web.Response(status=404, body=b"", content_type="application/octet-stream")


async def websocket_handler(request: web.Request) -> web.StreamResponse:
    """Serve a WebSocket, unless a fault prevents it."""
    emulator = emulator_of(request)
    if emulator.faults.websocket == "refuse":
        return web.Response(status=503)
    if emulator.faults.websocket == "hang":
        await emulator.closing.wait()
        return abort_connection(request)
    return await emulator.websockets.handle(request)


async def get_object_info(request: web.Request) -> web.Response:
    """Return the definitions of all nodes."""
    definitions = emulator_of(request).definitions
    return web.json_response(
        {class_type: definitions.node_info(class_type) for class_type in definitions.class_types()}
    )


async def get_object_info_node(request: web.Request) -> web.Response:
    """Return the definition of one node, `{}` if it does not exist."""
    definitions = emulator_of(request).definitions
    class_type = request.match_info["class_type"]
    return web.json_response({class_type: definitions.node_info(class_type)} if class_type in definitions else {})


async def get_system_stats(request: web.Request) -> web.Response:
    """Return versions and the machine's real memory, without a GPU."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    system = {
        "os": sys.platform,
        "ram_total": total,
        "ram_free": free,
        "comfyui_version": COMFYUI_VERSION,
        "required_frontend_version": REQUIRED_FRONTEND_VERSION,
        "installed_templates_version": None,
        "required_templates_version": REQUIRED_TEMPLATES_VERSION,
        "python_version": sys.version,
        "pytorch_version": PYTORCH_VERSION,
        "embedded_python": False,
        "argv": list(emulator_of(request).config.argv),
    }
    device = {
        "name": "cpu",
        "type": "cpu",
        "index": None,
        "vram_total": total,
        "vram_free": free,
        "torch_vram_total": total,
        "torch_vram_free": free,
    }
    return web.json_response({"system": system, "devices": [device]})


async def get_features(request: web.Request) -> web.Response:
    """Return the server's feature flags (`comfy_api/feature_flags.py`)."""
    return web.json_response(emulator_of(request).feature_flags())
