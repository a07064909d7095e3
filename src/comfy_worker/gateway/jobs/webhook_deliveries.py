"""Sends the webhooks that are due in the store; one that a crash interrupts is sent again, under the same id.

Several gateways may share a database: each claims a webhook before it sends it, for longer than an attempt takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tenacity import AsyncRetrying, retry_if_exception_type, wait_fixed

from comfy_worker.errors import InvalidInput, WorkerError
from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.jobs.assets import AssetStore
from comfy_worker.gateway.jobs.progress_webhooks import ProgressWebhooks
from comfy_worker.gateway.jobs.signed_links import AssetLinks
from comfy_worker.gateway.jobs.webhook_formats import WebhookFormats, WebhookParts
from comfy_worker.gateway.jobs.webhook_receivers import webhook_of_request
from comfy_worker.gateway.store.job_store import JobStore
from comfy_worker.gateway.store.records import WebhookDelivery
from comfy_worker.logs import where_it_broke
from comfy_worker.net.urls import display_origin
from comfy_worker.redact import redact
from comfy_worker.settings import Settings
from comfy_worker.types import Webhook
from comfy_worker.webhooks.message import Message, check_webhook, webhook_of_settings
from comfy_worker.webhooks.sending import NotAccepted, TryAgain, post

log = logging.getLogger(__name__)

_MB = 1_000_000
_AT_ONCE = 32
_DATABASE_RETRY_S = 1.0
_POLL_S = 30.0
"""Between two reads of the store: `wake` is not called if the database's reply to a job's end is lost."""
_SHARED_POLL_S = 1.0
"""The same where jobs end in other processes, which cannot call `wake`."""
_CLAIM_S = 60.0
"""How much longer a claim lasts than one attempt."""
_FIRST_BACKOFF_S = 10.0
"""RunPod's pause between two attempts; here it doubles each time."""
_LONGEST_BACKOFF_S = 600.0
_END_TIMEOUT_S = 5.0


