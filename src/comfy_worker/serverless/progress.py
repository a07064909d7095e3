"""Posts a job's progress to RunPod, and none of it after the result."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from comfy_worker.throttled_sender import ThrottledSender
from comfy_worker.worker import json_safe

if TYPE_CHECKING:
    import aiohttp

Session: TypeAlias = "aiohttp.ClientSession"

log = logging.getLogger(__name__)

_INTERVAL_S = 0.5
"""Between the response to one post and the next post."""
_LAST_POST_TIMEOUT_S = 10.0
_HEADERS = {"charset": "utf-8", "Content-Type": "application/x-www-form-urlencoded"}
"""The headers of the SDK's own posts to job-done (`rp_http._transmit`)."""


class ProgressSender:
    """Posts the latest progress while its context is entered, at most twice a second.

    The SDK's `progress_update` starts a thread for each call. Such an update can arrive after the result, and then a
    finished job stays IN_PROGRESS for ever. Leaving this context waits for the post in progress, so none can follow.
    The first post also waits for the interval, so that it does not delay a short job.
    """

    def __init__(self, session: Session, job: Mapping[str, Any]) -> None:
        self._session = session
        self._job = job
        self._sender = ThrottledSender(self._post, _INTERVAL_S, first_delay_s=_INTERVAL_S)
        self._task: asyncio.Task[None]

    def update(self, value: dict[str, Any]) -> None:
        """Set the latest progress; call it in the event loop's thread."""
        self._sender.update(value)

    async def __aenter__(self) -> ProgressSender:
        self._task = asyncio.create_task(self._sender.run())
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self._sender.stop()
        await asyncio.wait([self._task], timeout=_LAST_POST_TIMEOUT_S)
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled() and (bug := self._task.exception()):
            log.error("posting the progress of job %s failed because of a bug", self._job.get("id"), exc_info=bug)

    async def _post(self, value: dict[str, Any]) -> bool:
        """Post progress once and return whether RunPod accepted it. The SDK's retries could take minutes."""
        import aiohttp
        from runpod.serverless.modules import rp_http

        url = f"{rp_http.JOB_DONE_URL.replace('$ID', self._job['id'])}&isStream=false"
        body = json.dumps({"status": "IN_PROGRESS", "output": json_safe(value)}, ensure_ascii=False)
        # The SDK leaves the id of the last job that it posted for in the session's headers.
        headers = {**_HEADERS, "X-Request-ID": self._job["id"]}
        try:
            async with self._session.post(url, data=body, headers=headers) as response:
                await response.read()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            log.debug("progress of job %s did not reach RunPod: %s", self._job["id"], type(error).__name__)
            return False
        if not response.ok:
            log.debug("RunPod answered progress of job %s with status %d", self._job["id"], response.status)
        return response.ok
