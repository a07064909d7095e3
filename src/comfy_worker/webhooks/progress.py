"""Progress webhooks: the latest progress of a job, at most every two seconds, and none after its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from comfy_worker.logs import where_it_broke
from comfy_worker.net.urls import display_origin
from comfy_worker.redact import redact
from comfy_worker.settings import Settings
from comfy_worker.throttled_sender import ThrottledSender
from comfy_worker.types import Webhook
from comfy_worker.webhooks.message import Message
from comfy_worker.webhooks.sending import NotAccepted, post

log = logging.getLogger(__package__)

_INTERVAL_S = 2.0
_TIMEOUT_S = 5.0


class ProgressWebhook:
    """Sends the progress of one job to its webhook, without retries. Its methods run in one event loop."""

    def __init__(
        self, webhook: Webhook, job_id: str, settings: Settings, body_of: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> None:
        """Prepare to send; `body_of` turns progress into a message's content."""
        self._webhook = webhook
        self._job_id = job_id
        self._settings = settings
        self._body_of = body_of
        self._sender = ThrottledSender(self._send, _INTERVAL_S)
        self._ended = asyncio.Event()

    def update(self, value: dict[str, Any]) -> None:
        """Set the latest progress."""
        self._sender.update(value)

    async def run(self) -> None:
        """Send progress until `close`."""
        try:
            with logged_errors(self._job_id, self._webhook):
                await self._sender.run()
        finally:
            self._ended.set()

    async def close(self) -> None:
        """Return when no message can follow; the one being sent has its own timeout."""
        self._sender.stop()
        await self._ended.wait()

    async def _send(self, progress: dict[str, Any]) -> bool:
        # Not a number: one that starts again, after a restart or in another worker, must not repeat an id.
        message_id = f"{self._job_id}_progress_{uuid.uuid4().hex}"
        message = Message.of(self._webhook, message_id, self._body_of(progress))
        try:
            await post(message, self._settings, min(_TIMEOUT_S, self._settings.webhook_timeout_s))
        except NotAccepted as error:
            host = display_origin(self._webhook.url)
            log.debug("progress of job %s was not accepted by %s: %s", self._job_id, host, error)
        return True


@contextlib.contextmanager
def logged_errors(job_id: str, webhook: Webhook) -> Iterator[None]:
    """Log any error in this block in one line, without the path of the URL and the secret, and suppress it."""
    host = display_origin(webhook.url)
    try:
        yield
    except NotAccepted as error:
        log.warning("the webhook of job %s was not accepted by %s: %s", job_id, host, error)
    except Exception as error:  # noqa: BLE001 - a bug in a webhook must not affect the job
        bug = redact(where_it_broke(error), [webhook.secret, webhook.url])
        log.error("the webhook of job %s to %s failed because of a bug: %s", job_id, host, bug)  # noqa: TRY400
