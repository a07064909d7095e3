"""Tells one receiver how a job gets on: the latest at most every two seconds, and nothing after its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from comfy_worker.logs import where_it_broke
from comfy_worker.net.urls import shown_host
from comfy_worker.redact import redact
from comfy_worker.settings import Settings
from comfy_worker.types import JobState, Webhook
from comfy_worker.webhooks.message import Message
from comfy_worker.webhooks.sending import Refused, post

log = logging.getLogger(__package__)

_INTERVAL_S = 2.0
_TIMEOUT_S = 5.0


class ProgressReport:
    """Sends what it was last told, one after the other and each once; in one event loop."""

    def __init__(
        self,
        webhook: Webhook,
        job_id: str,
        settings: Settings,
        body_of: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        """Take whom to tell, and of what; `body_of` returns what a message says, in place of RunPod's words."""
        self._webhook = webhook
        self._job_id = job_id
        self._settings = settings
        self._body_of = body_of or self._runpods_body
        self._latest: dict[str, Any] = {}
        self._sent: dict[str, Any] = {}
        self._news = asyncio.Event()
        self._closing = asyncio.Event()
        self._ended = asyncio.Event()

    def update(self, value: dict[str, Any]) -> None:
        """Note where the job stands."""
        self._latest = value
        if value != self._sent:
            self._news.set()

    async def send_all(self) -> None:
        """Send until it is closed."""
        try:
            with harmless(self._job_id, self._webhook):
                await self._send_all()
        finally:
            self._ended.set()

    async def _send_all(self) -> None:
        while await self._is_wanted():
            await self._send()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._closing.wait(), _INTERVAL_S)

    async def _is_wanted(self) -> bool:
        """Wait for news; return whether they are to be sent."""
        await self._news.wait()
        self._news.clear()
        return not self._closing.is_set()

    async def _send(self) -> None:
        self._sent = self._latest
        content = self._body_of(self._latest)
        # Not a number: one that begins again, after a restart or in another worker, must not repeat an id.
        message = Message.of(self._webhook, f"{self._job_id}_progress_{uuid.uuid4().hex}", content)
        timeout_s = min(_TIMEOUT_S, self._settings.webhook_timeout_s)
        try:
            await post(message, self._settings, timeout_s)
        except Refused as error:
            log.debug(
                "progress of job %s was not accepted by %s: %s", self._job_id, shown_host(self._webhook.url), error
            )

    def _runpods_body(self, told: dict[str, Any]) -> dict[str, Any]:
        return {"type": "progress", "id": self._job_id, "status": JobState.IN_PROGRESS.value, "output": told}

    async def close(self) -> None:
        """Return when nothing more can come; what is under way has its own time limit."""
        self._closing.set()
        self._news.set()
        await self._ended.wait()


@contextlib.contextmanager
def harmless(job_id: str, webhook: Webhook) -> Iterator[None]:
    """Log whatever goes wrong inside this block in one line, without the URL's path and the secret."""
    where = shown_host(webhook.url)
    try:
        yield
    except Refused as error:
        log.warning("the webhook of job %s was not accepted by %s: %s", job_id, where, error)
    except Exception as error:  # noqa: BLE001 - a webhook's bug is none of the job's business
        why = redact(where_it_broke(error), [webhook.secret, webhook.url])
        log.error("the webhook of job %s to %s met a bug: %s", job_id, where, why)  # noqa: TRY400
