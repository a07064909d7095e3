"""`POST /api/video/generate`: a video out of a text, with HunyuanVideo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from comfy_worker.catalog.entry import CatalogEntry
from comfy_worker.comfy.client import ComfyClient
from comfy_worker.errors import InvalidInput, MissingModels
from comfy_worker.gateway.api.dependencies import Dependencies
from comfy_worker.gateway.api.schemas import Answer, DetailedErrorResponse, problems, request_body
from comfy_worker.gateway.api.workflow.requests import check_comfyui, input_of, submit
from comfy_worker.gateway.api.workflow.schemas import STATES, SubmitAnswer, VideoRequest
from comfy_worker.gateway.errors import NoComfyUI
from comfy_worker.gateway.http.request_validation import read_body, warnings_of

TEMPLATE = "text-to-video-hunyuan"
"""The named workflow that makes the video."""


def router(parts: Dependencies) -> APIRouter:
    """Return the door's route."""
    door = _Door(parts)
    api = APIRouter(tags=["Workflows"])
    api.add_api_route(
        "/api/video/generate",
        door.generate,
        methods=["POST"],
        operation_id="generate_video",
        response_model=SubmitAnswer,
        response_model_exclude_none=True,
        responses=problems(503, model=DetailedErrorResponse),
        openapi_extra=request_body(VideoRequest),
    )
    return api


class _Door:
    def __init__(self, parts: Dependencies) -> None:
        self._parts = parts

    async def generate(self, request: Request) -> Answer:
        """Queue a video and return its id; models that ComfyUI does not have are named at once."""
        body = await read_body(request, VideoRequest)
        job_input = await run_in_threadpool(input_of, {"template": TEMPLATE}, self._parts.library, inputs_of(body))
        await check_comfyui(self._parts.service)
        await run_in_threadpool(self._check_models)
        record, _ = await submit(request, self._parts, job_input)
        return Answer(
            {
                "prompt_id": record.id,
                "status": STATES[record.state],
                "message": "Video submitted successfully",
                **warnings_of(body, VideoRequest),
            }
        )

    def _check_models(self) -> None:
        # Of workers that are out of reach nobody knows: the job says what they lack.
        with suppress(NoComfyUI):
            check_models(self._parts.library.get(TEMPLATE), self._parts.service.comfyui())


def inputs_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the named workflow's parameters.

    Raises:
        InvalidInput: `extra_params` says again what the request says.
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
    """Return if ComfyUI has all models of a named workflow.

    Raises:
        MissingModels: it has not; the sentence says where each of them belongs.
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
