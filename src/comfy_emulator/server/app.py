"""The web application: all routes of ComfyUI's API, what guards them, and the faults that befall them."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web
from pydantic import ValidationError

from comfy_emulator.emulator import EMULATOR, Emulator, cut, emulator_of
from comfy_emulator.faults import Faults, take
from comfy_emulator.model_files import MODEL_FOLDERS, facts_in, names_in
from comfy_emulator.server.files import add_file_routes
from comfy_emulator.server.jobs import add_job_routes
from comfy_emulator.server.prompts import add_prompt_routes

COMFYUI_VERSION = "0.8.0"
"""The version that the emulator answers as."""

_PAGE = "<!doctype html><title>ComfyUI emulator</title><p>The API of a ComfyUI, without its editor."
_CONTROL = "/_emulator/"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def create_app(emulator: Emulator) -> web.Application:
    """Make the application that serves one emulator."""
    app = web.Application(
        client_max_size=emulator.config.max_upload_bytes, middlewares=[refuse_foreign_origin, meet_faults]
    )
    app[EMULATOR] = emulator
    add_service_routes(app.router)
    add_prompt_routes(app.router)
    add_job_routes(app.router)
    add_file_routes(app.router)
    if emulator.config.allow_faults:
        add_fault_routes(app.router)
    app.router.add_get("/{path:.*}", get_unknown)
    return app


def add_service_routes(router: web.UrlDispatcher) -> None:
    """Add what tells of the server itself, each also under `/api`."""
    router.add_get("/", get_page)
    for prefix in ("", "/api"):
        router.add_get(f"{prefix}/ws", get_websocket)
        router.add_get(f"{prefix}/object_info", get_object_info)
        router.add_get(f"{prefix}/object_info/{{class_type}}", get_object_info_of)
        router.add_get(f"{prefix}/system_stats", get_system_stats)
        router.add_get(f"{prefix}/features", get_features)
        router.add_get(f"{prefix}/models", get_model_folders)
        router.add_get(f"{prefix}/models/{{folder}}", get_models)
        router.add_get(f"{prefix}/experiment/models", get_model_roots)
        router.add_get(f"{prefix}/experiment/models/{{folder}}", get_model_facts)
        router.add_get(f"{prefix}/embeddings", get_embeddings)


def add_fault_routes(router: web.UrlDispatcher) -> None:
    """Add what tests control the faults with; no ComfyUI has this."""
    router.add_get(f"{_CONTROL}faults", get_faults)
    router.add_post(f"{_CONTROL}faults", post_faults)
    router.add_delete(f"{_CONTROL}faults", delete_faults)
    router.add_post(f"{_CONTROL}drop_websockets", post_drop_websockets)
    router.add_post(f"{_CONTROL}die", post_die)


@web.middleware
async def refuse_foreign_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer 403 to a page of another site that talks to a ComfyUI on its visitor's own machine."""
    if "Host" in request.headers and "Origin" in request.headers and _is_foreign(request):
        return web.Response(status=403)
    if request.method == "OPTIONS":
        return web.Response()
    return await handler(request)


def _is_foreign(request: web.Request) -> bool:
    host = urlsplit("//" + request.headers["Host"].lower())
    origin = urlsplit(request.headers["Origin"].lower())
    if not _is_loopback(host.hostname):
        return False
    if host.port is None or origin.port is None:  # a browser may leave out the usual port of either
        return host.hostname != origin.hostname
    return host.netloc != origin.netloc


def _is_loopback(hostname: str | None) -> bool:
    if hostname == "localhost":
        return True
    try:
        return hostname is not None and ipaddress.ip_address(hostname).is_loopback
    except ValueError:  # a name: the emulator asks no name server whose it is
        return False


