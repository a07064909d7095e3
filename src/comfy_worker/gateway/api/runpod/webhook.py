"""RunPod's webhook for the end of a job, so that a gateway in front of an endpoint polls less often."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request

from comfy_worker.gateway.api.schemas import JOB_ID
from comfy_worker.gateway.jobs.signed_links import CALLBACK_PATH, CallbackLinks
from comfy_worker.strict_json import InvalidJson, parse_json

_MAX_ID = 255


@dataclass(frozen=True)
class WebhookReceiver:
    """What the webhook needs; `app.state.runpod_webhook`.

    Attributes:
        links: checks the signature of a webhook's URL.
        notify: called with the gateway's id of a job and RunPod's, if known.
    """

    links: CallbackLinks
    notify: Callable[[str, str | None], None]


router = APIRouter(include_in_schema=False)


@router.post(f"{CALLBACK_PATH}/{{job_id}}")
async def job_ended(
    request: Request,
    job_id: Annotated[str, Path(pattern=JOB_ID)],
    signature: Annotated[str, Query(max_length=255)] = "",
) -> dict[str, str]:
    """Note that a job has ended; the engine then gets the result from RunPod itself, with the key."""
    receiver: WebhookReceiver = request.app.state.runpod_webhook
    receiver.links.check(job_id, signature)
    receiver.notify(job_id, _remote_id(await request.body()))
    return {"status": "ok"}


def _remote_id(body: bytes) -> str | None:
    try:
        message = parse_json(body)
    except InvalidJson:
        return None
    remote_id = message.get("id") if isinstance(message, dict) else None
    return remote_id if isinstance(remote_id, str) and 0 < len(remote_id) <= _MAX_ID else None
