"""Model management of the workflow API: which files there are, how large they are, and to delete one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.comfy.disk import remove_file
from comfy_worker.gateway.api.dependencies import Dependencies
from comfy_worker.gateway.api.schemas import Answer, DetailedErrorResponse, problems
from comfy_worker.gateway.api.workflow.requests import check_comfyui
from comfy_worker.gateway.callers import ANYONE, current_caller
from comfy_worker.gateway.errors import Forbidden, NotFound, NotImplementedYet, NotPossible
from comfy_worker.gateway.jobs.metrics import Cached

_MODELS_AGE_S = 1.0
"""To list them takes ComfyUI a request for each folder."""

Folder = Annotated[str, Path(max_length=255, examples=["checkpoints"])]
Name = Annotated[str, Path(max_length=1024, examples=["v1-5-pruned-emaonly.safetensors"])]


class ModelShown(BaseModel):
    """A model file."""

    name: str = Field(description="As a node names it, with its subfolder.")
    folder: str
    size_bytes: int | None = Field(description="Null where ComfyUI does not tell.")
    modified_at: str | None = Field(description="ISO 8601, in UTC; null where ComfyUI does not tell.")


class ModelFolder(BaseModel):
    """The model files of one folder."""

    folder: str
    models: list[ModelShown]
    size_bytes: int = Field(description="Of all that are known.")


class ModelDeleted(BaseModel):
    """A model file that is gone."""

    message: str
    model: ModelShown


ModelList = dict[str, list[str] | list[ModelShown]]
"""Names by folder, or models where details are asked for."""


def router(parts: Dependencies) -> APIRouter:
    """Return the routes."""
    door = _Door(parts)
    api = APIRouter(tags=["Models"])
    one, a_file = "/api/models/{folder}", "/api/models/{folder}/{name:path}"
    for path, method, handler, operation_id, model, statuses in (
        ("/api/models", "GET", door.models, "models", ModelList, (503,)),
        ("/api/models", "POST", door.download, "download_model", None, (501,)),
        (one, "GET", door.folder, "model_folder", ModelFolder, (404, 503)),
        (a_file, "GET", door.model, "model", ModelShown, (404, 503)),
        (a_file, "DELETE", door.delete, "delete_model", ModelDeleted, (403, 404, 409, 503)),
    ):
        api.add_api_route(
            path,
            handler,
            methods=[method],
            operation_id=operation_id,
            response_model=model,
            responses=problems(*statuses, model=DetailedErrorResponse),
        )
    return api


class _Door:
    def __init__(self, parts: Dependencies) -> None:
        self._service = parts.service
        self._base = parts.settings.comfyui_base_directory
        self._names = Cached(lambda: dict(parts.service.comfyui().models()), _MODELS_AGE_S)

    async def models(
        self, details: Annotated[bool, Query(description="Each file's size and time in place of its name.")] = False
    ) -> Answer:
        """Return the files in each of ComfyUI's model folders."""
        await check_comfyui(self._service)
        names = await run_in_threadpool(self._names.get)
        if not details:
            return Answer(names)
        client = self._service.comfyui()
        return Answer({folder: await run_in_threadpool(_models_in, client, folder, names[folder]) for folder in names})

    async def download(self) -> Answer:
        """Download a model; that is not there yet, and this always answers 501."""
        raise NotImplementedYet(
            "Downloading a model is not there yet", hint="Put the file into its folder below ComfyUI's models"
        )

    async def folder(self, folder: Folder) -> Answer:
        """Return the model files in a folder, with their sizes and times."""
        models = await self._models(folder)
        return Answer(
            {"folder": folder, "models": models, "size_bytes": sum(model["size_bytes"] or 0 for model in models)}
        )

    async def model(self, folder: Folder, name: Name) -> Answer:
        """Return one model file's size and time."""
        return Answer(_named(name, await self._models(folder)))

    async def delete(self, folder: Folder, name: Name) -> Answer:
        """Delete a model file from ComfyUI's disk; that takes an administrator's key."""
        caller = current_caller()
        if caller is ANYONE or caller.owners is not None:
            raise Forbidden("Deleting a model takes a key of API_ADMIN_KEYS")
        model = _named(name, await self._models(folder))
        if self._base is None:
            raise NotPossible(
                "The gateway cannot reach ComfyUI's disk", hint="COMFYUI_BASE_DIRECTORY says where it is mounted"
            )
        if users := await self._service.jobs_with_value(name):
            raise NotPossible(
                f"{name} is used by {_jobs(len(users))} not ended", hint="Cancel what uses it, or wait for its end"
            )
        await run_in_threadpool(_delete, self._service.comfyui(), folder, name)
        return Answer({"message": "Model deleted", "model": model})

    async def _models(self, folder: str) -> list[dict[str, Any]]:
        """Return a folder's models; raise `NotFound` if ComfyUI has no such folder."""
        await check_comfyui(self._service)
        if folder not in await run_in_threadpool(self._names.get):
            raise NotFound(f"ComfyUI has no model folder {folder!r}")
        client = self._service.comfyui()
        names = (await run_in_threadpool(client.models, [folder]))[folder]
        return await run_in_threadpool(_models_in, client, folder, names)


def _jobs(count: int) -> str:
    return "1 job that has" if count == 1 else f"{count} jobs that have"


def _models_in(client: ComfyClient, folder: str, names: Sequence[str]) -> list[dict[str, Any]]:
    facts = {str(fact.get("name")): fact for fact in client.model_facts(folder)}
    return [_shown(folder, name, facts.get(name, {})) for name in names]


def _shown(folder: str, name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    modified = facts.get("modified")
    at = None if modified is None else datetime.fromtimestamp(modified, timezone.utc).isoformat(timespec="seconds")
    return {"name": name, "folder": folder, "size_bytes": facts.get("size"), "modified_at": at}


def _named(name: str, models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = next((model for model in models if model["name"] == name), None)
    if found is None:
        raise NotFound(f"There is no model {name!r} in that folder")
    return found


def _delete(client: ComfyClient, folder: str, name: str) -> None:
    """Delete a file of ComfyUI's, which has to be the same on the disk that can be reached here.

    Raises:
        NotFound: it is not there any more.
        NotPossible: it is another file, a link, or one that may not be deleted.
    """
    facts = next((fact for fact in client.model_facts(folder) if fact.get("name") == name), None)
    roots = client.model_roots().get(folder, ())
    if facts is None or not 0 <= int(facts.get("pathIndex", -1)) < len(roots):
        raise NotPossible(f"ComfyUI does not tell where {name} lies")
    root = FilePath(roots[int(facts["pathIndex"])])
    try:
        found = (root / name).stat()
        if (found.st_size, found.st_mtime) != (facts.get("size"), facts.get("modified")):
            raise NotPossible(f"{name} is another file on this machine's disk than ComfyUI's")
        remove_file(root, name)
    except FileNotFoundError:
        raise NotPossible(f"{name} does not lie on a disk that the gateway can reach") from None
    except ValueError as error:
        raise NotPossible(f"{name} is not deleted: {error}") from None
    except OSError as error:
        raise NotPossible(f"{name} cannot be deleted: {error.strerror}") from None
