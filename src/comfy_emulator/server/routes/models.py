"""`/models`, `/experiment/models` and `/embeddings` (`server.py`, `app/model_manager.py` of ComfyUI)."""

from __future__ import annotations

from aiohttp import web

from comfy_emulator.model_files import MODEL_FOLDERS
from comfy_emulator.server.request import emulator_of


def add_routes(router: web.UrlDispatcher, prefix: str) -> None:
    """Add the routes of this module below `prefix`."""
    router.add_get(f"{prefix}/models", list_model_types)
    router.add_get(f"{prefix}/models/{{folder}}", get_models)
    router.add_get(f"{prefix}/experiment/models", get_model_folders)
    router.add_get(f"{prefix}/experiment/models/{{folder}}", get_all_models)
    router.add_get(f"{prefix}/embeddings", get_embeddings)


async def list_model_types(request: web.Request) -> web.Response:
    """Return the names of the model folders."""
    return web.json_response(list(MODEL_FOLDERS))


async def get_models(request: web.Request) -> web.Response:
    """Return the names of the models in a folder."""
    folder = request.match_info["folder"]
    if folder not in MODEL_FOLDERS:
        return web.Response(status=404)
    return web.json_response(emulator_of(request).models.names(folder))


async def get_model_folders(request: web.Request) -> web.Response:
    """Return the model folders with their paths."""
    root = emulator_of(request).folders.models
    shown = [folder for folder in MODEL_FOLDERS if folder not in ("configs", "custom_nodes")]
    return web.json_response([{"name": name, "folders": [str(root / name)], "extensions": []} for name in shown])


async def get_all_models(request: web.Request) -> web.Response:
    """Return the models in a folder with size and times."""
    folder = request.match_info["folder"]
    if folder not in MODEL_FOLDERS:
        return web.Response(status=404)
    return web.json_response(emulator_of(request).models.entries(folder))


async def get_embeddings(request: web.Request) -> web.Response:
    """Return the names of the embeddings without their extensions."""
    names = emulator_of(request).models.names("embeddings")
    return web.json_response([name.rpartition(".")[0] or name for name in names])
