"""Progress webhooks of running jobs: not stored, not repeated, and never sent after the job's end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

from comfy_worker.gateway.jobs.webhook_formats import WebhookFormats
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.settings import Settings
from comfy_worker.types import Job
from comfy_worker.webhooks.progress import ProgressWebhook
from comfy_worker.webhooks.worker_webhooks import Webhooks

SendProgress = Callable[[dict[str, Any]], None]


class ProgressWebhooks:
    """Sends the progress of running jobs in one thread, which the first of them starts."""

    def __init__(self, settings: Settings, formats: WebhookFormats) -> None:
        """Take the settings, and the format of each API."""
        self._webhooks = Webhooks(settings)
        self._formats = formats
        self._lock = threading.Lock()
        self._reports: dict[str, set[ProgressWebhook]] = {}

    @contextmanager
    def sending(self, job: Job, record: JobRecord) -> Iterator[SendProgress]:
        """Yield a function that sends a job's progress, in the format of its API; it never blocks.

        Enter this before the job is known to be open: then `end` finds it, whoever ends the job.
        """
        if job.webhook is None or not job.webhook.progress:
            yield _ignore
            return
        body = partial(self._formats[record.api].progress_body, record, extra_params=job.webhook.extra_params)
        report = ProgressWebhook(job.webhook, job.id, self._webhooks.settings, body)
        with self._lock:
            self._reports.setdefault(job.id, set()).add(report)
        sending = self._webhooks.submit(report.run())
        sending.add_done_callback(lambda _sending: self._forget(job.id, report))
        try:
            yield lambda progress: self._webhooks.call(report.update, progress)
        finally:
            self._webhooks.submit(report.close())

    def _forget(self, job_id: str, report: ProgressWebhook) -> None:
        with self._lock:
            reports = self._reports.get(job_id, set())
            reports.discard(report)
            if not reports:
                self._reports.pop(job_id, None)

    async def end(self, job_id: str) -> None:
        """Send no more progress of a job; return when the request under way has ended."""
        with self._lock:
            closing: list[Future[None]] = [
                self._webhooks.submit(report.close()) for report in self._reports.get(job_id, ())
            ]
        for closed in closing:
            await asyncio.wrap_future(closed)

    def close(self) -> None:
        """End the thread."""
        self._webhooks.close()


def _ignore(_progress: dict[str, Any]) -> None:
    """Send nothing."""
