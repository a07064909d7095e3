"""Progress of a job on its way to RunPod: in order, the latest only, and never after the result."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TypeAlias

import aiohttp

from comfy_worker.worker import json_safe

Session: TypeAlias = aiohttp.ClientSession

log = logging.getLogger(__name__)

_INTERVAL_S = 0.5
_LAST_POST_TIMEOUT_S = 10.0
_HEADERS = {"charset": "utf-8", "Content-Type": "application/x-www-form-urlencoded"}
"""Those of the SDK's own posts to job-done (`rp_http._transmit`)."""


class ProgressSender:
    """Posts what it was last told, at most twice a second, one post after the other.

    The SDK's own `progress_update` starts a thread a call; an update of it may land after the result and leave a
    finished job IN_PROGRESS for ever. Leaving this context waits for the post under way, so nothing can come later.
    The first post waits its interval too: a short job is not made longer by telling of it.
    """

    def __init__(
        self,
        session: Session,
        job: Mapping[str, Any],
        *,
        interval_s: float = _INTERVAL_S,
        last_post_timeout_s: float = _LAST_POST_TIMEOUT_S,
    ) -> None:
        """Make ready to post.

        Args:
            session: to RunPod.
            job: as RunPod handed it out.
            interval_s: between the answer to one post and the next.
            last_post_timeout_s: how long the job's end waits for a post that RunPod does not answer.
        """
        self._session = session
        self._job = job
        self._interval_s = interval_s
        self._last_post_timeout_s = last_post_timeout_s
        self._latest: dict[str, Any] | None = None
        self._news = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def update(self, value: dict[str, Any]) -> None:
        """Note where the job stands; in the event loop's thread."""
        self._latest = value
        self._news.set()

    async def __aenter__(self) -> ProgressSender:
        self._task = asyncio.create_task(self._send_all())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._news.set()
        if self._task is None:
            return
        await asyncio.wait([self._task], timeout=self._last_post_timeout_s)
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled() and (bug := self._task.exception()):
            log.error("the progress of job %s met a bug", self._job.get("id"), exc_info=bug)

    async def _send_all(self) -> None:
        while not await self._closes_within(self._interval_s):
            await self._news.wait()
            if self._closing.is_set():
                return
            self._news.clear()
            if not await self._post():
                # Once more after the interval, with what is the latest by then.
                self._news.set()

    async def _post(self) -> bool:
        """Post where the job stands; return whether RunPod took it. Without the SDK's retries: they may last."""
        from runpod.serverless.modules import rp_http

        url = f"{rp_http.JOB_DONE_URL.replace('$ID', self._job['id'])}&isStream=false"
        body = json.dumps({"status": "IN_PROGRESS", "output": json_safe(self._latest)}, ensure_ascii=False)
        try:
            # The SDK leaves the id of the job that it posted for last in the session's own headers.
            headers = {**_HEADERS, "X-Request-ID": self._job["id"]}
            async with self._session.post(url, data=body, headers=headers) as response:
                await response.read()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            log.debug("progress of job %s did not reach RunPod: %s", self._job["id"], type(error).__name__)
            return False
        if not response.ok:
            log.debug("progress of job %s was answered with %d", self._job["id"], response.status)
        return response.ok

    async def _closes_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._closing.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True
