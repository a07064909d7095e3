"""`POST /api/video/generate`: a video from a text, with HunyuanVideo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from comfy_worker.catalog.entry import CatalogEntry
from comfy_worker.comfy.client import ComfyClient
from comfy_worker.errors import InvalidInput, MissingModels
from comfy_worker.gateway.api.dependencies import AllServices, Links
from comfy_worker.gateway.api.schemas import COMMON_ERRORS, DetailedErrorResponse, error_responses
from comfy_worker.gateway.api.workflow.requests import check_comfyui, input_of, submit
from comfy_worker.gateway.api.workflow.schemas import STATES, SubmitResponse, VideoBody
from comfy_worker.gateway.errors import NoComfyUI
from comfy_worker.gateway.http.json_response import SafeJSONResponse
from comfy_worker.gateway.http.strict_json_route import StrictJSONRoute

TEMPLATE = "text-to-video-hunyuan"
"""The named workflow that makes the video."""


router = APIRouter(
    tags=["Workflows"],
    route_class=StrictJSONRoute,
    responses=error_responses(*COMMON_ERRORS, model=DetailedErrorResponse),
)


@router.post("/api/video/generate", operation_id="generate_video", response_model=SubmitResponse)
async def generate_video(request: Request, body: VideoBody, services: AllServices, links: Links) -> SafeJSONResponse:
    """Queue a video and return its id; models that ComfyUI does not have are named at once."""
    inputs = inputs_of(body.as_sent())
    job_input = await run_in_threadpool(input_of, {"template": TEMPLATE}, services.catalog, inputs)
    await check_comfyui(services.jobs)
    # The models of workers that cannot be reached are unknown: their job says what is missing.
    with suppress(NoComfyUI):
        await run_in_threadpool(check_models, services.catalog.get(TEMPLATE), services.jobs.comfyui())
    record, _ = await submit(request, services, links, job_input)
    return SafeJSONResponse(
        {
            "prompt_id": record.id,
            "status": STATES[record.state],
            "message": "Video submitted successfully",
            **body.warnings(),
        }
    )


def inputs_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the named workflow's parameters.

    Raises:
        InvalidInput: `extra_params` repeats a field of the request.
    """
    own = {name: body[name] for name in ("prompt", "duration", "style") if body.get(name) is not None}
    if body.get("resolution") is not None:
        width, height = body["resolution"].lower().split("x")
        own |= {"width": int(width), "height": int(height)}
    extra = body.get("extra_params") or {}
    twice = [name for name in extra if name in own]
    if twice:
        raise InvalidInput(f"extra_params says again what the request says beside it: {', '.join(twice)}")
    return {**own, **extra}


def check_models(entry: CatalogEntry, client: ComfyClient) -> None:
    """Check that ComfyUI has all models of a named workflow.

    Raises:
        MissingModels: it has not; the sentence names the files and their folders.
        ComfyUnreachable: it does not answer.
    """
    present = client.models(dict.fromkeys(model.folder for model in entry.manifest.models))
    missing = [model for model in entry.manifest.models if model.file not in present.get(model.folder, ())]
    if missing:
        raise missing_models(entry.name, [model.model_dump(exclude_none=True) for model in missing])


def missing_models(name: str, models: Sequence[Mapping[str, str]]) -> MissingModels:
    """Return the error that names files which a named workflow needs, and their folders."""
    files = ", ".join(f"{model['file']} (put it into models/{model['folder']})" for model in models)
    return MissingModels(
        f"ComfyUI does not have the models of {name}: {files}",
        details={"models": [dict(model) for model in models]},
        hint="Put each file into its folder; details say where it can be had",
    )
