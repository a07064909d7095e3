"""Where RunPod tells the end of a job, so that a gateway in front of an endpoint need not ask for it so often."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request

from comfy_worker.gateway.api.schemas import JOB_ID, Answer
from comfy_worker.gateway.jobs.signed_links import CALLBACK_PATH, CallbackLinks
from comfy_worker.strict_json import InvalidJson, parse_json

Hear = Callable[[str, str | None], None]
_LONGEST_ID = 255


def router(links: CallbackLinks, hear: Hear) -> APIRouter:
    """Return the route; `hear` is called with the gateway's id of a job and RunPod's."""

    async def called(
        request: Request,
        job_id: Annotated[str, Path(pattern=JOB_ID)],
        signature: Annotated[str, Query(max_length=255)] = "",
    ) -> Answer:
        """Take RunPod's word that a job has ended; what came of it is asked at RunPod itself, with the key."""
        links.check(job_id, signature)
        hear(job_id, _remote_id(await request.body()))
        return Answer({"status": "ok"})

    api = APIRouter()
    api.add_api_route(f"{CALLBACK_PATH}/{{job_id}}", called, methods=["POST"], include_in_schema=False)
    return api


def _remote_id(body: bytes) -> str | None:
    try:
        told = parse_json(body)
    except InvalidJson:
        return None
    remote_id = told.get("id") if isinstance(told, dict) else None
    return remote_id if isinstance(remote_id, str) and 0 < len(remote_id) <= _LONGEST_ID else None
