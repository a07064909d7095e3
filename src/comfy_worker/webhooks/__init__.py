"""Tells whoever asked how a job gets on and, once, how it ended; nothing that a receiver does can hurt the job."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any

from comfy_worker.errors import Cancelled, InvalidInput
from comfy_worker.job.payload import webhook_of
from comfy_worker.job.progress import Progress
from comfy_worker.settings import Settings
from comfy_worker.types import JobEvent, JobState, OnEvent, Webhook
from comfy_worker.webhooks.message import Message, check_webhook, end_of, status_of
from comfy_worker.webhooks.progress import ProgressReport, harmless
from comfy_worker.webhooks.sending import deliver

__all__ = ["Report", "Webhooks", "check_webhook"]

log = logging.getLogger(__name__)

_MB = 1_000_000
_LAST_WAIT_S = 30.0
"""How long the worker's own end waits for what has not been told yet."""
_MOST_OUTSTANDING = 32
"""Ends that wait for their receivers at the same time, each with its body; the oldest are given up beyond that."""


class Webhooks:
    """Sends in a thread of its own, begun with the first webhook; one for all jobs of a worker."""

    def __init__(self, settings: Settings) -> None:
        """Take the settings.

        Raises:
            InvalidInput: WEBHOOK_URL or WEBHOOK_SECRET is not sound.
        """
        self.settings = settings
        secret = settings.webhook_secret
        # The operator's secret signs for the operator's receiver alone: what a job names could use it to forge.
        self._own = (
            Webhook(settings.webhook_url, secret.get_secret_value() if secret else None)
            if settings.webhook_url
            else None
        )
        check_webhook(self._own, "WEBHOOK_URL")
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._outstanding: dict[Future[None], str] = {}

    def report_on(self, job: Mapping[str, Any], result_limit: int | None = None) -> Report:
        """Return who tells of a job that begins now; of one without a receiver it tells nobody.

        Args:
            job: what RunPod hands to a handler; it may yet turn out to be invalid.
            result_limit: bytes that a message may have; RUN_RESULT_LIMIT_MB if None.
        """
        limit = int(self.settings.run_result_limit_mb * _MB) if result_limit is None else result_limit
        return Report(self, job, self._receiver(job), limit)

    def _receiver(self, job: Mapping[str, Any]) -> Webhook | None:
        """Return the job's own receiver if it can be told anything; the settings' one otherwise."""
        webhook = webhook_of(job)
        try:
            check_webhook(webhook)
        except InvalidInput:
            webhook = None
        return webhook or self._own

    def deliver(self, work: Coroutine[Any, Any, None], job_id: str) -> None:
        """Tell of a job's end in the background; the worker's own end waits for that."""
        future = self.begin(work)
        with self._lock:
            self._outstanding[future] = job_id
            oldest = next(iter(self._outstanding))
            too_many = len(self._outstanding) > _MOST_OUTSTANDING
        if too_many and oldest.cancel():
            log.warning("a webhook was given up: more than %d are waiting for their receivers", _MOST_OUTSTANDING)
        future.add_done_callback(self._forget)

    def begin(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        """Do something in the thread that sends, which begins with it."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="webhooks", daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, function: Callable[[dict[str, Any]], None], value: dict[str, Any]) -> None:
        """Call something in the thread that sends, unless that has ended."""
        with self._lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function, value)

    def _forget(self, future: Future[None]) -> None:
        with self._lock:
            self._outstanding.pop(future, None)

    def close(self) -> None:
        """Wait for what is on its way, for at most half a minute, and end the thread.

        To be called while Python still runs as usual: it starts no more threads after that, not even to look up a host.
        """
        with self._lock:
            loop, thread, waiting = self._loop, self._thread, dict(self._outstanding)
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        late = concurrent.futures.wait(waiting, _LAST_WAIT_S).not_done
        for future in late:
            log.warning("the webhook of job %s was given up: the worker ends", waiting[future])
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(_LAST_WAIT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_LAST_WAIT_S)
        loop.close()


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Report:
    """Tells one receiver of one job; methods are called in the job's thread and never wait."""

    def __init__(self, webhooks: Webhooks, job: Mapping[str, Any], webhook: Webhook | None, limit: int) -> None:
        self._webhooks = webhooks
        self._job_id = str(job.get("id") or "local_test")
        self._webhook = webhook
        self._limit = limit
        self._began = time.monotonic()
        self._progress: ProgressReport | None = None

    def listening(self, on_event: OnEvent) -> OnEvent:
        """Return an `on_event` that tells this receiver too, if it asked for progress."""
        if self._webhook is None or not self._webhook.progress:
            return on_event
        progress = Progress()
        report = self._progress = ProgressReport(self._webhook, self._job_id, self._webhooks.settings)
        self._webhooks.begin(report.send_all())

        def listen(event: JobEvent) -> None:
            on_event(event)
            progress.apply(event)
            self._webhooks.call(report.update, progress.as_output())

        return listen

    def end(self, output: Mapping[str, Any], *, cancelled: bool = False) -> None:
        """Tell how the job ended; `cancelled`: the platform counts it so, whatever became of it."""
        if self._webhook is None:
            return
        if cancelled and status_of(output) is not JobState.CANCELLED:
            output = Cancelled("The job was cancelled").as_output()
        # Whoever gets the output may change it while it is being sent.
        work = self._tell_end(self._webhook, dict(output), time.monotonic() - self._began)
        self._webhooks.deliver(work, self._job_id)

    async def _tell_end(self, webhook: Webhook, output: Mapping[str, Any], seconds: float) -> None:
        with harmless(self._job_id, webhook):
            if self._progress is not None:
                await self._progress.close()
            content = end_of(self._job_id, output, seconds)
            message = Message.of(webhook, f"{self._job_id}_{content['status']}", content, self._limit)
            await deliver(message, self._webhooks.settings)
            log.debug("the webhook of job %s was accepted", self._job_id)
