"""Sends the webhooks of a worker's jobs in a background thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from comfy_worker.errors import Cancelled, InvalidInput
from comfy_worker.job.envelope import job_id_of
from comfy_worker.job.payload import webhook_of
from comfy_worker.job.progress import Progress
from comfy_worker.settings import Settings
from comfy_worker.types import JobEvent, JobState, OnEvent, Webhook
from comfy_worker.webhooks.message import Message, check_webhook, end_of, progress_of, status_of, webhook_of_settings
from comfy_worker.webhooks.progress import ProgressWebhook, logged_errors
from comfy_worker.webhooks.sending import deliver

log = logging.getLogger(__package__)

_MB = 1_000_000
_CLOSE_TIMEOUT_S = 30.0
_MAX_PENDING = 32
"""Completion webhooks that wait for their receivers at the same time, each with its body in memory."""


class Webhooks:
    """The webhooks of all jobs of a worker. An event loop in a thread of its own sends them."""

    def __init__(self, settings: Settings) -> None:
        """Check the settings.

        Raises:
            InvalidInput: WEBHOOK_URL or WEBHOOK_SECRET is invalid.
        """
        self.settings = settings
        self._default = webhook_of_settings(settings)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pending: dict[Future[None], str] = {}

    def for_job(self, job: Mapping[str, Any], size_limit: int | None = None) -> JobWebhook:
        """Return the webhook of a job that starts now. Without a receiver, it sends nothing.

        Args:
            job: what RunPod passes to a handler; it may still turn out to be invalid.
            size_limit: the most bytes of a message; RUN_RESULT_LIMIT_MB if None.
        """
        limit = int(self.settings.run_result_limit_mb * _MB) if size_limit is None else size_limit
        return JobWebhook(self, job, self._receiver(job), limit)

    def _receiver(self, job: Mapping[str, Any]) -> Webhook | None:
        """Return the job's own webhook if it is valid, and else that of the settings."""
        try:
            webhook = webhook_of(job)
            check_webhook(webhook)
        except InvalidInput:
            webhook = None
        return webhook or self._default

    def submit_end(self, sending: Coroutine[Any, Any, None], job_id: str) -> None:
        """Send a completion webhook in the background; drop the oldest one if too many are pending."""
        future = self.submit(sending)
        with self._lock:
            self._pending[future] = job_id
            oldest = next(iter(self._pending))
            has_too_many = len(self._pending) > _MAX_PENDING
        if has_too_many and oldest.cancel():
            log.warning("a webhook was dropped: more than %d are waiting for their receivers", _MAX_PENDING)
        future.add_done_callback(self._forget)

    def submit(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        """Run a coroutine in the background thread, which starts with the first one."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="webhooks", daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, function: Callable[[dict[str, Any]], None], value: dict[str, Any]) -> None:
        """Call a function in the background thread, if that is running."""
        with self._lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function, value)

    def _forget(self, future: Future[None]) -> None:
        with self._lock:
            self._pending.pop(future, None)

    def close(self) -> None:
        """Wait for pending completion webhooks, for at most half a minute, and end the thread.

        Call it before the interpreter shuts down, when Python starts no more threads, not even to resolve a host.
        """
        with self._lock:
            loop, thread, pending = self._loop, self._thread, dict(self._pending)
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        for future in concurrent.futures.wait(pending, _CLOSE_TIMEOUT_S).not_done:
            log.warning("the webhook of job %s was dropped: the worker ends", pending[future])
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(_CLOSE_TIMEOUT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_CLOSE_TIMEOUT_S)
        loop.close()


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class JobWebhook:
    """The webhook of one job. Its methods are called in the job's thread and never block."""

    def __init__(self, webhooks: Webhooks, job: Mapping[str, Any], webhook: Webhook | None, size_limit: int) -> None:
        self._webhooks = webhooks
        self._job_id = job_id_of(job)
        self._webhook = webhook
        self._size_limit = size_limit
        self._started_at = time.monotonic()
        self._progress: ProgressWebhook | None = None

    def send_progress(self, on_event: OnEvent) -> OnEvent:
        """Return an `on_event` that calls the given one and, if the job asked for it, sends its progress."""
        if self._webhook is None or not self._webhook.progress:
            return on_event
        progress = Progress()
        body_of = partial(progress_of, self._job_id)
        webhook = self._progress = ProgressWebhook(self._webhook, self._job_id, self._webhooks.settings, body_of)
        self._webhooks.submit(webhook.run())

        def send(event: JobEvent) -> None:
            on_event(event)
            progress.apply(event)
            self._webhooks.call(webhook.update, progress.as_output())

        return send

    def send_end(self, output: Mapping[str, Any], *, cancelled: bool = False) -> None:
        """Send how the job ended. With `cancelled`, RunPod counts it as cancelled, even if it has an output."""
        if self._webhook is None:
            return
        if cancelled and status_of(output) is not JobState.CANCELLED:
            output = Cancelled("The job was cancelled").as_output()
        # A copy, because the handler adds to the output while the message is being sent.
        sending = self._send_end(self._webhook, dict(output), time.monotonic() - self._started_at)
        self._webhooks.submit_end(sending, self._job_id)

    async def _send_end(self, webhook: Webhook, output: Mapping[str, Any], seconds: float) -> None:
        with logged_errors(self._job_id, webhook):
            if self._progress is not None:
                await self._progress.close()
            content = end_of(self._job_id, output, seconds)
            message = Message.of(webhook, f"{self._job_id}_{content['status']}", content, self._size_limit)
            await deliver(message, self._webhooks.settings)
            log.debug("the webhook of job %s was accepted", self._job_id)
