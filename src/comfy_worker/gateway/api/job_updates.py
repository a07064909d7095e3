"""The updates of a job, as every API that streams uses them."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from comfy_worker.gateway.events.bus import PREVIEW, STATUS
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState


@dataclass(frozen=True)
class JobUpdate:
    """A job's new state, its progress, or a preview of its output.

    Attributes:
        type: `status`, `progress` or `preview`.
        data: JSON: `status`, with the position in the queue where that is known; the progress; or the preview,
            `mime_type` and `content` in base64.
        number: after which a client can resume; None for the status that a stream begins with, and for previews.
        state: the job's state from this update on.
        progress: the latest progress of the job's present attempt; empty if there is none.
    """

    type: str
    data: Mapping[str, Any]
    number: int | None
    state: JobState
    progress: Mapping[str, Any]


async def job_updates(
    jobs: JobService, record: JobRecord, after: int | None = None, *, previews: bool = False
) -> AsyncGenerator[JobUpdate, None]:
    """Yield the updates of a job as they happen, until it has ended or the gateway stops.

    Args:
        jobs: finds the job's events.
        record: the job as it was when the client asked for it.
        after: begin with the updates after this number, as far as they are known. None: begin with the present status.
        previews: whether to include previews.

    Raises:
        DatabaseUnavailable: the database does not answer.
    """
    state, progress = record.state, dict[str, Any]()
    if after is None and not state.is_terminal:
        yield JobUpdate(STATUS, _present_status(jobs, record), None, state, progress)
    is_empty = True
    async with aclosing(jobs.events(record.id, after, known=record.state)) as events:
        async for event in events:
            is_empty = False
            if event.type != PREVIEW:
                data = dict(event.data)
                state, progress = (JobState(data["status"]), {}) if event.type == STATUS else (state, data)
                yield JobUpdate(event.type, data, event.number, state, progress)
            elif previews:
                content = base64.b64encode(event.data["content"]).decode("ascii")
                preview = {"mime_type": event.data["mime_type"], "content": content}
                yield JobUpdate(PREVIEW, preview, None, state, progress)
    if after is None and is_empty and record.state.is_terminal:
        # A peer gateway's job whose events have expired in Redis.
        yield JobUpdate(STATUS, {"status": record.state.value}, None, state, progress)


def _present_status(jobs: JobService, record: JobRecord) -> dict[str, Any]:
    status: dict[str, Any] = {"status": record.state.value}
    if record.state is JobState.IN_QUEUE and (position := jobs.position_of(record)) is not None:
        status |= position.progress_fields()
    return status