class WebhookDeliveries:
    """Sends webhooks in a thread of its own, a few at a time, each until it is accepted or given up.

    Attributes:
        progress: sends the progress of jobs that have not ended.
    """

    def __init__(
        self,
        store: JobStore,
        assets: AssetStore,
        settings: Settings,
        links: AssetLinks,
        formats: WebhookFormats,
        *,
        public_url: str = "",
        first_backoff_s: float = _FIRST_BACKOFF_S,
        is_shared: bool = False,
    ) -> None:
        """Nothing is sent before `start`.

        Args:
            store: has the jobs, and the webhooks that are due.
            assets: the outputs' files.
            settings: the settings.
            links: makes the links to the files.
            formats: the format of each API.
            public_url: the gateway's URL; if empty, the one that each job's caller used.
            first_backoff_s: seconds before a second attempt.
            is_shared: whether other processes use the same store.

        Raises:
            InvalidInput: WEBHOOK_URL or WEBHOOK_SECRET is invalid.
        """
        self.progress = ProgressWebhooks(settings, formats)
        self._store = store
        self._assets = assets
        self._links = links
        self._formats = formats
        self._public_url = public_url
        self._settings = settings
        self._first_backoff_s = first_backoff_s
        self._is_shared = is_shared
        self._poll_s = _SHARED_POLL_S if is_shared else _POLL_S
        self._default = webhook_of_settings(settings)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake_up = asyncio.Event()
        self._stopping = False
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._lost_claims: set[float] = set()
        """Expiry times of claims whose result was lost with the database's reply."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send_all()), name="webhooks")

    def start(self) -> None:
        """Begin to send what is due."""
        self._store.on_webhook_due = self.wake
        self._thread.start()

    def stop(self) -> None:
        """End; give requests under way a few seconds. The rest is sent after the next start."""
        self._stopping = True
        self.wake()
        if self._thread.ident is not None:
            self._thread.join()
        self.progress.close()

    def wake(self) -> None:
        """Send at once what is due; may be called from any thread."""
        loop = self._loop
        if loop is not None:
            # The loop may be closed by now.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._wake_up.set)

    # ----------------------------------------------------------------------------------------------- loop

    async def _send_all(self) -> None:
        self._loop = asyncio.get_running_loop()
        while not self._stopping:
            self._wake_up.clear()
            try:
                pause_s = await self._begin_due()
            except DatabaseUnavailable:
                pause_s = _DATABASE_RETRY_S
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake_up.wait(), pause_s)
        if self._under_way:
            await asyncio.wait(self._under_way.values(), timeout=_END_TIMEOUT_S)
        for task in list(self._under_way.values()):
            task.cancel()

    async def _begin_due(self) -> float:
        """Begin to send what is due; return in how many seconds to do so again."""
        now = time.time()
        for delivery in await asyncio.to_thread(self._due, now):
            is_free = self._is_shared or len(self._under_way) < _AT_ONCE
            if is_free and delivery.id not in self._under_way:
                self._under_way[delivery.id] = asyncio.create_task(self._attempt(delivery))
        due_at = await asyncio.to_thread(self._store.next_delivery_at, now)
        return self._poll_s if due_at is None else min(max(0.0, due_at - time.time()), self._poll_s)

    def _due(self, now: float) -> Sequence[WebhookDelivery]:
        if not self._is_shared:
            return self._store.due_deliveries(now, _AT_ONCE + len(self._under_way))
        until = now + self._settings.webhook_timeout_s + _CLAIM_S
        claims = {*self._lost_claims, until}
        lost = {claim for claim in claims - {until} if claim > now}
        self._lost_claims.add(until)  # until the database has replied
        found = [*self._store.claimed_deliveries(lost)] if lost else []
        found += self._store.claim_deliveries(now, until, max(0, _AT_ONCE - len(self._under_way) - len(found)))
        self._lost_claims -= claims
        return found

    async def _attempt(self, delivery: WebhookDelivery) -> None:
        try:
            error, may_try_again = await self._send(delivery)
            retry_at = self._retry_at(delivery) if error and may_try_again else None
            await self._record(delivery, retry_at, error or "")
            if error:
                what = "is given up" if retry_at is None else "will be sent again"
                log.warning("the webhook of job %s %s: %s", delivery.job_id, what, error)
        except DatabaseUnavailable:
            # Not sent or not recorded: it is still due, and is sent again under the same id.
            self._lost_claims |= {delivery.due_at} if self._is_shared else set()
            await asyncio.sleep(_DATABASE_RETRY_S)
        finally:
            del self._under_way[delivery.id]
            self._wake_up.set()

    async def _record(self, delivery: WebhookDelivery, retry_at: float | None, error: str) -> None:
        """Record the result of an attempt, however long the database is away: otherwise it would be sent again."""
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(DatabaseUnavailable),
            stop=lambda _state: self._stopping,
            wait=wait_fixed(_DATABASE_RETRY_S),
            reraise=True,
        ):
            with attempt:
                await asyncio.to_thread(
                    self._store.record_attempt, delivery.id, time.time(), retry_at=retry_at, error=error
                )

    def _retry_at(self, delivery: WebhookDelivery) -> float | None:
        """Return the time of the next attempt, None if that was the last one."""
        if delivery.attempts + 1 >= self._settings.webhook_attempts:
            return None
        backoff_s: float = self._first_backoff_s * 2**delivery.attempts
        return time.time() + min(backoff_s, _LONGEST_BACKOFF_S)

    # -------------------------------------------------------------------------------------------- message

    async def _send(self, delivery: WebhookDelivery) -> tuple[str | None, bool]:
        """Send a webhook once; return why it was not accepted, None if it was, and whether to try again."""
        webhook: Webhook | None = None
        try:
            message = await asyncio.to_thread(self._message, delivery)
            if message is None:
                return "it has no receiver", False
            webhook = message.webhook
            await self.progress.end(delivery.job_id)
            await post(message, self._settings, self._settings.webhook_timeout_s)
        except DatabaseUnavailable:
            raise
        except (NotAccepted, WorkerError) as error:
            where = f" by {display_origin(webhook.url)}" if webhook else ""
            return f"it was not accepted{where}: {error}", isinstance(error, TryAgain)
        except Exception as error:  # noqa: BLE001 - one webhook's bug must not end all others
            secrets = [webhook.secret, webhook.url] if webhook else []
            return redact(f"it failed because of a bug: {where_it_broke(error)}", secrets), True
        return None, False

    def _message(self, delivery: WebhookDelivery) -> Message | None:
        record = self._store.get(delivery.job_id)
        request = self._store.request_of(delivery.job_id)
        webhook = self._receiver(request or {})
        if record is None or webhook is None:
            return None
        settings = self._settings
        limit_mb = settings.runsync_result_limit_mb if record.is_sync else settings.run_result_limit_mb
        limit = int(limit_mb * _MB)
        parts = WebhookParts(self._assets, self._links, self._public_url, limit)
        body = self._formats[record.api].end_body(record, parts, webhook.extra_params)
        return Message.of(webhook, delivery.id, body, limit)

    def _receiver(self, request: Mapping[str, Any]) -> Webhook | None:
        """Return the job's own webhook if it can be sent, otherwise that of the settings."""
        webhook = webhook_of_request(request)
        try:
            check_webhook(webhook)
        except InvalidInput:
            webhook = None
        return webhook or self._default
