"""Progress of a job on its way to RunPod: in order, the latest only, and never after the result."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TypeAlias

import aiohttp

Session: TypeAlias = aiohttp.ClientSession

_INTERVAL_S = 0.5
_LAST_POST_TIMEOUT_S = 10.0


class ProgressSender:
    """Posts what it was last told, at most twice a second, one post after the other.

    The SDK's own `progress_update` starts a thread a call; an update of it may land after the result and leave a
    finished job IN_PROGRESS for ever. Leaving this context waits for the post under way, so nothing can come later.
    The first post waits its interval too: a short job is not made longer by telling of it.
    """

    def __init__(self, session: Session, job: Mapping[str, Any]) -> None:
        self._session = session
        self._job = job
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
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_LAST_POST_TIMEOUT_S)
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _send_all(self) -> None:
        from runpod.serverless.modules.rp_http import send_result

        while not await self._closes_within(_INTERVAL_S):
            await self._news.wait()
            if self._closing.is_set():
                return
            self._news.clear()
            await send_result(self._session, {"status": "IN_PROGRESS", "output": self._latest}, self._job)

    async def _closes_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._closing.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True
