"""Model management of the workflow API: list model files with their sizes, and delete one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.gateway.api.dependencies import Jobs, Settings
from comfy_worker.gateway.api.schemas import COMMON_ERRORS, DetailedErrorResponse, error_responses
from comfy_worker.gateway.api.workflow.remove_file import remove_file
from comfy_worker.gateway.api.workflow.requests import check_comfyui
from comfy_worker.gateway.callers import ANYONE, current_caller
from comfy_worker.gateway.errors import Forbidden, NotFound, NotImplementedYet, NotPossible
from comfy_worker.gateway.http.json_response import SafeJSONResponse
from comfy_worker.gateway.jobs.metrics import Cached
from comfy_worker.gateway.jobs.service import JobService

_MODELS_AGE_S = 1.0
"""ComfyUI needs a request for each folder to list all models."""


class Model(BaseModel):
    """A model file."""

    name: str = Field(description="As nodes name it, with its subfolder.")
    folder: str
    size_bytes: int | None = Field(description="Null if ComfyUI does not report it.")
    modified_at: str | None = Field(description="ISO 8601, in UTC; null if ComfyUI does not report it.")


class ModelFolder(BaseModel):
    """The model files of one folder."""

    folder: str
    models: list[Model]
    size_bytes: int = Field(description="Of all files with a known size.")


class ModelDeleted(BaseModel):
    """A model file that was deleted."""

    message: str
    model: Model


ModelList = dict[str, list[str] | list[Model]]
"""Names by folder, or models with `details`."""


def make_model_names(jobs: JobService) -> Cached[dict[str, Sequence[str]]]:
    """Return the names of ComfyUI's models by folder; `app.state.model_names`."""
    return Cached(lambda: dict(jobs.comfyui().models()), _MODELS_AGE_S)


async def _get_model_names(request: Request) -> Cached[dict[str, Sequence[str]]]:
    names: Cached[dict[str, Sequence[str]]] = request.app.state.model_names
    return names


ModelNames = Annotated[Cached[dict[str, Sequence[str]]], Depends(_get_model_names)]
Folder = Annotated[str, Path(max_length=255, examples=["checkpoints"])]
Name = Annotated[str, Path(max_length=1024, examples=["v1-5-pruned-emaonly.safetensors"])]

router = APIRouter(
    prefix="/api/models", tags=["Models"], responses=error_responses(*COMMON_ERRORS, model=DetailedErrorResponse)
)
_NOT_FOUND = error_responses(404, model=DetailedErrorResponse)


@router.get("", operation_id="models", response_model=ModelList)
async def list_models(
    jobs: Jobs,
    model_names: ModelNames,
    details: Annotated[bool, Query(description="Each file's size and time instead of its name.")] = False,
) -> SafeJSONResponse:
    """Return the files in each of ComfyUI's model folders."""
    await check_comfyui(jobs)
    names = await run_in_threadpool(model_names.get)
    if not details:
        return SafeJSONResponse(names)
    client = jobs.comfyui()
    models = {folder: await run_in_threadpool(_models_in, client, folder, names[folder]) for folder in names}
    return SafeJSONResponse(models)


@router.post("", operation_id="download_model", responses=error_responses(501, model=DetailedErrorResponse))
async def download_model() -> Any:
    """Download a model; not implemented: the response is always 501."""
    raise NotImplementedYet(
        "Downloading a model is not there yet", hint="Put the file into its folder below ComfyUI's models"
    )


@router.get("/{folder}", operation_id="model_folder", response_model=ModelFolder, responses=_NOT_FOUND)
async def get_folder(folder: Folder, jobs: Jobs, model_names: ModelNames) -> SafeJSONResponse:
    """Return the model files in a folder, with their sizes and times."""
    models = await _models(folder, jobs, model_names)
    size_bytes = sum(model["size_bytes"] or 0 for model in models)
    return SafeJSONResponse({"folder": folder, "models": models, "size_bytes": size_bytes})