@web.middleware
async def meet_faults(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let the faults that are set befall a request; those that control them are spared."""
    emulator = emulator_of(request)
    faults = emulator.faults
    if emulator.closing.is_set():
        return cut(request)
    if request.path.startswith(_CONTROL):
        return await handler(request)
    if faults.hang:
        await emulator.pause(None)
        return cut(request)
    slow = take(faults.slow_answers, request.method, request.path)
    if slow is not None:
        await emulator.pause(slow.seconds)
    failing = take(faults.answer_status, request.method, request.path)
    if failing is not None:
        return web.Response(status=failing.status, text=f"{failing.status} as the emulator was told to answer")
    lost = take(faults.lost_answers, request.method, request.path)
    response = await handler(request)
    return response if lost is None else cut(request)


async def get_page(request: web.Request) -> web.Response:
    """Stand in for the editor."""
    return web.Response(text=_PAGE, content_type="text/html")


async def get_unknown(request: web.Request) -> web.Response:
    """Answer as ComfyUI does for a file that its editor does not have; other methods get a 405."""
    return web.Response(status=404, body=b"", content_type="application/octet-stream")


async def get_websocket(request: web.Request) -> web.StreamResponse:
    """Open a websocket, unless a fault forbids it."""
    emulator = emulator_of(request)
    if emulator.faults.websocket == "refuse":
        return web.Response(status=503)
    if emulator.faults.websocket == "hang":
        await emulator.pause(None)
        return cut(request)
    return await emulator.events.serve(request)


async def get_object_info(request: web.Request) -> web.Response:
    """Describe all nodes."""
    interfaces = emulator_of(request).interfaces
    return web.json_response({class_type: interfaces.info(class_type) for class_type in interfaces.classes()})


async def get_object_info_of(request: web.Request) -> web.Response:
    """Describe one node; `{}` for one that there is not."""
    interfaces = emulator_of(request).interfaces
    class_type = request.match_info["class_type"]
    return web.json_response({class_type: interfaces.info(class_type)} if class_type in interfaces else {})


async def get_system_stats(request: web.Request) -> web.Response:
    """Describe the machine: the real memory, and no GPU."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    system = {
        "os": sys.platform,
        "ram_total": total,
        "ram_free": free,
        "comfyui_version": COMFYUI_VERSION,
        "required_frontend_version": "1.35.9",
        "installed_templates_version": None,
        "required_templates_version": "0.7.67",
        "python_version": sys.version,
        "pytorch_version": "2.13.0+cpu",
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
    """Tell what the server can do."""
    return web.json_response(emulator_of(request).features())


async def get_model_folders(request: web.Request) -> web.Response:
    """Name the folders that models lie in."""
    return web.json_response(list(MODEL_FOLDERS))


async def get_models(request: web.Request) -> web.Response:
    """Name the models in a folder."""
    folder = request.match_info["folder"]
    if folder not in MODEL_FOLDERS:
        return web.Response(status=404)
    emulator = emulator_of(request)
    return web.json_response(names_in(emulator.config.models, emulator.folders.models, folder))


async def get_model_roots(request: web.Request) -> web.Response:
    """Tell where on the disk the models of each folder lie."""
    root = emulator_of(request).folders.models
    shown = [folder for folder in MODEL_FOLDERS if folder not in ("configs", "custom_nodes")]
    return web.json_response([{"name": name, "folders": [str(root / name)], "extensions": []} for name in shown])


async def get_model_facts(request: web.Request) -> web.Response:
    """Tell the size and the times of each model in a folder."""
    folder = request.match_info["folder"]
    if folder not in MODEL_FOLDERS:
        return web.Response(status=404)
    emulator = emulator_of(request)
    return web.json_response(facts_in(emulator.config.models, emulator.folders.models, folder))


async def get_embeddings(request: web.Request) -> web.Response:
    """Name the embeddings, without the ends of their file names."""
    files = emulator_of(request).config.models.get("embeddings", ())
    return web.json_response([name.rpartition(".")[0] or name for name in files])


async def get_faults(request: web.Request) -> web.Response:
    """Show the faults as they are set."""
    return web.json_response(emulator_of(request).faults.model_dump())


async def post_faults(request: web.Request) -> web.Response:
    """Set the faults that are named, and leave the others."""
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
    """Cut all open websockets now, without a close frame."""
    emulator_of(request).events.cut_all()
    return web.Response()


async def post_die(request: web.Request) -> web.Response:
    """End the emulator now; this answer never arrives."""
    emulator_of(request).die()
    return cut(request)