@router.get("/{folder}/{name:path}", operation_id="model", response_model=Model, responses=_NOT_FOUND)
async def get_model(folder: Folder, name: Name, jobs: Jobs, model_names: ModelNames) -> SafeJSONResponse:
    """Return one model file's size and time."""
    return SafeJSONResponse(_named(name, await _models(folder, jobs, model_names)))


@router.delete(
    "/{folder}/{name:path}",
    operation_id="delete_model",
    response_model=ModelDeleted,
    responses=error_responses(403, 404, 409, model=DetailedErrorResponse),
)
async def delete_model(
    folder: Folder, name: Name, jobs: Jobs, settings: Settings, model_names: ModelNames
) -> SafeJSONResponse:
    """Delete a model file from ComfyUI's disk; that takes an administrator's key."""
    caller = current_caller()
    if caller is ANYONE or caller.owners is not None:
        raise Forbidden("Deleting a model takes a key of API_ADMIN_KEYS")
    model = _named(name, await _models(folder, jobs, model_names))
    if settings.comfyui_base_directory is None:
        raise NotPossible(
            "The gateway cannot reach ComfyUI's disk", hint="COMFYUI_BASE_DIRECTORY says where it is mounted"
        )
    if users := await jobs.jobs_with_value(name):
        raise NotPossible(
            f"{name} is used by {_jobs(len(users))} not ended", hint="Cancel what uses it, or wait for its end"
        )
    await run_in_threadpool(_delete, jobs.comfyui(), folder, name)
    return SafeJSONResponse({"message": "Model deleted", "model": model})


async def _models(folder: str, jobs: JobService, model_names: Cached[dict[str, Sequence[str]]]) -> list[dict[str, Any]]:
    """Return a folder's models; raise `NotFound` if ComfyUI has no such folder."""
    await check_comfyui(jobs)
    if folder not in await run_in_threadpool(model_names.get):
        raise NotFound(f"ComfyUI has no model folder {folder!r}")
    client = jobs.comfyui()
    names = (await run_in_threadpool(client.models, [folder]))[folder]
    return await run_in_threadpool(_models_in, client, folder, names)


def _jobs(count: int) -> str:
    return "1 job that has" if count == 1 else f"{count} jobs that have"


def _models_in(client: ComfyClient, folder: str, names: Sequence[str]) -> list[dict[str, Any]]:
    facts = {str(fact.get("name")): fact for fact in client.model_facts(folder)}
    return [_model(folder, name, facts.get(name, {})) for name in names]


def _model(folder: str, name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    modified = facts.get("modified")
    at = None if modified is None else datetime.fromtimestamp(modified, timezone.utc).isoformat(timespec="seconds")
    return {"name": name, "folder": folder, "size_bytes": facts.get("size"), "modified_at": at}


def _named(name: str, models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    for model in models:
        if model["name"] == name:
            return model
    raise NotFound(f"There is no model {name!r} in that folder")


def _delete(client: ComfyClient, folder: str, name: str) -> None:
    """Delete a file of ComfyUI's, if it is the same on the disk that is mounted here.

    Raises:
        NotPossible: it is another file, a link, missing, or cannot be deleted.
    """
    facts = next((fact for fact in client.model_facts(folder) if fact.get("name") == name), None)
    roots = client.model_roots().get(folder, ())
    if facts is None or not 0 <= int(facts.get("pathIndex", -1)) < len(roots):
        raise NotPossible(f"ComfyUI does not report where {name} is")
    root = FilePath(roots[int(facts["pathIndex"])])
    try:
        found = (root / name).stat()
        if (found.st_size, found.st_mtime) != (facts.get("size"), facts.get("modified")):
            raise NotPossible(f"{name} is another file on this machine's disk than ComfyUI's")
        remove_file(root, name)
    except FileNotFoundError:
        raise NotPossible(f"{name} is not on a disk that the gateway can reach") from None
    except ValueError as error:
        raise NotPossible(f"{name} is not deleted: {error}") from None
    except OSError as error:
        raise NotPossible(f"{name} cannot be deleted: {error.strerror}") from None
